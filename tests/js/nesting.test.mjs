import assert from "node:assert/strict";
import { test } from "node:test";

import { ChangeWatch, interleave, isOutdated, Nesting } from "../../gateway/static/nesting.js";
import { RunStore } from "../../gateway/static/relay-client.js";
import { History } from "./support/history.mjs";

/** A store to which runs are added, each below another one. */
class Family {
  history = new History();
  store = new RunStore();

  event(run, type, data = {}, where = {}) {
    return this.store.apply(this.history.lifecycle(type, data, { run, ...where }));
  }

  start(run, parent = null, where = {}) {
    const metadata = parent ? { parent_run_id: parent } : {};
    this.event(run, "agent_queued", { content: run, metadata }, where);
    return this.event(run, "agent_started", {}, where);
  }

  nesting() {
    return new Nesting([...this.store.runs.values()]);
  }
}

const idsOf = (runs) => runs.map(({ runId }) => runId);

test("a run that another one asked for is below it", () => {
  const family = new Family();
  const root = family.start("root");
  family.start("a", "root");
  family.start("b", "root");
  const inner = family.start("inner", "a");
  family.start("other");
  const nesting = family.nesting();
  assert.deepEqual(idsOf(nesting.roots), ["root", "other"]);
  assert.deepEqual(idsOf(nesting.childrenOf(root)), ["a", "b"]);
  assert.deepEqual(idsOf(nesting.below(root)), ["a", "inner", "b"]);
  assert.equal(nesting.parentOf(inner).runId, "a");
  assert.equal(nesting.parentOf(root), null);
});

test("metadata that names no earlier run of the thread hides nothing", () => {
  const family = new Family();
  family.start("orphan", "unknown");
  family.start("self", "self");
  family.start("x", "y");
  family.start("y", "x");
  family.start("elsewhere", "x", { thread: "t2" });
  const nesting = family.nesting();
  assert.deepEqual(idsOf(nesting.roots), ["orphan", "self", "x", "elsewhere"]);
  assert.deepEqual(idsOf(nesting.below(nesting.roots[2])), ["y"]);
});

test("a run waits for the user where one below it does", () => {
  const family = new Family();
  const root = family.start("root");
  const child = family.start("child", "root");
  family.event("child", "agent_thinking", { thought: "Hm" });
  assert.equal(family.nesting().activityOf(root), "docs: Hm");
  family.start("inner", "child");
  family.event("inner", "input_requested", { request_id: "r", prompt: "?", kind: "approval" });
  for (const run of [root, child]) {
    assert.equal(family.nesting().statusOf(run), "waiting");
    assert.equal(run.status, "running");
  }
  assert.equal(family.nesting().activityOf(root), "docs: Waiting for your answer");
  family.event("root", "cancel_requested", { by: "user" });
  assert.equal(family.nesting().statusOf(root), "running");
  assert.equal(family.nesting().activityOf(root), "Stopping");
});

test("what an earlier attempt asked for is not current", () => {
  const family = new Family();
  const root = family.start("root");
  const first = family.start("first", "root");
  family.event("root", "agent_retrying", { attempt: 2, reason: "worker_lost" });
  const second = family.start("second", "root");
  assert.ok(isOutdated(first, root));
  assert.ok(!isOutdated(second, root));
  assert.deepEqual(idsOf(family.nesting().currentBelow(root)), ["second"]);
  assert.deepEqual(idsOf(family.nesting().below(root)), ["first", "second"]);
});

test("nested runs stand where they began; those without a time come last", () => {
  const items = [{ at: "1" }, { at: null }, { at: "3" }];
  const others = [{ t: "1" }, { t: "2" }, { t: null }];
  const timeOf = (other) => other.t;
  assert.deepEqual(interleave(items, others, timeOf), [
    items[0],
    items[1],
    others[0],
    others[1],
    items[2],
    others[2],
  ]);
  assert.equal(interleave(items, [], timeOf), items);
});

test("a change of any of the runs is noticed, once", () => {
  const watch = new ChangeWatch();
  const a = { version: 1 };
  const b = { version: 1 };
  assert.ok(watch.hasChanged([a]));
  assert.ok(!watch.hasChanged([a]));
  assert.ok(watch.hasChanged([a, b]));
  b.version += 1;
  assert.ok(watch.hasChanged([a, b]));
  assert.ok(watch.hasChanged([a, { ...b }]), "another run of the same version");
  assert.ok(watch.hasChanged([a]));
});
