/** Draws a Markdown tree with createElement and text nodes, and redraws only what changed. */

import { copyButton, element } from "./dom.js";
import { MarkdownStream } from "./markdown.js";

/** A growing text on the page. */
export class MarkdownView {
  #stream = new MarkdownStream();
  #drawn = [];

  constructor(root) {
    this.root = root;
  }

  update(text) {
    this.#drawn = patch(this.root, this.#drawn, this.#stream.update(text));
  }
}

/**
 * Make the children of `parent` show `blocks`.
 *
 * @param {object[]} drawn What the last call returned: {block, node, inner} in order.
 */
function patch(parent, drawn, blocks, context = {}) {
  const next = blocks.map((block, index) => {
    const before = drawn[index];
    if (before && isSame(before.block, block)) return before;
    if (before && grow(before, block)) return before;
    const fresh = draw(block, context);
    if (before) before.node.replaceWith(fresh.node);
    else parent.append(fresh.node);
    return fresh;
  });
  for (const surplus of drawn.slice(blocks.length)) surplus.node.remove();
  return next;
}

function isSame(before, block) {
  return before === block || (before.type === block.type && before.raw === block.raw);
}

/** Change what is drawn in place where a block only grew; false if it must be drawn anew. */
function grow(drawn, block) {
  const before = drawn.block;
  if (before.type !== block.type) return false;
  switch (block.type) {
    case "code":
      if (before.language !== block.language || !block.text.startsWith(before.text)) return false;
      drawn.inner.appendData(block.text.slice(before.text.length));
      drawn.node.toggleAttribute("data-open", !block.isClosed);
      break;
    case "list":
      if (before.isOrdered !== block.isOrdered || before.isTight !== block.isTight) return false;
      if (before.first !== block.first) return false;
      drawn.inner = patch(drawn.node, drawn.inner, block.items, block);
      break;
    case "item":
      if (before.isChecked !== block.isChecked) return false;
      drawn.inner = patch(drawn.node, drawn.inner, block.blocks, drawn.context);
      break;
    case "quote":
      drawn.inner = patch(drawn.node, drawn.inner, block.blocks);
      break;
    case "table":
      if (before.raw.split("\n", 2).join() !== block.raw.split("\n", 2).join()) return false;
      drawn.inner = patch(drawn.body, drawn.inner, block.rows, block);
      break;
    case "paragraph":
      drawn.node.replaceChildren(...inline(block.children));
      break;
    default:
      return false;
  }
  drawn.block = block;
  return true;
}

function draw(block, context) {
  switch (block.type) {
    case "heading":
      // The page has its own first and second level: an answer begins below them.
      return {
        block,
        node: element(
          `h${Math.min(6, block.level + 2)}`,
          { class: `level-${block.level}` },
          ...inline(block.children),
        ),
      };
    case "rule":
      return { block, node: element("hr") };
    case "code":
      return drawCode(block);
    case "quote": {
      const node = element("blockquote");
      return { block, node, inner: patch(node, [], block.blocks) };
    }
    case "list": {
      const node = element(block.isOrdered ? "ol" : "ul", {
        start: block.isOrdered ? block.first : null,
      });
      return { block, node, inner: patch(node, [], block.items, block) };
    }
    case "item":
      return drawItem(block, context);
    case "table":
      return drawTable(block);
    case "row":
      return { block, node: element("tr", {}, ...cells("td", block.cells, context.align)) };
    default:
      return drawParagraph(block, context);
  }
}

function drawParagraph(block, context) {
  // In a tight list the text stands in the item itself; `display: contents` keeps one node per block.
  const node = element("p", { class: context.isTight ? "tight" : null }, ...inline(block.children));
  return { block, node };
}

function drawItem(block, context) {
  const node = element("li", { class: block.isChecked === null ? null : "task" });
  if (block.isChecked !== null) {
    const box = element("input", {
      type: "checkbox",
      disabled: true,
      "aria-label": block.isChecked ? "done" : "open",
    });
    box.checked = block.isChecked;
    node.append(box);
  }
  return { block, node, context, inner: patch(node, [], block.blocks, context) };
}

function drawCode(block) {
  const text = document.createTextNode(block.text);
  const code = element("code", {}, text);
  const head = element(
    "div",
    { class: "code-head" },
    element("span", { class: "code-language" }, block.language || "text"),
    copyButton(() => text.data, "Copy code"),
  );
  const node = element(
    "div",
    { class: "code-block", "data-open": block.isClosed ? null : "" },
    head,
    element("pre", { tabindex: "0" }, code),
  );
  return { block, node, inner: text };
}

function drawTable(block) {
  const head = element("thead", {}, element("tr", {}, ...cells("th", block.header, block.align)));
  const body = element("tbody");
  const node = element(
    "div",
    { class: "table-scroll", tabindex: "0" },
    element("table", {}, head, body),
  );
  return { block, node, body, inner: patch(body, [], block.rows, block) };
}

function cells(tag, contents, align = []) {
  return contents.map((content, column) =>
    element(
      tag,
      {
        class: align[column] ? `align-${align[column]}` : null,
        scope: tag === "th" ? "col" : null,
      },
      ...inline(content),
    ),
  );
}

function inline(nodes) {
  return nodes.map((node) => {
    switch (node.type) {
      case "text":
        return document.createTextNode(node.text);
      case "code":
        return element("code", {}, document.createTextNode(node.text));
      case "break":
        return element("br");
      case "strong":
        return element("strong", {}, ...inline(node.children));
      case "emphasis":
        return element("em", {}, ...inline(node.children));
      case "strike":
        return element("del", {}, ...inline(node.children));
      case "link":
        return element(
          "a",
          {
            href: node.href,
            title: node.title,
            target: "_blank",
            rel: "noopener noreferrer nofollow",
          },
          ...inline(node.children),
        );
      default:
        return element(
          "span",
          { class: "reference", title: node.target },
          ...inline(node.children),
        );
    }
  });
}
