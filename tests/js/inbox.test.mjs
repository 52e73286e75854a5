import assert from "node:assert/strict";
import { test } from "node:test";

import {
  codePointLength,
  Inbox,
  parsePosition,
  RunStore,
  textOf,
} from "../../gateway/static/relay-client.js";
import { History } from "./support/history.mjs";

const established = (position, fields = {}) => ({
  type: "connection_established",
  position,
  recovered: true,
  ...fields,
});

function connected(position = "e1:0") {
  const inbox = new Inbox();
  inbox.receive(established(position));
  return inbox;
}

const offsets = (effects) =>
  effects.filter(({ kind }) => kind === "event").map(({ event }) => event.offset);

function parts(event, size) {
  const text = JSON.stringify(event);
  const pieces = [];
  for (let at = 0; at < text.length; at += size) pieces.push(text.slice(at, at + size));
  return pieces.map((piece, index) => ({
    type: "event_part",
    offset: event.offset,
    index,
    total: pieces.length,
    text: piece,
  }));
}

test("positions are read strictly", () => {
  assert.deepEqual(parsePosition("a:b:12"), { epoch: "a:b", offset: 12 });
  for (const bad of [
    null,
    7,
    "",
    ":1",
    "e",
    "e:",
    "e:-1",
    "e:1.5",
    "e:x",
    "e:99999999999999999999",
  ]) {
    assert.equal(parsePosition(bad), null, String(bad));
  }
});

test("the position is the offset of the last event in the current epoch", () => {
  const inbox = connected("e1:4");
  assert.equal(inbox.since, "e1:4");
  inbox.receive({ type: "notice", offset: 5, data: {} });
  assert.equal(inbox.since, "e1:5");
});

test("until the reset has come the old position is asked for", () => {
  const inbox = connected("e1:7");
  inbox.receive(established("e2:2", { recovered: false }));
  assert.equal(inbox.since, "e1:7");
  inbox.receive({ type: "reset", position: "e2:2", runs: [] });
  assert.equal(inbox.since, "e2:2");
});

test("parts that begin anew are of the new event", () => {
  const inbox = connected();
  const [old] = parts({ type: "notice", offset: 1, data: { body: "old" } }, 20);
  inbox.receive(old);
  inbox.receive({ type: "heartbeat", position: "e2:0" });
  const fresh = parts({ type: "notice", offset: 1, data: { body: "new" } }, 30);
  const effects = fresh.flatMap((part) => inbox.receive(part));
  assert.equal(effects.find(({ kind }) => kind === "event").event.data.body, "new");
});

test("an offset that was seen is ignored", () => {
  const inbox = connected();
  const history = new History();
  const first = history.lifecycle("agent_queued", { content: "x" });
  assert.deepEqual(offsets(inbox.receive(first)), [1]);
  assert.deepEqual(inbox.receive(first), []);
});

test("gaps in offsets are no loss", () => {
  const inbox = connected();
  assert.deepEqual(offsets(inbox.receive({ type: "notice", offset: 7, data: {} })), [7]);
});

test("heartbeats and pongs move the position forward, never back", () => {
  const inbox = connected("e1:4");
  inbox.receive({ type: "heartbeat", position: "e1:9" });
  assert.equal(inbox.since, "e1:9");
  inbox.receive({ type: "pong", id: "p", position: "e1:6" });
  assert.equal(inbox.since, "e1:9");
});

test("a heartbeat with a new epoch renames the position", () => {
  const inbox = connected("e1:9");
  inbox.receive({ type: "heartbeat", position: "e2:7" });
  assert.equal(inbox.since, "e2:7");
  assert.deepEqual(offsets(inbox.receive({ type: "notice", offset: 8, data: {} })), [8]);
});

