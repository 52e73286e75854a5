/** A question that an agent asks the user: approval, choice or text. */

import { answeredBy, choicesOf } from "./describe.js";
import { element, icon } from "./dom.js";
import { formatBrief, formatElapsed } from "./format.js";

const OUTCOMES = {
  answered: "Answered",
  denied: "Denied",
  expired: "Expired unanswered",
  cancelled: "Withdrawn",
};

export class InputCard {
  #deadline = null;
  #error = element("p", { class: "input-error", role: "alert", hidden: true });

  /**
   * @param {object} item The run's `input_requested` item.
   * @param {(answer: {value?: unknown, isDenied?: boolean}) => Promise<void>} answer
   * @param {string | null} agent Who asks, where that is not clear from the place.
   */
  constructor(item, answer, agent = null) {
    this.item = item;
    this.answer = answer;
    this.agent = agent;
    this.version = -1;
    this.root = element("section", {
      class: "input-card",
      "data-testid": "input-request",
      "data-request-id": item.requestId,
      "aria-label": `${agent ?? "The agent"} asks`,
    });
  }

  update(item) {
    if (this.item === item && this.version === item.version) return;
    this.item = item;
    this.version = item.version;
    this.root.dataset.outcome = item.resolved?.outcome ?? "open";
    const head = element(
      "p",
      { class: "input-prompt" },
      icon(iconOf(item)),
      this.agent ? element("span", { class: "input-agent" }, this.agent) : null,
      element("span", {}, item.prompt),
    );
    this.root.replaceChildren(head, item.resolved ? this.#outcome() : this.#form());
    this.tick(Date.now());
  }

  /** Show how long the answer may still take. */
  tick(nowMs) {
    if (this.item.resolved || !this.item.expiresAt || !this.#deadline) return;
    const leftMs = Date.parse(this.item.expiresAt) - nowMs;
    const words = leftMs > 0 ? `${formatElapsed(leftMs)} left` : "Time is up";
    if (this.#deadline.textContent !== words) this.#deadline.textContent = words;
  }

  #outcome() {
    const { outcome, value, by } = this.item.resolved;
    const others = answeredBy(by);
    const isApproval = this.item.kind === "approval";
    const words =
      isApproval && outcome === "answered"
        ? value === false
          ? "Denied"
          : "Approved"
        : OUTCOMES[outcome];
    const detail =
      !isApproval && value !== undefined && value !== null ? `: ${formatBrief(value)}` : "";
    return element(
      "p",
      { class: "input-outcome" },
      `${words ?? outcome}${detail}`,
      others ? ` · ${others}` : "",
    );
  }

  #form() {
    this.#deadline = element("span", { class: "deadline" });
    const form = element("form", {
      class: "input-form",
      onsubmit: (event) => event.preventDefault(),
    });
    const buttons = element("div", { class: "input-buttons" });
    const submit = (answer) => this.#send(form, answer);
    if (this.item.kind === "approval") {
      buttons.append(
        button("Approve", "approve", "primary", () => submit({ value: true })),
        button("Deny", "deny", "secondary", () => submit({ isDenied: true })),
      );
    } else if (this.item.kind === "choice" && choicesOf(this.item.schema).length > 0) {
      for (const { value, label } of choicesOf(this.item.schema)) {
        buttons.append(button(label, "choice", "secondary", () => submit({ value })));
      }
      buttons.append(button("None of these", "deny", "plain", () => submit({ isDenied: true })));
    } else {
      const field = element("textarea", {
        rows: 2,
        "aria-label": this.item.prompt,
        "data-testid": "input-text",
      });
      field.addEventListener("keydown", (event) => {
        if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
        event.preventDefault();
        if (field.value.trim() !== "") submit({ value: field.value });
      });
      form.append(field);
      buttons.append(
        button(
          "Answer",
          "answer",
          "primary",
          () => field.value.trim() !== "" && submit({ value: field.value }),
        ),
        button("Decline", "deny", "plain", () => submit({ isDenied: true })),
      );
    }
    buttons.append(this.#deadline);
    form.append(buttons, this.#error);
    return form;
  }

  async #send(form, answer) {
    const controls = [...form.querySelectorAll("button, textarea")];
    for (const control of controls) control.disabled = true;
    this.#error.hidden = true;
    try {
      await this.answer(answer);
    } catch (error) {
      if (error.name !== "RelayError") throw error;
      this.#error.textContent = error.message;
      this.#error.hidden = false;
      for (const control of controls) control.disabled = false;
    }
  }
}

function iconOf({ resolved }) {
  if (!resolved) return "question";
  return resolved.outcome === "answered" && resolved.value !== false ? "check" : "cross";
}

function button(label, testId, kind, onclick) {
  return element(
    "button",
    { type: "button", class: `button ${kind}`, "data-testid": testId, onclick },
    label,
  );
}
