import assert from "node:assert/strict";
import { test } from "node:test";

import {
  isEnded,
  isUnbroken,
  openInputs,
  openTools,
  RunStore,
  textOf,
} from "../../gateway/static/relay-client.js";
import { History } from "./support/history.mjs";

function storeOf(events) {
  const store = new RunStore();
  for (const event of events) store.apply(event);
  return store;
}

/** What of a run matters to a reader; versions only count changes. */
function seen(run) {
  return JSON.parse(
    JSON.stringify(
      { ...run, messages: run.messages.map(({ messageId, text }) => [messageId, String(text)]) },
      (key, value) => (key === "version" || key === "item" ? undefined : value),
    ),
  );
}

test("a whole run", () => {
  const store = storeOf(new History().exampleRun());
  const run = store.runs.get("run_1");
  assert.equal(run.status, "completed");
  assert.equal(run.request.content, "Why?");
  assert.equal(run.result, "Because 🙂🙂 of it. That is all.");
  assert.equal(textOf(run), run.result);
  assert.equal(run.durationMs, 30);
  assert.ok(isEnded(run) && isUnbroken(run));
  assert.equal(run.lastSeq, 9);
  const [search, read] = run.items.filter((item) => item.type === "tool_executing");
  assert.equal(search.completed.status, "ok");
  assert.equal(search.completed.seq, 6);
  assert.equal(search.progress.percentage, 50);
  assert.equal(read.completed.error, "no");
});

test("the status follows the events", () => {
  const history = new History();
  const store = new RunStore();
  const status = (event) => store.apply(event).status;
  assert.equal(
    status(history.lifecycle("agent_queued", { message_id: "m", content: "Hi" })),
    "queued",
  );
  assert.equal(status(history.lifecycle("agent_started")), "running");
  assert.equal(
    status(history.lifecycle("tool_executing", { tool_call_id: "a", tool_name: "x" })),
    "running",
  );
  assert.equal(
    status(
      history.lifecycle("input_requested", { request_id: "r", prompt: "Go?", kind: "approval" }),
    ),
    "waiting",
  );
  assert.equal(openInputs(store.runs.get("run_1")).length, 1);
  assert.equal(
    status(
      history.lifecycle("input_resolved", {
        request_id: "r",
        outcome: "answered",
        value: true,
        by: "alice",
      }),
    ),
    "running",
  );
  assert.equal(openTools(store.runs.get("run_1")).length, 1);
  assert.equal(status(history.lifecycle("agent_stalled", { idle_ms: 60_000 })), "running");
  assert.equal(store.runs.get("run_1").isStalled, true);
  assert.equal(status(history.lifecycle("cancel_requested", { by: "alice" })), "running");
  assert.equal(store.runs.get("run_1").isStalled, false);
  assert.deepEqual(store.runs.get("run_1").cancelRequested, { by: "alice", reason: null });
  assert.equal(
    status(history.lifecycle("agent_cancelled", { by: "alice", duration_ms: 5 })),
    "cancelled",
  );
  assert.equal(openTools(store.runs.get("run_1")).length, 0, "no bar grows after the end");
});

test("an error carries its guidance", () => {
  const history = new History();
  history.lifecycle("agent_queued", { message_id: "m", content: "Hi" });
  history.lifecycle("agent_error", {
    code: "worker_lost",
    error_message: "The worker went away.",
    is_recoverable: true,
    recovery_suggestions: ["Ask again."],
    support_id: "s1",
  });
  const { error, status } = storeOf(history.events).runs.get("run_1");
  assert.equal(status, "error");
  assert.deepEqual(error.recoverySuggestions, ["Ask again."]);
  assert.equal(error.supportId, "s1");
});

test("applying everything twice changes nothing", () => {
  const history = new History();
  history.exampleRun();
  const once = storeOf(history.events);
  const twice = storeOf([...history.events, ...history.events]);
  const stuttering = storeOf(history.events.flatMap((event) => [event, event]));
  assert.deepEqual(seen(twice.runs.get("run_1")), seen(once.runs.get("run_1")));
  assert.deepEqual(seen(stuttering.runs.get("run_1")), seen(once.runs.get("run_1")));
});