test("a hole in seq asks for a reconnect from before it, once", () => {
  const inbox = connected();
  const history = new History();
  const events = history.exampleRun();
  inbox.receive(events[0]);
  inbox.receive(events[1]);
  const [gap] = inbox.receive(events[3]);
  assert.equal(gap.kind, "gap");
  assert.deepEqual([gap.expected, gap.received, gap.position], [3, 4, "e1:2"]);
  assert.equal(inbox.since, "e1:2", "the event after the hole does not count as received");
  inbox.disconnected();
  inbox.receive(established("e1:2"));
  assert.deepEqual(offsets([...inbox.receive(events[2]), ...inbox.receive(events[3])]), [3, 4]);
});

test("a hole that history has as well is reported, and the stream goes on", () => {
  const inbox = connected();
  const events = new History().exampleRun();
  inbox.receive(events[0]);
  assert.equal(inbox.receive(events[3])[0].kind, "gap");
  inbox.receive(established("e1:1"));
  const [lost, event] = inbox.receive(events[3]);
  assert.deepEqual([lost.kind, event.kind], ["lost", "event"]);
});

test("a hole in the text is seen by code points", () => {
  const inbox = connected();
  const history = new History();
  inbox.receive(history.lifecycle("agent_started"));
  inbox.receive(history.delta("m1", 0, "🙂🙂"));
  assert.deepEqual(
    offsets(inbox.receive(history.delta("m1", 2, "ab"))),
    [3],
    "two code points, four units",
  );
  assert.equal(inbox.receive(history.delta("m1", 5, "late"))[0].kind, "gap");
});

test("a message of a run seen from its start begins at 0", () => {
  const inbox = connected();
  const history = new History();
  inbox.receive(history.lifecycle("agent_started"));
  assert.equal(inbox.receive(history.delta("m1", 3, "late"))[0].kind, "gap");
});

test("a run that is joined in the middle has no hole before it", () => {
  const inbox = connected("e1:50");
  const history = new History();
  const events = history.exampleRun();
  const late = events.slice(5).map((event) => ({ ...event, offset: event.offset + 50 }));
  assert.equal(
    late.flatMap((event) => inbox.receive(event)).every(({ kind }) => kind === "event"),
    true,
  );
});

test("a delta from where the client is known to be, or from 0, is no hole", () => {
  const inbox = connected();
  const history = new History();
  inbox.receive(history.lifecycle("agent_started"));
  inbox.receive(history.delta("m1", 0, "abc"));
  assert.deepEqual(offsets(inbox.receive(history.delta("m1", 0, "abcdef"))), [3]);
  assert.deepEqual(offsets(inbox.receive(history.delta("m1", 6, "g"))), [4]);
});

test("the parts of an event are joined", () => {
  const inbox = connected();
  const history = new History();
  const event = history.lifecycle("agent_completed", { result: "🙂".repeat(100) });
  const effects = parts(event, 7).flatMap((part) => inbox.receive(part));
  assert.deepEqual(effects, [{ kind: "event", event }]);
  assert.equal(inbox.since, "e1:1");
});

test("events of other runs wait behind an event that is still arriving", () => {
  const inbox = connected();
  const history = new History();
  const big = history.lifecycle("agent_completed", { result: "x".repeat(500) });
  const small = history.lifecycle("agent_queued", { content: "y" }, { run: "run_2" });
  const [first, ...rest] = parts(big, 100);
  assert.deepEqual(inbox.receive(first), []);
  assert.deepEqual(inbox.receive(small), []);
  inbox.receive({ type: "heartbeat", position: "e1:2" });
  assert.equal(inbox.since, "e1:0", "what is half received is not received");
  assert.deepEqual(offsets(rest.flatMap((part) => inbox.receive(part))), [1, 2]);
  assert.equal(inbox.since, "e1:2");
});

test("a connection lost in the middle of an event resumes before it", () => {
  const inbox = connected();
  const history = new History();
  const big = history.lifecycle("agent_completed", { result: "x".repeat(500) });
  const pieces = parts(big, 100);
  inbox.receive(pieces[0]);
  inbox.disconnected();
  assert.equal(inbox.since, "e1:0");
  inbox.receive(established("e1:0"));
  assert.deepEqual(offsets(pieces.flatMap((part) => inbox.receive(part))), [1]);
});

