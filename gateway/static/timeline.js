/** One run as a live timeline: what happened, in order, with bars on one time axis. */

import { completenessOf, elapsedOf, STATUS_WORDS } from "./describe.js";
import { element, setAttribute, setText } from "./dom.js";
import { axisLabels, count, formatDuration, formatElapsed } from "./format.js";
import { ChangeWatch, isActive } from "./nesting.js";
import { RowList } from "./timeline-rows.js";

export class TimelineView {
  #run = null;
  #watch = new ChangeWatch();

  /** @param {object} actions userId(), nowMs() */
  constructor(root, actions) {
    this.root = root;
    this.actions = actions;
    this.summaryWords = element("span", { class: "run-summary-words" });
    this.status = element("span", { class: "chip" });
    this.elapsed = element("span", { class: "run-elapsed" });
    this.toggle = element(
      "button",
      {
        type: "button",
        class: "run-toggle",
        "aria-expanded": "false",
        "aria-controls": "run-body",
        onclick: () => this.setOpen(!this.isOpen),
      },
      this.status,
      this.summaryWords,
      this.elapsed,
    );
    this.title = element("h2", { class: "run-title" });
    this.facts = element("p", { class: "run-facts" });
    this.progress = element(
      "div",
      { class: "run-progress", role: "progressbar", "aria-label": "Progress", hidden: true },
      element("span", {}),
    );
    this.steps = element("p", { class: "run-steps", hidden: true });
    this.axis = element(
      "div",
      { class: "axis", "aria-hidden": "true" },
      element("span", {}),
      element("span", {}),
      element("span", {}),
    );
    this.list = new RowList(actions);
    this.proof = element("p", { class: "proof" });
    this.empty = element(
      "div",
      { class: "run-empty" },
      element(
        "div",
        { class: "ghost", "aria-hidden": "true" },
        element("i"),
        element("i"),
        element("i"),
        element("i"),
      ),
      element(
        "p",
        {},
        "What an agent does appears here while it does it: its thoughts, its tools and how long each takes.",
      ),
    );
    this.body = element(
      "div",
      { class: "run-body", id: "run-body" },
      element("header", { class: "run-head" }, this.title, this.facts, this.progress, this.steps),
      this.axis,
      this.list.root,
      this.proof,
    );
    root.replaceChildren(this.toggle, this.body, this.empty);
    this.show(null, null);
  }

  get isOpen() {
    return this.root.classList.contains("open");
  }

  /** On a phone the timeline is a drawer. */
  setOpen(isOpen) {
    this.root.classList.toggle("open", isOpen);
    this.toggle.setAttribute("aria-expanded", String(isOpen));
  }

  show(run, nesting) {
    if (run !== this.#run) this.list.clear();
    this.#run = run;
    this.root.classList.toggle("is-empty", run === null);
    setAttribute(this.root, "data-run-id", run?.runId ?? null);
    setAttribute(this.root, "data-status", run?.status ?? null);
    if (run === null || !this.#watch.hasChanged([run, ...nesting.below(run)])) return;
    this.#updateHead(run, nesting);
    this.list.update(run, nesting);
    this.tick(this.actions.nowMs());
  }

  #updateHead(run, nesting) {
    const isOver = !isActive(run);
    setText(this.title, run.agent ?? "agent");
    const status = nesting.statusOf(run);
    setText(this.status, STATUS_WORDS[status]);
    setText(this.summaryWords, isOver ? count(run.lastSeq, "event") : nesting.activityOf(run));
    setAttribute(this.status, "data-status", status);
    this.#updateFacts(run, nesting.childrenOf(run).length);
    this.#updateProgress(run, isOver);
    const completeness = completenessOf(run, !isOver);
    this.proof.hidden = completeness === null;
    if (completeness) {
      setText(this.proof, completeness.text);
      setAttribute(this.proof, "data-whole", String(completeness.isWhole));
    }
  }

  #updateFacts(run, calls) {
    const started = run.startedAt ?? run.queuedAt;
    const facts = [];
    if (started) facts.push(new Date(started).toLocaleTimeString([], { timeStyle: "medium" }));
    if (run.attempt > 1) facts.push(`attempt ${run.attempt}`);
    const tools = run.items.filter((item) => item.type === "tool_executing").length;
    if (tools > 0) facts.push(count(tools, "tool call"));
    if (calls > 0) facts.push(count(calls, "agent call"));
    setText(this.facts, facts.join(" · "));
  }

  #updateProgress(run, isOver) {
    const {
      percentage = null,
      step = null,
      totalSteps = null,
      remainingMs = null,
    } = run.progress ?? {};
    this.progress.hidden = isOver || percentage === null;
    if (percentage !== null) {
      this.progress.setAttribute("aria-valuenow", String(Math.round(percentage)));
      this.progress.firstElementChild.style.setProperty(
        "--part",
        String(Math.min(1, percentage / 100)),
      );
    }
    const words = [];
    if (step !== null)
      words.push(totalSteps === null ? `Step ${step}` : `Step ${step} of ${totalSteps}`);
    if (remainingMs !== null) words.push(`about ${formatDuration(remainingMs)} left`);
    this.steps.hidden = isOver || words.length === 0;
    setText(this.steps, words.join(" · "));
  }

  /** Move bars and clocks. */
  tick(nowMs) {
    const run = this.#run;
    if (!run) return;
    const isOver = !isActive(run);
    // How long a run took whose end was lost is not known.
    const elapsedMs = run.status === "lost" ? null : elapsedOf(run, nowMs);
    const format = isOver ? formatDuration : formatElapsed;
    setText(this.elapsed, elapsedMs === null ? "" : format(elapsedMs));
    const startMs = Date.parse(
      run.startedAt ?? run.queuedAt ?? run.items.find((item) => item.at)?.at,
    );
    const endMs = isOver ? Date.parse(run.endedAt ?? run.items.at(-1)?.at) : nowMs;
    const isTimed = !Number.isNaN(endMs - startMs) && run.status !== "lost";
    const spanMs = Math.max(1, endMs - startMs);
    const labels = isTimed && run.items.length > 1 ? axisLabels(spanMs, !isOver) : null;
    this.axis.hidden = labels === null;
    labels?.forEach((label, index) => setText(this.axis.children[index], label));
    if (isTimed) this.list.tick({ startMs, endMs, spanMs, nowMs, isOver });
    else this.list.rest();
  }
}
