/** The entries of a timeline: one row for each thing that happened, and for each run below. */

import {
  answeredBy,
  elapsedOf,
  errorTitle,
  othersName,
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
  formatMoment,
  formatName,
  formatValue,
  isEmptyValue,
} from "./format.js";
import { interleave, isActive, isOutdated } from "./nesting.js";
import { textOf } from "./relay-client.js";

const STILL_WRITING_MS = 1_500;
/** Shorter titles take two lines at most, in the narrowest panel too. */
const LONG_TITLE_CHARACTERS = 48;

/** A run's entries in order, those of the runs that it asked for folded up between them. */
export class RowList {
  /** item or run → Row or NestedRun */
  #rows = new Map();

  constructor(actions) {
    this.actions = actions;
    this.root = element("ol", { class: "items" });
  }

  clear() {
    this.#rows.clear();
    this.root.replaceChildren();
  }

  update(run, nesting) {
    const children = nesting.childrenOf(run);
    for (const [key, row] of this.#rows) {
      // An outline of a run has given way to its events.
      if (!(row instanceof NestedRun) || children.includes(key)) continue;
      row.root.remove();
      this.#rows.delete(key);
    }
    let next = this.root.firstElementChild;
    for (const entry of interleave(run.items, children, (child) => child.queuedAt)) {
      let row = this.#rows.get(entry);
      if (!row) {
        row = entry.runId ? new NestedRun(entry, this.actions) : new Row(entry, this.actions);
        this.#rows.set(entry, row);
      }
      if (row.root === next) next = next.nextElementSibling;
      else this.root.insertBefore(row.root, next);
      row.update(run, nesting);
    }
  }

