/** Which runs belong to which: an agent that asks another one has a run below its own. Pure. */

import { activityOf } from "./describe.js";
import { isEnded } from "./relay-client.js";

/** The runs of a page as a forest. */
export class Nesting {
  /** The runs that a user asked for, and those whose parent is not known. */
  roots = [];
  #children = new Map();
  #parents = new Map();

  /** @param {object[]} runs In the order of their first event. */
  constructor(runs) {
    const known = new Map(runs.map((run) => [run.runId, run]));
    for (const run of runs) {
      const parent = known.get(run.parentRunId);
      // Whoever asks was there before. A user's own metadata may say anything: even a circle.
      if (!parent || parent.threadId !== run.threadId || parent.firstOffset >= run.firstOffset) {
        this.roots.push(run);
        continue;
      }
      this.#parents.set(run, parent);
      if (this.#children.has(parent)) this.#children.get(parent).push(run);
      else this.#children.set(parent, [run]);
    }
  }

  /** The run that asked for `run`, or `null`. */
  parentOf(run) {
    return this.#parents.get(run) ?? null;
  }

  /** The runs that `run` asked for, in order. */
  childrenOf(run) {
    return this.#children.get(run) ?? [];
  }

  /** All runs below `run`, each before those below itself. */
  below(run) {
    return this.childrenOf(run).flatMap((child) => [child, ...this.below(child)]);
  }

  /** The same without what an earlier attempt asked for. */
  currentBelow(run) {
    return this.childrenOf(run)
      .filter((child) => !isOutdated(child, run))
      .flatMap((child) => [child, ...this.currentBelow(child)]);
  }

  /** A run's status; one that another one below it keeps waiting for the user waits, too. */
  statusOf(run) {
    if (!isActive(run) || run.cancelRequested) return run.status;
    return this.currentBelow(run).some(({ status }) => status === "waiting")
      ? "waiting"
      : run.status;
  }

  /** One sentence: what a run is doing now, which may be what another does for it. */
  activityOf(run) {
    if (run.cancelRequested || run.status === "waiting") return activityOf(run);
    const active = this.currentBelow(run).filter(isActive);
    const busiest = active.find(({ status }) => status === "waiting") ?? active.at(-1);
    return busiest ? `${busiest.agent}: ${activityOf(busiest)}` : activityOf(run);
  }
}

/** True while a run goes on, as far as is known. */
export function isActive(run) {
  return !isEnded(run) && run.status !== "lost";
}

/** True for a run that an earlier attempt of its parent asked for. */
export function isOutdated(run, parent) {
  const retry = parent.items.findLast((item) => item.type === "agent_retrying");
  return Boolean(retry && run.queuedAt && run.queuedAt < retry.at);
}

/**
 * Put `others` between a run's own items, each where its time says; ones without a time come last.
 *
 * @template T
 * @param {object[]} items In their order.
 * @param {T[]} others In their order.
 * @param {(other: T) => string | null} timeOf
 * @returns {(object | T)[]}
 */
export function interleave(items, others, timeOf) {
  if (others.length === 0) return items;
  const merged = [];
  let next = 0;
  for (const item of items) {
    while (next < others.length && item.at && (timeOf(others[next]) ?? "~") < item.at)
      merged.push(others[next++]);
    merged.push(item);
  }
  return [...merged, ...others.slice(next)];
}

/** Tells whether any of some runs is another one than before, or has changed. */
export class ChangeWatch {
  #seen = [];

  hasChanged(runs) {
    const isSame =
      runs.length === this.#seen.length &&
      runs.every((run, i) => run === this.#seen[i].run && run.version === this.#seen[i].version);
    if (!isSame) this.#seen = runs.map((run) => ({ run, version: run.version }));
    return !isSame;
  }
}
