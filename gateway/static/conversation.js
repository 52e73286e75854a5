/** The conversation: what the user asked and what the agents answered. */

import { elapsedOf, errorTitle, stoppedBy, STATUS_WORDS } from "./describe.js";
import { copyButton, element, icon, setAttribute, setText } from "./dom.js";
import { formatDuration, formatElapsed, formatValue } from "./format.js";
import { InputCard } from "./input-card.js";
import { MarkdownView } from "./markdown-dom.js";
import { ChangeWatch, interleave, isActive } from "./nesting.js";
import { isEnded, textOf } from "./relay-client.js";

const LONG_MESSAGE_CHARACTERS = 1_200;
const MAX_RESULT_CHARACTERS = 200_000;

/** The articles of one thread, in order; redraws only runs that changed. */
export class ConversationView {
  /** run id → RunView */
  #views = new Map();
  /** message id → element of a message that no event confirms yet */
  #outgoing = new Map();

  /** @param {object} actions answer, retry, select, resend, discard and userId(), nowMs() */
  constructor(root, actions) {
    this.root = root;
    this.actions = actions;
  }

  get isEmpty() {
    return this.#views.size === 0 && this.#outgoing.size === 0;
  }

  clear() {
    this.#views.clear();
    this.#outgoing.clear();
    this.root.replaceChildren();
  }

  /**
   * @param {import("./nesting.js").Nesting} nesting The thread's runs.
   * @param {object[]} outgoing Its messages that are not confirmed: {id, content, state, error}.
   */
  update(nesting, outgoing, selectedRunId) {
    const runs = nesting.roots;
    const wanted = new Set(runs.map((run) => run.runId));
    for (const [runId, view] of this.#views) {
      if (wanted.has(runId)) continue;
      view.remove();
      this.#views.delete(runId);
    }
    let after = null;
    for (const run of runs) {
      let view = this.#views.get(run.runId);
      if (!view) {
        view = new RunView(this.actions);
        this.#views.set(run.runId, view);
      }
      view.placeAfter(this.root, after);
      view.update(run, nesting, run.runId === selectedRunId && runs.length > 1);
      after = view.agentMessage;
    }
    this.#updateOutgoing(outgoing);
  }

  #updateOutgoing(outgoing) {
    const wanted = new Set(outgoing.map((message) => message.id));
    for (const [id, node] of this.#outgoing) {
      if (wanted.has(id)) continue;
      node.remove();
      this.#outgoing.delete(id);
    }
    for (const message of outgoing) {
      const node = drawOutgoing(message, this.actions);
      const before = this.#outgoing.get(message.id);
      if (before?.dataset.state === message.state) continue;
      if (before) before.replaceWith(node);
      else this.root.append(node);
      this.#outgoing.set(message.id, node);
    }
  }

  /** Move what grows with time. */
  tick(nowMs) {
    for (const view of this.#views.values()) view.tick(nowMs);
  }
}

function userBubble(content) {
  const words = element("div", { class: "bubble-text" }, content);
  const bubble = element("div", { class: "bubble" }, words);
  if (content.length > LONG_MESSAGE_CHARACTERS || content.split("\n").length > 14) {
    bubble.classList.add("folded");
    const more = element(
      "button",
      { type: "button", class: "quiet more", "aria-expanded": "false" },
      "Show all",
    );
    more.addEventListener("click", () => {
      const isFolded = bubble.classList.toggle("folded");
      more.textContent = isFolded ? "Show all" : "Show less";
      more.setAttribute("aria-expanded", String(!isFolded));
    });
    bubble.append(more);
  }
  return bubble;
}

function userMessage(content, properties) {
  return element(
    "article",
    { class: "message user", "data-testid": "message-user", "aria-label": "You", ...properties },
    userBubble(content),
  );
}

function drawOutgoing({ id, content, state, error }, actions) {
  const node = userMessage(content, { "data-state": state, "data-message-id": id });
  if (state === "failed") {
    node.append(
      element(
        "p",
        { class: "delivery failed", role: "alert" },
        element(
          "span",
          {},
          `Not sent: ${error.message} ${error.recoverySuggestions.join(" ")}`.trim(),
        ),
        element(
          "button",
          { type: "button", class: "link", onclick: () => actions.resend(id) },
          "Send again",
        ),
        element(
          "button",
          { type: "button", class: "link", onclick: () => actions.discard(id) },
          "Edit",
        ),
      ),
    );
  } else {
    const words = state === "waiting" ? "Goes out as soon as the connection is back" : "Sending…";
    node.append(element("p", { class: "delivery" }, words));
  }
  return node;
}