test("text that history sends joined ends in the same state", () => {
  const history = new History();
  history.exampleRun();
  const joined = history.events
    .filter(
      ({ type, data }) =>
        type !== "tool_progress" &&
        !(type === "text_delta" && data.position + data.text.length < 12),
    )
    .map((event) =>
      event.type === "text_delta" && event.data.message_id === "m1"
        ? { ...event, data: { ...event.data, position: 0, text: "Because 🙂🙂 of it." } }
        : event,
    );
  const run = storeOf(joined).runs.get("run_1");
  assert.equal(textOf(run), run.result);
});

test("writing begins at the event before it, also where the text comes in one piece", () => {
  const history = new History();
  const started = history.lifecycle("agent_started");
  history.delta("m1", 0, "a");
  history.delta("m1", 1, "b");
  const last = history.delta("m1", 2, "c");
  const whole = { ...last, data: { ...last.data, position: 0, text: "abc" } };
  for (const events of [history.events, [started, whole]]) {
    const { item } = storeOf(events).runs.get("run_1").messages[0];
    assert.deepEqual([item.at, item.lastAt], [started.timestamp, last.timestamp]);
  }
});

test("a retry supersedes all output of earlier attempts", () => {
  const history = new History();
  history.lifecycle("agent_queued", { message_id: "m", content: "Hi" });
  history.lifecycle("agent_started");
  history.lifecycle("tool_executing", { tool_call_id: "a", tool_name: "x" });
  history.delta("m1", 0, "Wrong");
  history.lifecycle("agent_retrying", { attempt: 2, reason: "The worker went away", delay_ms: 10 });
  const store = storeOf(history.events);
  const run = store.runs.get("run_1");
  assert.equal(run.status, "retrying");
  assert.equal(textOf(run), "");
  assert.equal(openTools(run).length, 0);
  store.apply(history.delta("m1", 5, " late", { attempt: 1 }));
  assert.equal(textOf(run), "", "a late piece of the first attempt is not shown");
  store.apply(history.lifecycle("agent_started", {}, { attempt: 2 }));
  store.apply(history.delta("m1", 0, "Right", { attempt: 2 }));
  assert.equal(textOf(run), "Right");
  assert.equal(run.attempt, 2);
  const superseded = run.items.filter((item) => item.isSuperseded).map((item) => item.type);
  assert.deepEqual(superseded, ["agent_started", "tool_executing", "text_delta"]);
});

test("a retry event that already carries the new attempt number means the same", () => {
  const history = new History();
  history.lifecycle("agent_started");
  history.delta("m1", 0, "Wrong");
  history.lifecycle("agent_retrying", { attempt: 2, reason: "x" }, { attempt: 2 });
  history.lifecycle("agent_started", {}, { attempt: 3 });
  history.delta("m2", 0, "Right", { attempt: 3 });
  assert.equal(textOf(storeOf(history.events).runs.get("run_1")), "Right");
});

test("nothing is applied after the terminal event", () => {
  const history = new History();
  history.exampleRun();
  const store = storeOf(history.events);
  assert.equal(
    store.apply(history.lifecycle("agent_error", { code: "internal", error_message: "late" })),
    null,
  );
  assert.equal(store.apply(history.delta("m9", 0, "late")), null);
  assert.equal(store.runs.get("run_1").status, "completed");
});

test("a hole in seq is remembered", () => {
  const history = new History();
  history.exampleRun();
  const run = storeOf(history.events.filter((event) => event.seq !== 3)).runs.get("run_1");
  assert.equal(run.hasHole, true);
  assert.equal(isUnbroken(run), false);
});

test("a run whose beginning is no longer kept is not a hole, and not unbroken", () => {
  const history = new History();
  history.exampleRun();
  const run = storeOf(history.events.filter((event) => event.seq > 6 || !event.seq)).runs.get(
    "run_1",
  );
  assert.equal(run.hasHole, false);
  assert.equal(isUnbroken(run), false);
  assert.equal(run.firstSeq, 7);
  assert.equal(run.items.find((item) => item.toolCallId === "b").completed.status, "error");
});

