/** Building elements without HTML strings. */

const SVG = "http://www.w3.org/2000/svg";

/**
 * Make an element. `properties` are attributes, except `onclick` and its like
 * (listeners) and values of `true`, `false` and `null` (present, absent, absent).
 */
export function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else setAttribute(node, name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}

export function setAttribute(node, name, value) {
  if (value === null || value === undefined || value === false) node.removeAttribute(name);
  else if (node.getAttribute(name) !== String(value))
    node.setAttribute(name, value === true ? "" : value);
}

/** Change text only where it differs: an unchanged node keeps the reader's selection. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

const CIRCLE = "M12 3.5a8.5 8.5 0 1 1 0 17a8.5 8.5 0 0 1 0-17z";
const ICON_PATHS = {
  send: ["M12 19V5", "M5.5 11.5 12 5l6.5 6.5"],
  stop: ["M7.5 7.5h9v9h-9z"],
  copy: ["M9 9h10.5v10.5H9z", "M15 5.5V4.5H4.5V15h1"],
  check: ["M5 12.5l4.5 4.5L19 7.5"],
  cross: ["M6.5 6.5l11 11", "M17.5 6.5l-11 11"],
  retry: ["M19.5 12a7.5 7.5 0 1 1-2.2-5.3", "M19.5 3.5v4h-4"],
  down: ["M12 5v14", "M5.5 12.5 12 19l6.5-6.5"],
  question: [CIRCLE, "M9.6 9.7a2.4 2.4 0 1 1 3.5 2.2c-.7.4-1.1.8-1.1 1.6", "M12 16.4v.1"],
  warning: [CIRCLE, "M12 7.8v5", "M12 16v.1"],
  chevron: ["M8.5 6l6 6-6 6"],
};

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  for (const [key, value] of Object.entries({
    viewBox: "0 0 24 24",
    class: `icon icon-${name}`,
    "aria-hidden": "true",
  })) {
    svg.setAttribute(key, value);
  }
  for (const d of ICON_PATHS[name]) {
    const path = document.createElementNS(SVG, "path");
    path.setAttribute("d", d);
    svg.append(path);
  }
  return svg;
}

/** A button that copies what `read` gives, and says so. */
export function copyButton(read, label = "Copy") {
  const words = element("span", { class: "copy-label" }, label);
  const button = element(
    "button",
    { type: "button", class: "quiet copy", "aria-label": label },
    icon("copy"),
    words,
  );
  button.addEventListener("click", async () => {
    const isCopied = await copyText(read());
    words.textContent = isCopied ? "Copied" : "Press Ctrl+C";
    setTimeout(() => {
      words.textContent = label;
    }, 1600);
  });
  return button;
}

async function copyText(text) {
  // The clipboard interface exists only on HTTPS and localhost.
  if (navigator.clipboard) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch (error) {
      if (error.name !== "NotAllowedError") throw error;
    }
  }
  const field = element("textarea", { class: "offscreen" });
  field.value = text;
  document.body.append(field);
  field.select();
  const isCopied = document.execCommand("copy");
  field.remove();
  return isCopied;
}
