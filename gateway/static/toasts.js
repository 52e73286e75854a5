/** Short messages in the corner. */

import { element, icon } from "./dom.js";

const TOAST_MS = 8_000;

/**
 * Tell the user something. It goes away by itself, except where it asks for an action.
 *
 * @param {{label: string, act: () => void} | null} action
 */
export function toast(title, body, severity = "info", action = null) {
  const close = () => node.remove();
  const words = element(
    "div",
    {},
    element("strong", {}, title),
    body ? element("p", {}, body) : null,
  );
  const act = () => {
    close();
    action.act();
  };
  const node = element(
    "div",
    { class: "toast", "data-severity": severity },
    words,
    action
      ? element("button", { type: "button", class: "button secondary", onclick: act }, action.label)
      : null,
    element(
      "button",
      { type: "button", class: "quiet", "aria-label": "Dismiss", onclick: close },
      icon("cross"),
    ),
  );
  document.getElementById("toasts").append(node);
  if (!action) setTimeout(close, TOAST_MS);
}
