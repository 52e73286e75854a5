/** A store that remembers what was on the screen. */

import { isEnded, openInputs, openTools, RunStore } from "./relay-client.js";

/** Keeps what the user was reading when the relay's history is cut. */
export class ArchivingStore extends RunStore {
  archive = new Map();

  reset(runs) {
    for (const run of this.runs.values()) {
      if (run.isOutline) continue;
      if (!isEnded(run)) this.#lose(run);
      this.archive.set(run.runId, run);
    }
    super.reset(runs);
  }

  #lose(run) {
    const at = run.lastEventAt;
    for (const tool of openTools(run))
      Object.assign(tool, { completed: { at, status: "cancelled" }, version: tool.version + 1 });
    for (const input of openInputs(run))
      Object.assign(input, { resolved: { at, outcome: "cancelled" }, version: input.version + 1 });
    Object.assign(run, { status: "lost", version: run.version + 1 });
  }
}
