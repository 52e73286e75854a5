/** Where the user writes: the field, the choice of agent, Send and Stop. */

import { element, icon, setText } from "./dom.js";
import { codePointLength } from "./relay-client.js";

const AGENT = "relay.agent";
const KEYS_HINT = "Enter sends · Shift+Enter starts a line";
const COUNT_FROM = 0.8;

export class Composer {
  #limit = null;
  #isBusy = false;

  /** @param {object} actions send(content, agent), stop, changed(text) */
  constructor({ form, field, picker, hint, stop, send }, actions) {
    Object.assign(this, { form, field, picker, hint, stop, send, actions });
    send.append(icon("send"));
    this.stopWords = element("span", {}, "Stop");
    stop.append(icon("stop"), this.stopWords);
    stop.addEventListener("click", () => actions.stop());
    picker.addEventListener("change", () => localStorage.setItem(AGENT, picker.value));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    field.addEventListener("input", () => {
      this.#changed();
      actions.changed(field.value);
    });
    field.addEventListener("keydown", (event) => {
      // While an input method composes, Enter chooses a character.
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.#submit();
    });
    this.#acceptFiles();
    this.#changed();
  }

  get text() {
    return this.field.value;
  }

  set text(text) {
    this.field.value = text;
    this.#changed();
  }

  get agent() {
    return this.picker.value || undefined;
  }

  focus() {
    this.field.focus({ preventScroll: true });
  }

  setAgents(agents) {
    const chosen = this.picker.value || localStorage.getItem(AGENT);
    this.picker.disabled = agents.length === 0;
    const options = agents.map(({ name, description }) =>
      element("option", { value: name, title: description }, name),
    );
    this.picker.replaceChildren(
      ...(options.length > 0 ? options : [element("option", { value: "" }, "no agent yet")]),
    );
    if (agents.some(({ name }) => name === chosen)) this.picker.value = chosen;
  }

  choose(agent) {
    this.picker.value = agent;
    localStorage.setItem(AGENT, agent);
    this.focus();
  }

  setLimit(limit) {
    this.#limit = limit;
    this.#changed();
  }

  /** Show what Stop would do: `idle` (hidden), `active` or `stopping`. */
  setStop(state) {
    this.#isBusy = state !== "idle";
    this.stop.hidden = state === "idle";
    this.stop.disabled = state === "stopping";
    setText(this.stopWords, state === "stopping" ? "Stopping…" : "Stop");
    this.#showHint();
  }

  #submit() {
    const content = this.field.value.trim();
    if (content === "" || this.#excess() > 0) return;
    this.text = "";
    this.actions.changed("");
    this.actions.send(content, this.agent);
  }

  #excess() {
    return this.#limit === null ? 0 : codePointLength(this.field.value.trim()) - this.#limit;
  }

  #changed() {
    this.send.disabled = this.field.value.trim() === "" || this.#excess() > 0;
    if (!CSS.supports("field-sizing", "content")) {
      this.field.style.height = "auto";
      this.field.style.height = `${this.field.scrollHeight}px`;
    }
    this.#showHint();
  }

  #showHint() {
    const excess = this.#excess();
    const isNear = this.#limit !== null && excess > -(1 - COUNT_FROM) * this.#limit;
    let words = this.#isBusy ? `${KEYS_HINT} · Esc stops` : KEYS_HINT;
    if (excess > 0) words = `${excess.toLocaleString()} characters too many`;
    else if (isNear) words = `${(-excess).toLocaleString()} characters left`;
    setText(this.hint, words);
    this.hint.classList.toggle("excess", excess > 0);
  }

  /** A text file dropped on the field is as good as its content pasted. */
  #acceptFiles() {
    this.form.addEventListener("dragover", (event) => {
      if (!event.dataTransfer.types.includes("Files")) return;
      event.preventDefault();
      this.form.classList.add("dropping");
    });
    this.form.addEventListener("dragleave", () => this.form.classList.remove("dropping"));
    this.form.addEventListener("drop", async (event) => {
      const [file] = event.dataTransfer.files;
      this.form.classList.remove("dropping");
      if (!file) return;
      event.preventDefault();
      const before = this.field.value;
      this.text = before + (before && !before.endsWith("\n") ? "\n" : "") + (await file.text());
      this.actions.changed(this.text);
      this.focus();
    });
  }
}
