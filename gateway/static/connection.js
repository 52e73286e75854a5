/** The connection indicator, the banner under it and the panel that asks for a token. */

import { element, setAttribute } from "./dom.js";
import { formatDuration } from "./format.js";

const WORDS = {
  connecting: "Connecting",
  live: "Live",
  degraded: "Degraded",
  reconnecting: "Reconnecting",
  stopped: "Stopped",
  closed: "Closed",
};

/** A first retry takes under half a second; a banner for that would only startle. */
const BANNER_AFTER_MS = 2_500;

export class ConnectionView {
  #detail = { state: "connecting", node: null, reason: null, retryAt: null };
  #since = Date.now();
  #brokenSince = null;

  /** @param {object} actions retryNow, askForToken, facts() */
  constructor({ root, text, details, banner }, actions) {
    Object.assign(this, { root, text, details, banner, actions });
    root.addEventListener("toggle", () => root.open && this.#drawDetails());
    document.addEventListener("pointerdown", (event) => {
      if (root.open && !root.contains(event.target)) root.open = false;
    });
  }

  update(detail) {
    const isBroken = detail.state === "reconnecting" || detail.state === "connecting";
    if (detail.state !== this.#detail.state) this.#since = Date.now();
    if (!isBroken) this.#brokenSince = null;
    else this.#brokenSince ??= Date.now();
    this.#detail = detail;
    setAttribute(this.root, "data-state", detail.state);
    setAttribute(this.root, "data-node", detail.node ?? "");
    this.tick();
    if (this.root.open) this.#drawDetails();
  }

  tick() {
    const { state, node, retryAt } = this.#detail;
    let words = WORDS[state];
    let place = "";
    if (state === "reconnecting" && retryAt !== null) {
      const seconds = Math.ceil((retryAt - Date.now()) / 1000);
      if (seconds > 0) words = `Reconnecting in ${seconds} s`;
    } else if ((state === "live" || state === "degraded") && node) {
      words = `${words} on `;
      place = node;
    }
    if (this.text.textContent !== words + place) {
      this.text.replaceChildren(element("span", { class: "connection-word" }, words), place);
    }
    this.#updateBanner();
  }

  #updateBanner() {
    const { state, reason } = this.#detail;
    const isLong = this.#brokenSince !== null && Date.now() - this.#brokenSince > BANNER_AFTER_MS;
    const kind = state === "stopped" || state === "degraded" ? state : isLong ? "reconnecting" : "";
    const key = `${kind} ${reason ?? ""}`;
    if (this.banner.dataset.key === key) return;
    this.banner.dataset.key = key;
    this.banner.dataset.kind = kind;
    this.banner.hidden = kind === "";
    this.banner.replaceChildren();
    if (kind === "stopped") {
      this.banner.append(
        element("p", {}, element("strong", {}, "Not connected. "), reason ?? ""),
        element(
          "button",
          { type: "button", class: "button primary", onclick: this.actions.askForToken },
          "Use a new link",
        ),
      );
    } else if (kind === "degraded") {
      this.banner.append(
        element("p", {}, element("strong", {}, "Answers may pause. "), reason ?? ""),
      );
    } else if (kind === "reconnecting") {
      this.banner.append(
        element(
          "p",
          {},
          element("strong", {}, "Trying to reconnect. "),
          reason ?? "",
          " Nothing is lost; what you send waits.",
        ),
        element(
          "button",
          { type: "button", class: "button secondary", onclick: this.actions.retryNow },
          "Try now",
        ),
      );
    }
  }

  #drawDetails() {
    const facts = {
      ...this.actions.facts(),
      [`${WORDS[this.#detail.state]} for`]: formatDuration(Date.now() - this.#since),
    };
    const rows = Object.entries(facts).filter(
      ([, value]) => value !== null && value !== undefined && value !== "",
    );
    this.details.replaceChildren(
      element(
        "dl",
        {},
        ...rows.flatMap(([name, value]) => [
          element("dt", {}, name),
          element("dd", {}, String(value)),
        ]),
      ),
      this.#detail.reason ? element("p", { class: "popover-reason" }, this.#detail.reason) : "",
    );
  }
}

/** Fill the panel that a page without a usable token shows. */
export function drawGate(dialog, { reason, address, readToken, onToken }) {
  const field = element("textarea", {
    id: "token-field",
    "data-testid": "token-field",
    rows: 3,
    spellcheck: "false",
    autocapitalize: "off",
    placeholder: "eyJhbGciOi…",
  });
  const problem = element("p", { class: "gate-problem", role: "alert", hidden: true });
  const form = element(
    "form",
    {
      onsubmit: (event) => {
        event.preventDefault();
        const token = readToken(field.value);
        problem.hidden = token !== null;
        problem.textContent = "That is neither a token nor a link that carries one.";
        if (token) onToken(token);
      },
    },
    element("label", { for: "token-field" }, "Or paste a link or a token"),
    field,
    problem,
    element(
      "button",
      { type: "submit", class: "button primary", "data-testid": "token-submit" },
      "Connect",
    ),
  );
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    event.preventDefault();
    form.requestSubmit();
  });
  dialog.replaceChildren(
    element("img", { src: "static/favicon.svg", alt: "", width: 44, height: 44 }),
    element(
      "h2",
      { id: "gate-title" },
      reason ? "A new link is needed" : "Open the page by its link",
    ),
    reason ? element("p", { class: "gate-reason" }, reason) : "",
    element(
      "p",
      {},
      "This page knows you by a token that the link carries. Make one on the machine where the relay runs, and open the link that it prints:",
    ),
    element(
      "pre",
      {},
      element(
        "code",
        {},
        element("span", { class: "prompt" }, "$ "),
        `relay token --user alice --url ${address}`,
      ),
    ),
    form,
  );
}
