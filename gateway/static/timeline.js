/** One run as a live timeline: what happened, in order, with bars on one time axis. */

import {
  activityOf,
  completenessOf,
  errorTitle,
  STATUS_WORDS,
  stoppedBy,
  toolTitle,
} from "./describe.js";
import { copyButton, element, setAttribute, setText } from "./dom.js";
import {
  count,
  formatBrief,
  formatDuration,
  formatElapsed,
  formatName,
  formatValue,
} from "./format.js";
import { isEnded } from "./relay-client.js";

const STILL_WRITING_MS = 1_500;

export class TimelineView {
  #run = null;
  #version = -1;
  /** item → Row */
  #rows = new Map();

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
      element("span", {}, "0 s"),
      element("span", {}),
      element("span", {}),
    );
    this.list = element("ol", { class: "items" });
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
      this.list,
      this.proof,
    );
    root.replaceChildren(this.toggle, this.body, this.empty);
    this.show(null);
  }

  get isOpen() {
    return this.root.classList.contains("open");
  }

  /** On a phone the timeline is a drawer. */
  setOpen(isOpen) {
    this.root.classList.toggle("open", isOpen);
    this.toggle.setAttribute("aria-expanded", String(isOpen));
  }

  show(run) {
    if (run !== this.#run) {
      this.#rows.clear();
      this.list.replaceChildren();
      this.#version = -1;
    }
    this.#run = run;
    this.root.classList.toggle("is-empty", run === null);
    setAttribute(this.root, "data-run-id", run?.runId ?? null);
    setAttribute(this.root, "data-status", run?.status ?? null);
    if (run === null || run.version === this.#version) return;
    this.#version = run.version;
    this.#updateHead(run);
    this.#updateRows(run);
    this.tick(this.actions.nowMs());
  }

  #updateHead(run) {
    const isOver = isEnded(run) || run.status === "lost";
    setText(this.title, run.agent ?? "agent");
    setText(this.status, STATUS_WORDS[run.status]);
    setText(this.summaryWords, isOver ? count(run.lastSeq, "event") : activityOf(run));
    setAttribute(this.status, "data-status", run.status);
    this.#updateFacts(run);
    this.#updateProgress(run, isOver);
    const completeness = completenessOf(run, !isOver);
    this.proof.hidden = completeness === null;
    if (completeness) {
      setText(this.proof, completeness.text);
      setAttribute(this.proof, "data-whole", String(completeness.isWhole));
    }
  }

  #updateFacts(run) {
    const started = run.startedAt ?? run.queuedAt;
    const facts = [];
    if (started) facts.push(new Date(started).toLocaleTimeString([], { timeStyle: "medium" }));
    if (run.attempt > 1) facts.push(`attempt ${run.attempt}`);
    const tools = run.items.filter((item) => item.type === "tool_executing").length;
    if (tools > 0) facts.push(count(tools, "tool call"));
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

  #updateRows(run) {
    for (const item of run.items) {
      let row = this.#rows.get(item);
      if (!row) {
        row = new Row(item, this.actions);
        this.#rows.set(item, row);
        this.list.append(row.root);
      }
      row.update();
    }
  }

  /** Move bars and clocks. */
  tick(nowMs) {
    const run = this.#run;
    if (!run) return;
    const isOver = isEnded(run) || run.status === "lost";
    const startMs = Date.parse(
      run.startedAt ?? run.queuedAt ?? run.items.find((item) => item.at)?.at,
    );
    const endMs = isOver ? Date.parse(run.endedAt ?? run.items.at(-1)?.at) : nowMs;
    const spanMs = Math.max(1, endMs - startMs);
    const words = isOver ? formatDuration(spanMs) : formatElapsed(spanMs);
    // How long a run took whose end was lost is not known.
    const isTimed = !Number.isNaN(spanMs) && run.status !== "lost";
    setText(this.elapsed, isTimed ? words : "");
    this.axis.hidden = !isTimed || run.items.length < 2;
    if (!isTimed) {
      for (const row of this.#rows.values()) row.root.classList.remove("live");
      return;
    }
    setText(this.axis.children[1], formatElapsed(spanMs / 2));
    setText(this.axis.children[2], formatElapsed(spanMs));
    for (const row of this.#rows.values()) row.tick({ startMs, endMs, spanMs, nowMs, isOver });
  }
}

/** One entry: a line with a marker, for tools, text and questions also a bar. */
class Row {
  #version = -1;
  #parts = null;
  #isSettled = false;

  constructor(item, actions) {
    this.item = item;
    this.actions = actions;
    this.root = element("li", {
      class: "item",
      "data-testid": "timeline-item",
      "data-type": item.type,
    });
  }

  update() {
    const { item } = this;
    if (item.version === this.#version) return;
    this.#version = item.version;
    this.#isSettled = false;
    setAttribute(this.root, "data-seq", item.seq);
    setAttribute(this.root, "data-attempt", item.attempt);
    this.root.classList.toggle("superseded", item.isSuperseded);
    if (!this.#parts) this.#draw();
    this.#refresh();
  }

  #draw() {
    const { item } = this;
    const hasBar = ["tool_executing", "text_delta", "input_requested"].includes(item.type);
    this.#parts = {
      title: element("span", { class: "item-title" }),
      tag: element("span", { class: "item-tag" }),
      time: element("span", { class: "item-time" }),
      text: element("p", { class: "item-text" }),
      bar: hasBar ? element("span", { class: "bar" }) : null,
      end: element("div", { class: "item-end" }),
    };
    const { title, tag, time, text, bar, end } = this.#parts;
    this.root.replaceChildren(
      element("span", { class: "marker", "aria-hidden": "true" }),
      element("div", { class: "item-line" }, title, tag, time),
      text,
      bar ? element("div", { class: "track", "aria-hidden": "true" }, bar) : "",
      end,
    );
  }

  #refresh() {
    const { item } = this;
    const { title, tag, text } = this.#parts;
    const words = describe(item, this.actions.userId());
    setText(title, words.title);
    setText(tag, words.tag ?? "");
    setText(text, words.text ?? "");
    text.hidden = !words.text;
    setAttribute(this.root, "data-outcome", words.outcome ?? null);
    if (item.type === "tool_executing") this.#refreshTool();
    if (item.type === "input_requested") this.#refreshInput();
    if (item.type === "agent_error") this.#refreshError();
    if (item.type === "custom") this.#drawOnce("value", () => fold("Value", item.value));
  }

  #drawOnce(key, draw) {
    if (this.#parts[key]) return;
    this.#parts[key] = draw();
    this.#parts.end.append(...[this.#parts[key]].flat());
  }

  #refreshTool() {
    const { item } = this;
    const hasParameters = isCalledWith(item);
    const label = item.purpose ? element("code", {}, item.toolName) : "Input";
    if (hasParameters) this.#drawOnce("parameters", () => fold(label, item.parameters));
    if (!item.completed) return;
    const { seq = null, status, result, error, note } = item.completed;
    this.#drawOnce("completed", () => {
      const value = status === "error" ? error : result;
      const line = element("div", {
        class: "item-outcome",
        "data-testid": "timeline-item",
        "data-type": "tool_completed",
        "data-seq": seq,
      });
      if (note) line.append(element("p", { class: "item-text" }, note));
      if (value !== undefined && value !== null)
        line.append(fold(status === "error" ? "Error" : "Result", value));
      return line;
    });
  }

  #refreshInput() {
    if (!this.item.resolved) return;
    const { seq = null, outcome, value, by } = this.item.resolved;
    const words =
      outcome === "answered" && value !== undefined && value !== true
        ? `${outcome}: ${formatBrief(value)}`
        : outcome;
    this.#drawOnce("resolved", () =>
      element(
        "div",
        {
          class: "item-outcome",
          "data-testid": "timeline-item",
          "data-type": "input_resolved",
          "data-seq": seq,
        },
        element("p", { class: "item-text" }, formatName(words), by ? ` · ${by}` : ""),
      ),
    );
  }

  #refreshError() {
    const { recoverySuggestions, supportId } = this.item.error;
    this.#drawOnce("suggestions", () => [
      element(
        "ul",
        { class: "suggestions" },
        ...recoverySuggestions.map((words) => element("li", {}, words)),
      ),
      supportId
        ? element("p", { class: "item-text" }, "Support id ", element("code", {}, supportId))
        : "",
    ]);
  }

  tick({ startMs, endMs, spanMs, nowMs, isOver }) {
    if (this.#isSettled) return;
    const { item } = this;
    const { time, bar } = this.#parts;
    const atMs = Date.parse(item.at ?? "");
    if (!bar) {
      setText(
        time,
        Number.isNaN(atMs) || atMs - startMs < 50 ? "" : `+${formatElapsed(atMs - startMs)}`,
      );
      this.#isSettled = true;
      return;
    }
    const { untilMs, isOpen } = extent(item, { nowMs, endMs, isOver });
    const fromMs = Number.isNaN(atMs) ? startMs : atMs;
    const durationMs = item.completed?.durationMs ?? untilMs - fromMs;
    setText(time, isOpen ? formatElapsed(durationMs) : formatDuration(durationMs));
    const from = Math.min(1, Math.max(0, (fromMs - startMs) / spanMs));
    const part = Math.min(1 - from, Math.max(0, (untilMs - fromMs) / spanMs));
    bar.style.setProperty("--from", from.toFixed(4));
    bar.style.setProperty("--part", part.toFixed(4));
    const percentage = isOpen ? item.progress?.percentage : null;
    bar.style.setProperty("--done", percentage == null ? "1" : String(percentage / 100));
    this.root.classList.toggle("live", isOpen);
    this.#isSettled = isOver;
  }
}