test("a repeated part counts once", () => {
  const inbox = connected();
  const pieces = parts(new History().lifecycle("agent_queued", { content: "x".repeat(300) }), 100);
  inbox.receive(pieces[0]);
  inbox.receive(pieces[0]);
  assert.deepEqual(offsets(pieces.slice(1).flatMap((part) => inbox.receive(part))), [1]);
});

test("a reset drops the position, the seq baselines and the texts", () => {
  const inbox = connected("e1:0");
  const history = new History();
  history
    .exampleRun()
    .slice(0, 4)
    .forEach((event) => inbox.receive(event));
  inbox.receive({ type: "reset", position: "e2:40", reason: "history was cut", runs: [] });
  assert.equal(inbox.since, "e2:40");
  const later = history.lifecycle("agent_thinking", { thought: "x" });
  assert.deepEqual(
    offsets(inbox.receive({ ...later, offset: 41, seq: 30 })),
    [41],
    "seq 30 is a baseline, not a hole",
  );
});

test("a reset to a lower offset lets the new history in", () => {
  const inbox = connected("e1:90");
  inbox.receive({ type: "reset", position: "e2:3", reason: "rewound", runs: [] });
  assert.deepEqual(offsets(inbox.receive({ type: "notice", offset: 4, data: {} })), [4]);
});

test("unknown frames are passed on, and move nothing", () => {
  const inbox = connected("e1:4");
  assert.equal(inbox.receive({ type: "from_the_future" })[0].kind, "control");
  assert.equal(inbox.since, "e1:4");
});

/** What a gateway sends to a client that comes back at `since`: the log, and each text joined. */
function resumed(events, since) {
  const lastOf = new Map();
  const texts = new Map();
  for (const event of events) {
    if (event.type !== "text_delta") continue;
    const key = event.data.message_id;
    texts.set(key, (texts.get(key) ?? "") + event.data.text);
    lastOf.set(key, event.offset);
  }
  return events
    .filter((event) => event.offset > since && event.type !== "tool_progress")
    .filter(
      (event) => event.type !== "text_delta" || lastOf.get(event.data.message_id) === event.offset,
    )
    .map((event) =>
      event.type === "text_delta"
        ? { ...event, data: { ...event.data, position: 0, text: texts.get(event.data.message_id) } }
        : event,
    );
}

test("coming back after every prefix ends as if never away", () => {
  const history = new History();
  history.exampleRun("run_1");
  history.lifecycle("agent_queued", { content: "again" }, { run: "run_2" });
  history.delta("m9", 0, "half", { run: "run_2" });
  const { events } = history;
  const final = (store) =>
    [...store.runs.values()].map((run) => [
      run.runId,
      run.status,
      run.lastSeq,
      run.hasHole,
      textOf(run),
      run.result,
    ]);
  const whole = new RunStore();
  events.forEach((event) => whole.apply(event));
  for (let cut = 0; cut <= events.length; cut += 1) {
    const inbox = connected();
    const store = new RunStore();
    const take = (frame) =>
      inbox.receive(frame).forEach((effect) => {
        assert.equal(effect.kind, "event");
        store.apply(effect.event);
      });
    events.slice(0, cut).forEach(take);
    inbox.disconnected();
    inbox.receive(established(inbox.since));
    resumed(events, parsePosition(inbox.since).offset).forEach(take);
    assert.deepEqual(final(store), final(whole), `cut after ${cut}`);
  }
});

test("20,000 deltas pass quickly", () => {
  const inbox = connected();
  const store = new RunStore();
  const history = new History();
  store.apply(inbox.receive(history.lifecycle("agent_started"))[0].event);
  const startedAt = performance.now();
  let position = 0;
  for (let index = 0; index < 20_000; index += 1) {
    const text = "🙂 ab";
    store.apply(inbox.receive(history.delta("m1", position, text))[0].event);
    position += codePointLength(text);
  }
  assert.ok(performance.now() - startedAt < 1_500);
  assert.equal(codePointLength(textOf(store.runs.get("run_1"))), position);
});