function isQuestion(item) {
  return item.type === "input_requested" && !item.isSuperseded;
}

/** Make `nodes` the children of `parent`, moving only what is out of place. */
function arrange(parent, nodes) {
  const wanted = new Set(nodes);
  for (const child of [...parent.children]) if (!wanted.has(child)) child.remove();
  nodes.forEach((node, index) => {
    if (parent.children[index] !== node) parent.insertBefore(node, parent.children[index] ?? null);
  });
}

/** One run: the user's message and the agent's, with what those below it ask. */
class RunView {
  #run = null;
  #watch = new ChangeWatch();
  #isSelected = null;
  #question = null;
  /** item → MarkdownView, item → InputCard */
  #texts = new Map();
  #cards = new Map();
  #result = null;
  #ending = null;

  constructor(actions) {
    this.actions = actions;
    this.name = element("span", { class: "agent-name" });
    this.status = element("span", { class: "status-word" });
    this.elapsed = element("span", { class: "elapsed" });
    this.byline = element(
      "button",
      { type: "button", class: "byline", onclick: () => actions.select(this.#run.runId) },
      this.name,
      this.status,
      this.elapsed,
    );
    this.attempts = element("p", { class: "attempts", hidden: true });
    this.answer = element("div", { class: "answer prose", "aria-live": "polite" });
    this.activityWords = element("span", {});
    this.activity = element(
      "p",
      { class: "activity" },
      element("span", { class: "pulse", "aria-hidden": "true" }),
      this.activityWords,
    );
    this.end = element("div", { class: "ending" });
    this.agentMessage = element(
      "article",
      { class: "message agent", "data-testid": "message-agent" },
      this.byline,
      this.attempts,
      this.answer,
      this.activity,
      this.end,
    );
  }

  placeAfter(root, after) {
    const expected = after ? after.nextElementSibling : root.firstElementChild;
    const first = this.#question ?? this.agentMessage;
    if (first === expected) return;
    const nodes = this.#question ? [this.#question, this.agentMessage] : [this.agentMessage];
    if (after) after.after(...nodes);
    else root.prepend(...nodes);
  }

  remove() {
    this.#question?.remove();
    this.agentMessage.remove();
  }

  update(run, nesting, isSelected) {
    if (isSelected !== this.#isSelected) {
      this.#isSelected = isSelected;
      this.agentMessage.classList.toggle("selected", isSelected);
    }
    if (!this.#watch.hasChanged([run, ...nesting.below(run)])) return;
    if (run !== this.#run) this.#forget();
    this.#run = run;
    this.#updateQuestion(run);
    this.#updateHead(run, nesting);
    this.#updateAnswer(run, nesting.currentBelow(run));
    this.#updateEnding(run);
    this.tick(this.actions.nowMs());
  }

  #forget() {
    this.answer.replaceChildren();
    this.#texts.clear();
    this.#cards.clear();
    this.#result = null;
    this.#ending = null;
  }

  #updateQuestion(run) {
    if (this.#question || !run.request) return;
    this.#question = userMessage(run.request.content, {
      "data-run-id": run.runId,
      "data-message-id": run.request.messageId,
    });
    this.agentMessage.before(this.#question);
  }

  #updateHead(run, nesting) {
    const isOver = !isActive(run);
    const status = nesting.statusOf(run);
    setAttribute(this.agentMessage, "data-run-id", run.runId);
    setAttribute(this.agentMessage, "data-status", run.status);
    setAttribute(this.agentMessage, "aria-label", `${run.agent}, ${STATUS_WORDS[status]}`);
    setAttribute(this.answer, "aria-busy", isOver ? "false" : "true");
    setText(this.name, run.agent ?? "agent");
    setText(this.status, STATUS_WORDS[status]);
    setAttribute(this.status, "data-status", status);
    setAttribute(this.byline, "title", "Show this run’s timeline");
    this.activity.hidden = isOver || status === "waiting";
    if (!isOver) setText(this.activityWords, nesting.activityOf(run));
    const retry = run.items.findLast((item) => item.type === "agent_retrying");
    this.attempts.hidden = !retry;
    if (retry)
      setText(
        this.attempts,
        `Attempt ${retry.nextAttempt} · ${retry.reason ?? "The one before failed"}`,
      );
  }

  /** What the agent wrote and asked, in the order in which it did. */
  #updateAnswer(run, below) {
    const questions = [run, ...below].flatMap((asking) =>
      asking.items.filter(isQuestion).map((item) => ({ asking, item })),
    );
    const byOthers = questions
      .filter(({ asking }) => asking !== run)
      .sort((a, b) => (a.item.at ?? "~").localeCompare(b.item.at ?? "~"));
    const asked = questions.length > 0;
    const isStreamed =
      run.status !== "completed" ||
      (run.result === textOf(run) && (asked || run.messages.length === 1));
    const nodes = [];
    for (const item of interleave(run.items, byOthers, (question) => question.item.at)) {
      if (item.asking) nodes.push(this.#card(item.asking, item.item));
      if (item.isSuperseded) continue;
      if (item.type === "input_requested") nodes.push(this.#card(run, item));
      if (item.type === "text_delta" && isStreamed) nodes.push(this.#piece(run, item));
    }
    // The result is the truth, also where the agent streamed something else or in several parts.
    if (!isStreamed) nodes.push(this.#drawResult(run));
    arrange(this.answer, nodes);
  }

  #piece(run, item) {
    let view = this.#texts.get(item);
    if (!view) {
      view = new MarkdownView(element("div", { class: "piece" }));
      this.#texts.set(item, view);
    }
    const message = run.messages.find((known) => known.item === item);
    view.update(message.text.toString());
    return view.root;
  }

  #card(run, item) {
    let card = this.#cards.get(item);
    if (!card) {
      card = new InputCard(
        item,
        (answer) => this.actions.answer(run.runId, item.requestId, answer),
        run === this.#run ? null : run.agent,
      );
      this.#cards.set(item, card);
    }
    card.update(item);
    return card.root;
  }

  #drawResult(run) {
    if (this.#result) return this.#result.root;
    this.#result = new MarkdownView(element("div", { class: "piece" }));
    if (typeof run.result === "string") this.#result.update(run.result);
    else if (run.result === null || run.result === undefined)
      this.#result.update(run.summary ?? textOf(run));
    else
      this.#result.update(`\`\`\`json\n${formatValue(run.result, MAX_RESULT_CHARACTERS)}\n\`\`\``);
    return this.#result.root;
  }

  #updateEnding(run) {
    if (this.#ending === run.status) return;
    this.#ending = run.status;
    this.end.replaceChildren(...drawEnding(run, this.actions));
  }

  tick(nowMs) {
    const run = this.#run;
    if (!run) return;
    const elapsedMs = run.status === "lost" ? null : elapsedOf(run, nowMs);
    const format = isEnded(run) ? formatDuration : formatElapsed;
    setText(this.elapsed, elapsedMs === null ? "" : format(elapsedMs));
    for (const card of this.#cards.values()) card.tick(nowMs);
  }
}

function drawEnding(run, actions) {
  switch (run.status) {
    case "completed":
      return [
        element(
          "div",
          { class: "after" },
          copyButton(() => answerText(run), "Copy answer"),
        ),
      ];
    case "error":
      return [drawError(run, actions)];
    case "cancelled":
      return [
        element(
          "div",
          { class: "after stopped" },
          icon("stop"),
          element(
            "span",
            {},
            stoppedBy(run.cancelled.by, actions.userId()) +
              (run.cancelled.reason ? `: ${run.cancelled.reason}` : ""),
          ),
          askAgain(run, actions),
        ),
      ];
    case "lost":
      return [
        element(
          "div",
          { class: "after stopped" },
          icon("warning"),
          element("span", {}, "The relay lost this run’s history; how it ended is not known."),
          askAgain(run, actions),
        ),
      ];
    default:
      return [];
  }
}

function answerText(run) {
  return typeof run.result === "string"
    ? run.result
    : formatValue(run.result ?? textOf(run), Infinity);
}

function askAgain(run, actions) {
  if (!run.request) return null;
  return element(
    "button",
    { type: "button", class: "quiet", onclick: () => actions.retry(run) },
    icon("retry"),
    "Ask again",
  );
}

function drawError(run, actions) {
  const { code, message, recoverySuggestions, supportId, retryAfterMs } = run.error;
  const meta = element("p", { class: "error-meta" }, element("code", {}, code));
  if (retryAfterMs)
    meta.append(element("span", {}, `worth another try in ${formatDuration(retryAfterMs)}`));
  if (supportId) meta.append(element("span", {}, "support id ", element("code", {}, supportId)));
  return element(
    "section",
    { class: "error-card", "aria-label": "Error", "data-testid": "run-error", "data-code": code },
    element("h3", {}, icon("warning"), element("span", {}, errorTitle(code))),
    element("p", {}, message),
    recoverySuggestions.length > 0
      ? element("ul", {}, ...recoverySuggestions.map((suggestion) => element("li", {}, suggestion)))
      : null,
    element("div", { class: "error-foot" }, meta, askAgain(run, actions)),
  );
}