const OUTLINE = {
  run_id: "run_1",
  thread_id: "t1",
  agent: "docs",
  status: "waiting",
  attempt: 1,
  first_offset: 1,
  open_tools: [{ tool_call_id: "a", tool_name: "search" }],
  open_inputs: [
    { request_id: "r", prompt: "Go?", kind: "approval", expires_at: "2026-11-22T15:00:00.000Z" },
  ],
  cancel_requested: false,
};

test("an outline shows a run before its events come, and gives way to them", () => {
  const store = new RunStore();
  store.outline([OUTLINE]);
  const outlined = store.runs.get("run_1");
  assert.equal(outlined.status, "waiting");
  assert.equal(openTools(outlined).length, 1);
  assert.equal(openInputs(outlined)[0].prompt, "Go?");
  const history = new History();
  for (const event of history.exampleRun()) store.apply(event);
  const run = store.runs.get("run_1");
  assert.equal(run.isOutline, false);
  assert.equal(run.items.filter((item) => item.type === "tool_executing").length, 2);
  assert.ok(isUnbroken(run));
});

test("events that go on from an outline fill it in instead of doubling it", () => {
  const store = new RunStore();
  store.outline([OUTLINE]);
  const at = "2026-11-22T14:00:00.000Z";
  const event = { run_id: "run_1", thread_id: "t1", agent: "docs", attempt: 1, timestamp: at };
  store.apply({
    ...event,
    type: "tool_executing",
    seq: 5,
    offset: 9,
    data: { tool_call_id: "a", tool_name: "search", parameters: { q: 1 } },
  });
  const run = store.runs.get("run_1");
  assert.equal(run.items.filter((item) => item.type === "tool_executing").length, 1);
  assert.deepEqual(run.items.find((item) => item.type === "tool_executing").parameters, { q: 1 });
});

test("an outline does not touch a run that is known", () => {
  const history = new History();
  history.exampleRun();
  const store = storeOf(history.events);
  store.outline([OUTLINE]);
  assert.equal(store.runs.get("run_1").status, "completed");
});

test("a reset forgets everything but what it lists", () => {
  const history = new History();
  history.exampleRun("run_0");
  const store = storeOf(history.events);
  store.reset([OUTLINE]);
  assert.deepEqual([...store.runs.keys()], ["run_1"]);
});

test("a run knows who asked for it, from its events and from an outline", () => {
  const history = new History();
  history.lifecycle("agent_queued", { content: "1", metadata: { parent_run_id: "p" } });
  history.lifecycle("agent_queued", { content: "2", metadata: null }, { run: "run_2" });
  const store = storeOf(history.events);
  store.outline([{ ...OUTLINE, run_id: "run_3", parent_run_id: "run_1" }]);
  assert.deepEqual(
    [...store.runs.values()].map((run) => run.parentRunId),
    ["p", null, "run_1"],
  );
});

test("runs of a thread come in the order of their first event", () => {
  const history = new History();
  history.lifecycle("agent_queued", { content: "1" }, { run: "z" });
  history.lifecycle("agent_queued", { content: "2" }, { run: "a" });
  history.lifecycle("agent_queued", { content: "3" }, { run: "m", thread: "other" });
  const store = storeOf(history.events);
  assert.deepEqual(
    store.ofThread("t1").map((run) => run.runId),
    ["z", "a"],
  );
  assert.deepEqual(
    store.active().map((run) => run.runId),
    ["z", "a", "m"],
  );
});

test("a page that stays open does not keep every run for ever", () => {
  const history = new History();
  const store = new RunStore();
  for (let index = 0; index < 2_200; index += 1) {
    const where = { run: `run_${index}` };
    store.apply(history.lifecycle("agent_queued", { content: "x" }, where));
    if (index > 0) store.apply(history.lifecycle("agent_completed", { result: "y" }, where));
  }
  assert.ok(store.runs.size <= 2_001);
  assert.equal(store.runs.get("run_0").status, "queued", "an active run is never forgotten");
});
