/** What a new conversation shows: which agents there are. */

import { element } from "./dom.js";

export function drawEmpty(root, agents, choose) {
  const cards = agents.map(({ name, description }) =>
    element(
      "button",
      { type: "button", class: "agent-card", onclick: () => choose(name) },
      element("span", { class: "agent-card-name" }, name),
      element("span", { class: "agent-card-words" }, description ?? ""),
    ),
  );
  const none = element(
    "p",
    { class: "empty-words" },
    "No worker has announced an agent yet. Start one, then reload: ",
    element("code", {}, "relay worker MODULE:ATTR"),
  );
  root.replaceChildren(
    element("h2", {}, "Ask, and watch it work."),
    element(
      "p",
      { class: "empty-words" },
      "Every step an agent takes shows up as it happens, here and in every other tab of yours.",
    ),
    agents.length > 0 ? element("div", { class: "agent-cards" }, ...cards) : none,
  );
}