/** Until when a bar reaches, and whether it still grows. */
function extent(item, { nowMs, endMs, isOver }) {
  if (item.type === "text_delta") {
    const lastMs = Date.parse(item.lastAt ?? item.at ?? "");
    return {
      untilMs: lastMs,
      isOpen: !isOver && !item.isSuperseded && nowMs - lastMs < STILL_WRITING_MS,
    };
  }
  const closed = item.completed ?? item.resolved;
  if (closed) return { untilMs: Date.parse(closed.at), isOpen: false };
  return { untilMs: isOver ? endMs : nowMs, isOpen: !isOver };
}

function isCalledWith({ parameters }) {
  return parameters !== null && Object.keys(parameters).length > 0;
}

function fold(label, value) {
  const brief = formatBrief(value, 90);
  const head = element(
    "summary",
    {},
    element("span", { class: "fold-label" }, label),
    element("span", { class: "fold-brief" }, brief),
  );
  const details = element("details", { class: "fold" }, head);
  // Large values are formatted only when somebody looks.
  details.addEventListener("toggle", () => {
    if (!details.open || details.children.length > 1) return;
    const whole = () => formatValue(value, Infinity);
    details.append(
      element(
        "div",
        { class: "fold-body" },
        copyButton(whole),
        element("pre", { tabindex: "0" }, formatValue(value)),
      ),
    );
  });
  return details;
}

