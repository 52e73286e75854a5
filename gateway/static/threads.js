/** The list of conversations. */

import { titleOf } from "./describe.js";
import { element, setAttribute, setText } from "./dom.js";
import { isActive, Nesting } from "./nesting.js";

export class ThreadsView {
  /** thread id → {node, title, meta} */
  #entries = new Map();

  constructor(root, open) {
    this.root = root;
    this.open = open;
    this.empty = element("p", { class: "threads-empty" }, "Your conversations appear here.");
    root.append(this.empty);
  }

  /** @param {Map<string, object[]>} threads Thread id → its runs in order. */
  update(threads, currentId) {
    const order = [...threads].sort(([, a], [, b]) => b.at(-1).firstOffset - a.at(-1).firstOffset);
    this.empty.hidden = order.length > 0;
    for (const [threadId, entry] of this.#entries) {
      if (threads.has(threadId)) continue;
      entry.node.remove();
      this.#entries.delete(threadId);
    }
    let previous = this.empty;
    for (const [threadId, runs] of order) {
      const entry = this.#entry(threadId);
      if (previous.nextElementSibling !== entry.node) previous.after(entry.node);
      previous = entry.node;
      const active = runs.filter(isActive);
      const isWaiting = active.some((run) => run.status === "waiting");
      const agents = [
        ...new Set(new Nesting(runs).roots.map((run) => run.agent).filter(Boolean)),
      ];
      setText(entry.title, titleOf(runs));
      setText(
        entry.meta,
        isWaiting ? "needs you" : active.length > 0 ? "working" : agents.join(", "),
      );
      setAttribute(
        entry.node,
        "data-activity",
        isWaiting ? "waiting" : active.length > 0 ? "running" : null,
      );
      setAttribute(entry.node, "aria-current", threadId === currentId ? "true" : null);
    }
  }

  #entry(threadId) {
    const known = this.#entries.get(threadId);
    if (known) return known;
    const title = element("span", { class: "thread-name" });
    const meta = element("span", { class: "thread-meta" });
    const node = element(
      "button",
      {
        type: "button",
        class: "thread",
        "data-testid": "thread",
        "data-thread-id": threadId,
        onclick: () => this.open(threadId),
      },
      title,
      meta,
    );
    const entry = { node, title, meta };
    this.#entries.set(threadId, entry);
    return entry;
  }
}