  /** @param {object} scale startMs, endMs, spanMs, nowMs and isOver of the whole axis. */
  tick(scale) {
    for (const row of this.#rows.values()) row.tick(scale);
  }

  /** Without a clock nothing goes on. */
  rest() {
    for (const { root } of this.#rows.values()) root.classList.remove("live");
  }
}

/** A run that the one above asked for: a line with a bar, and when opened its own entries. */
class NestedRun {
  #nesting = null;
  #version = -1;
  #scale = null;
  #list = null;
  #isSettled = false;

  constructor(run, actions) {
    this.run = run;
    this.actions = actions;
    this.status = element("span", { class: "item-tag" });
    this.time = element("span", { class: "item-time" });
    this.words = element("p", { class: "item-text" });
    this.bar = element("span", { class: "bar" });
    this.details = element(
      "details",
      { class: "nested" },
      element(
        "summary",
        {},
        element(
          "div",
          { class: "item-line" },
          element("span", { class: "item-title" }, run.agent ?? "agent"),
          this.status,
          this.time,
        ),
        this.words,
        element("div", { class: "track", "aria-hidden": "true" }, this.bar),
      ),
    );
    this.details.addEventListener("toggle", () => this.#updateBody());
    this.root = element(
      "li",
      { class: "item", "data-testid": "nested-run", "data-type": "run", "data-run-id": run.runId },
      element("span", { class: "marker", "aria-hidden": "true" }),
      this.details,
    );
  }

  update(parent, nesting) {
    const { run } = this;
    this.#nesting = nesting;
    const status = nesting.statusOf(run);
    setAttribute(this.root, "data-status", status);
    this.root.classList.toggle("superseded", isOutdated(run, parent));
    setText(this.status, STATUS_WORDS[status]);
    setText(this.words, this.#summary());
    if (run.version !== this.#version) this.#isSettled = false;
    this.#version = run.version;
    this.#updateBody();
  }

  #summary() {
    const { run } = this;
    if (isActive(run)) return this.#nesting.activityOf(run);
    return run.error ? run.error.message : formatBrief(run.request?.content ?? "", 120);
  }

  #updateBody() {
    if (!this.details.open) return;
    const { run } = this;
    if (!this.#list) {
      this.#list = new RowList(this.actions);
      this.details.append(
        ...(run.request ? [fold("Request", run.request.content)] : []),
        this.#list.root,
      );
    }
    this.#list.update(run, this.#nesting);
    if (run.status === "completed" && !this.answer) {
      this.answer = fold("Answer", run.result ?? textOf(run));
      this.details.append(this.answer);
    }
    if (this.#scale) this.#tickBody();
  }

  tick(scale) {
    this.#scale = scale;
    if (this.#list) this.#tickBody();
    if (this.#isSettled) return;
    const { run } = this;
    const isOpen = isActive(run);
    const elapsedMs = run.status === "lost" ? null : elapsedOf(run, scale.nowMs);
    const format = isOpen ? formatElapsed : formatDuration;
    setText(this.time, elapsedMs === null ? "" : format(elapsedMs));
    this.root.classList.toggle("live", isOpen && !scale.isOver);
    const fromMs = Date.parse(run.startedAt ?? run.queuedAt ?? "");
    if (!Number.isNaN(fromMs)) {
      const untilMs = Date.parse(run.endedAt ?? "");
      placeBar(this.bar, scale, fromMs, Number.isNaN(untilMs) ? scale.endMs : untilMs);
    }
    this.#isSettled = scale.isOver && !isOpen;
  }

  #tickBody() {
    this.#list.tick({ ...this.#scale, isOver: !isActive(this.run) });
  }
}

/** Draw a bar from one time to another, as parts of the axis. */
function placeBar(bar, { startMs, spanMs }, fromMs, untilMs) {
  const from = Math.min(1, Math.max(0, (fromMs - startMs) / spanMs));
  const part = Math.min(1 - from, Math.max(0, (untilMs - fromMs) / spanMs));
  bar.style.setProperty("--from", from.toFixed(4));
  bar.style.setProperty("--part", part.toFixed(4));
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
    if (item.purpose?.length > LONG_TITLE_CHARACTERS && !this.#parts.more) {
      this.#parts.more = clamp(this.#parts.title);
      this.#parts.title.parentElement.after(this.#parts.more);
    }
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
      if (!isEmptyValue(value)) line.append(fold(status === "error" ? "Error" : "Result", value));
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
    const others = answeredBy(by, this.actions.userId());
    this.#drawOnce("resolved", () =>
      element(
        "div",
        {
          class: "item-outcome",
          "data-testid": "timeline-item",
          "data-type": "input_resolved",
          "data-seq": seq,
        },
        element("p", { class: "item-text" }, formatName(words), others ? ` · ${others}` : ""),
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

  tick(scale) {
    if (this.#isSettled) return;
    const { startMs, endMs, nowMs, isOver } = scale;
    const { item } = this;
    const { time, bar } = this.#parts;
    const atMs = Date.parse(item.at ?? "");
    if (!bar) {
      setText(time, Number.isNaN(atMs) ? "" : formatMoment(atMs - startMs));
      this.#isSettled = true;
      return;
    }
    const { untilMs, isOpen } = extent(item, { nowMs, endMs, isOver });
    const fromMs = Number.isNaN(atMs) ? startMs : atMs;
    const durationMs = item.completed?.durationMs ?? untilMs - fromMs;
    setText(time, isOpen ? formatElapsed(durationMs) : formatDuration(durationMs));
    placeBar(bar, scale, fromMs, untilMs);
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

/** Keep a title to two lines; gives the button that shows all of it, for where that is not enough. */
function clamp(title) {
  const more = element(
    "button",
    { type: "button", class: "quiet more", "aria-expanded": "false", hidden: true },
    "Show all",
  );
  title.classList.add("clamped");
  more.addEventListener("click", () => {
    const isClamped = title.classList.toggle("clamped");
    more.textContent = isClamped ? "Show all" : "Show less";
    more.setAttribute("aria-expanded", String(!isClamped));
  });
  new ResizeObserver(() => {
    if (title.classList.contains("clamped")) more.hidden = title.scrollHeight <= title.clientHeight;
  }).observe(title);
  return more;
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
        tag: othersName(item.by, userId),
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