/** @returns {{title: string, tag?: string, text?: string, outcome?: string}} */
function describe(item, userId) {
  switch (item.type) {
    case "agent_queued":
      return { title: "Asked" };
    case "agent_started":
      return {
        title: item.attempt > 1 ? `Started, attempt ${item.attempt}` : "Started",
        tag: item.model ?? "",
        text: item.note,
      };
    case "agent_thinking": {
      const { step, totalSteps } = item.progress;
      return {
        title: item.thought,
        tag: step === null ? "" : totalSteps === null ? `${step}` : `${step}/${totalSteps}`,
      };
    }
    case "tool_executing":
      return {
        title: toolTitle(item),
        tag: item.purpose && !isCalledWith(item) ? item.toolName : "",
        text: item.completed ? null : (item.progress?.note ?? null),
        outcome: item.completed?.status ?? "open",
      };
    case "text_delta":
      return { title: "Writing", tag: count(item.characters ?? 0, "character"), outcome: "text" };
    case "input_requested":
      return { title: "Asked you", text: item.prompt, outcome: item.resolved?.outcome ?? "open" };
    case "agent_stalled":
      return { title: `No sign of life for ${formatDuration(item.idleMs ?? 0)}`, text: item.note };
    case "agent_retrying":
      return {
        title: `Trying again, attempt ${item.nextAttempt}`,
        text: [item.reason, item.delayMs ? `in ${formatDuration(item.delayMs)}` : null]
          .filter(Boolean)
          .join(" · "),
      };
    case "cancel_requested":
      return {
        title: "Stop requested",
        tag: item.by && item.by !== userId && item.by !== "user" ? item.by : "",
        text: item.reason,
      };
    case "custom":
      return { title: formatName(item.name ?? "custom"), text: item.note };
    case "agent_completed":
      return { title: "Completed", text: item.note ?? usageWords(item.usage) };
    case "agent_error":
      return { title: errorTitle(item.error.code), text: item.error.message };
    case "agent_cancelled":
      return { title: stoppedBy(item.by, userId), text: item.reason };
    default:
      return { title: formatName(item.type) };
  }
}

function usageWords(usage) {
  if (!usage || typeof usage !== "object") return null;
  return Object.entries(usage)
    .filter(([, value]) => typeof value === "number")
    .map(([name, value]) => `${formatName(name).toLowerCase()} ${value.toLocaleString()}`)
    .join(" · ");
}
