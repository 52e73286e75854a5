import assert from "node:assert/strict";
import { test } from "node:test";

import {
  activityOf,
  answeredBy,
  choicesOf,
  completenessOf,
  elapsedOf,
  stoppedBy,
  titleOf,
} from "../../gateway/static/describe.js";
import {
  axisLabels,
  count,
  formatBrief,
  formatDuration,
  formatElapsed,
  formatMoment,
  formatName,
  formatValue,
  isEmptyValue,
} from "../../gateway/static/format.js";
import { RunStore } from "../../gateway/static/relay-client.js";
import { History } from "./support/history.mjs";

test("durations read well at every size", () => {
  const read = [0, 840, 999.4, 999.6, 4_240, 9_949, 9_960, 59_400, 59_600, 185_000, 3_840_000].map(
    formatDuration,
  );
  assert.deepEqual(read, [
    "0 ms",
    "840 ms",
    "999 ms",
    "1.0 s",
    "4.2 s",
    "9.9 s",
    "10 s",
    "59 s",
    "1 min 00 s",
    "3 min 05 s",
    "1 h 04 min",
  ]);
  assert.equal(formatDuration(-5), "0 ms", "clocks that disagree do not show negative times");
  assert.equal(formatElapsed(12_340), "12.3 s");
});

test("a time axis has the unit that its length asks for", () => {
  assert.deepEqual(axisLabels(4_240), ["0 s", "2.1 s", "4.2 s"]);
  assert.deepEqual(axisLabels(800), ["0 ms", "400 ms", "800 ms"]);
  assert.deepEqual(axisLabels(800, true), ["0 s", "0.4 s", "0.8 s"]);
  assert.equal(axisLabels(1), null);
  assert.deepEqual([20, 593, 1_234, 12_340].map(formatMoment), ["", "+593 ms", "+1.2 s", "+12.3 s"]);
});

test("values in one line and in full", () => {
  assert.equal(formatBrief({ query: "a\n b", limit: 3 }), "query: a b, limit: 3");
  assert.equal(formatBrief("x".repeat(100), 10), "xxxxxxxxx…");
  assert.equal(formatBrief(null), "");
  assert.equal(formatValue({ a: 1 }), '{\n  "a": 1\n}');
  assert.match(formatValue("x".repeat(5_000)), /… 1,000 more characters$/);
  assert.equal(formatName("query_csv"), "Query csv");
  assert.equal(count(1, "event"), "1 event");
  assert.equal(count(1_200, "event"), "1,200 events");
});

test("what a run is doing, in words", () => {
  const history = new History();
  const store = new RunStore();
  const now = (event) => activityOf(store.apply(event));
  assert.equal(
    now(history.lifecycle("agent_queued", { content: "# Hello\nworld" })),
    "Waiting for a worker",
  );
  assert.equal(now(history.lifecycle("agent_started")), "Thinking");
  assert.equal(
    now(history.lifecycle("agent_thinking", { thought: "Which files?" })),
    "Which files?",
  );
  assert.equal(
    now(history.lifecycle("tool_executing", { tool_call_id: "a", tool_name: "find_rows" })),
    "Find rows",
  );
  assert.equal(now(history.progress("a", 41.6)), "Find rows, 42 %");
  assert.equal(
    now(history.lifecycle("input_requested", { request_id: "r", prompt: "?", kind: "text" })),
    "Waiting for your answer",
  );
  assert.equal(now(history.lifecycle("cancel_requested", { by: "bob" })), "Stopping");
  const run = store.runs.get("run_1");
  assert.equal(titleOf([run]), "# Hello");
  assert.equal(elapsedOf(run, Date.parse(run.startedAt) + 1_500), 1_500);
});

test("who stopped it", () => {
  assert.equal(stoppedBy("user", "alice"), "Stopped by you");
  assert.equal(stoppedBy("alice", "alice"), "Stopped by you");
  assert.equal(stoppedBy("reaper", "alice"), "Stopped by reaper");
  assert.equal(stoppedBy(null, "alice"), "Stopped");
});

test("who answered, where it was somebody else", () => {
  assert.equal(answeredBy("user", "alice"), "");
  assert.equal(answeredBy("alice", "alice"), "");
  assert.equal(answeredBy("system", "alice"), "");
  assert.equal(answeredBy("operator", "alice"), "operator");
});

test("choices come from a JSON schema", () => {
  assert.deepEqual(choicesOf({ enum: ["a", 2] }), [
    { value: "a", label: "a" },
    { value: 2, label: "2" },
  ]);
  assert.deepEqual(choicesOf({ oneOf: [{ const: 1, title: "One" }] }), [
    { value: 1, label: "One" },
  ]);
  assert.deepEqual(choicesOf(null), []);
});

test("completeness is claimed only where it was proved", () => {
  const events = new History().exampleRun();
  const of = (some) => {
    const store = new RunStore();
    some.forEach((event) => store.apply(event));
    return completenessOf(store.runs.get("run_1"), false);
  };
  assert.deepEqual(of(events), { isWhole: true, text: "Events 1–9, none missing" });
  assert.equal(of(events.filter(({ seq }) => seq !== 4)).isWhole, false);
  assert.equal(of(events.slice(4)).isWhole, false);
});

test("a value is empty where there is nothing to show", () => {
  for (const empty of [null, undefined, "", [], {}]) assert.equal(isEmptyValue(empty), true);
  for (const full of [0, false, " ", [null], { a: null }]) assert.equal(isEmptyValue(full), false);
});
