/**
 * Markdown to a tree of plain objects. Pure: no DOM, so that it can be tested alone.
 *
 * CommonMark as agents write it, plus tables, task items, strikethrough and bare
 * links. HTML is text like any other. Work is near linear in the input and
 * nesting is bounded, whatever the input: it comes from a model.
 */

import { parseInline } from "./markdown-inline.js";

const MAX_BLOCK_DEPTH = 12;

/* -------------------------------------------------------------- blocks -- */

const FENCE = /^( {0,3})(`{3,}|~{3,})[ \t]*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]|$)/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const QUOTE = /^ {0,3}> ?/;
const LIST_MARKER = /^( {0,3})([-*+]|\d{1,9}[.)])(?=[ \t]|$)/;
const SETEXT = /^ {0,3}(=+|-+)[ \t]*$/;
const TASK = /^\[([ xX])\](?=\s)/;

/**
 * Parse a whole text.
 *
 * @returns {object[]} Blocks; each has `type`, `raw` (its source lines) and `start` (its offset).
 */
export function parseMarkdown(text) {
  const lines = text.split("\n");
  const starts = [];
  let start = 0;
  for (const line of lines) {
    starts.push(start);
    start += line.length + 1;
  }
  const blocks = parseBlocks(lines.map(clean), 0);
  for (const block of blocks) block.start = starts[block.from];
  return blocks;
}

function clean(line) {
  return (line.endsWith("\r") ? line.slice(0, -1) : line).replace(/^\t+/, (tabs) =>
    "    ".repeat(tabs.length),
  );
}

function isBlank(line) {
  return line.trim() === "";
}

function indentOf(line) {
  let indent = 0;
  while (line[indent] === " ") indent += 1;
  return indent;
}

/** True where a line ends a paragraph without an empty line between. */
function interruptsParagraph(line) {
  if (FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line)) return true;
  const marker = LIST_MARKER.exec(line);
  if (!marker || isBlank(line.slice(marker[0].length))) return false;
  return !/^\d/.test(marker[2]) || /^1[.)]$/.test(marker[2]);
}

function parseBlocks(lines, depth) {
  const blocks = [];
  let index = 0;
  while (index < lines.length) {
    if (isBlank(lines[index])) {
      index += 1;
      continue;
    }
    const block = parseBlock(lines, index, depth);
    block.from = index;
    block.raw = lines.slice(index, block.to).join("\n");
    blocks.push(block);
    index = block.to;
  }
  return blocks;
}

function parseBlock(lines, index, depth) {
  const line = lines[index];
  if (depth >= MAX_BLOCK_DEPTH) return parseParagraph(lines, index);
  if (FENCE.test(line)) return parseFence(lines, index);
  if (HEADING.test(line)) return parseHeading(lines, index);
  if (RULE.test(line)) return { type: "rule", to: index + 1 };
  if (QUOTE.test(line)) return parseQuote(lines, index, depth);
  if (LIST_MARKER.test(line)) return parseList(lines, index, depth);
  if (startsTable(lines, index)) return parseTable(lines, index);
  if (indentOf(line) >= 4) return parseIndentedCode(lines, index);
  return parseParagraph(lines, index);
}

function parseFence(lines, index) {
  const [, indent, fence, info] = FENCE.exec(lines[index]);
  const content = [];
  let to = index + 1;
  let isClosed = false;
  for (; to < lines.length && !isClosed; to += 1) {
    const line = lines[to].trim();
    isClosed = line.length >= fence.length && line === fence[0].repeat(line.length);
    if (!isClosed) content.push(lines[to].slice(Math.min(indent.length, indentOf(lines[to]))));
  }
  // The text may have stopped, for now or for good, within the fence that closes the block.
  const last = isClosed ? "" : (content.at(-1)?.trim() ?? "");
  if (last && last === fence[0].repeat(last.length)) content.pop();
  const language = info.trim().split(/\s/, 1)[0].slice(0, 40);
  return { type: "code", language, text: content.join("\n"), isClosed, to };
}

function parseIndentedCode(lines, index) {
  let to = index;
  while (to < lines.length && (isBlank(lines[to]) || indentOf(lines[to]) >= 4)) to += 1;
  while (isBlank(lines[to - 1])) to -= 1;
  const text = lines
    .slice(index, to)
    .map((line) => line.slice(4))
    .join("\n");
  return { type: "code", language: "", text, isClosed: true, to };
}

function parseHeading(lines, index) {
  const level = HEADING.exec(lines[index])[1].length;
  const words = lines[index].trim().slice(level).trim();
  let end = words.length;
  while (words[end - 1] === "#") end -= 1;
  const isClosed = end === 0 || /[ \t]/.test(words[end - 1]);
  const title = isClosed ? words.slice(0, end).trim() : words;
  return { type: "heading", level, children: parseInline(title), to: index + 1 };
}

function parseQuote(lines, index, depth) {
  const content = [];
  let to = index;
  for (; to < lines.length && !isBlank(lines[to]); to += 1) {
    if (QUOTE.test(lines[to])) content.push(lines[to].replace(QUOTE, ""));
    else if (to > index && !isBlank(content.at(-1)) && !interruptsParagraph(lines[to]))
      content.push(lines[to]);
    else break;
  }
  return { type: "quote", blocks: parseBlocks(content, depth + 1), to };
}

function parseList(lines, index, depth) {
  const first = LIST_MARKER.exec(lines[index]);
  const kind = first[2].at(-1);
  const isOrdered = /\d/.test(first[2]);
  const list = {
    type: "list",
    isOrdered,
    first: isOrdered ? Number.parseInt(first[2], 10) : null,
    isTight: true,
    items: [],
  };
  let to = index;
  while (to < lines.length) {
    const marker = LIST_MARKER.exec(lines[to]);
    if (!marker || marker[2].at(-1) !== kind || RULE.test(lines[to])) break;
    const item = parseItem(lines, to, marker, depth);
    list.items.push(item);
    const next = item.to;
    to = next;
    while (to < lines.length && isBlank(lines[to])) to += 1;
    const following = to < lines.length ? LIST_MARKER.exec(lines[to]) : null;
    const goesOn = following && following[2].at(-1) === kind && !RULE.test(lines[to]);
    if (item.hasGap || (goesOn && to > next)) list.isTight = false;
    if (!goesOn) {
      to = next;
      break;
    }
  }
  list.to = to;
  return list;
}

function parseItem(lines, index, marker, depth) {
  const base = marker[1].length;
  const afterMarker = marker[0].length;
  const rest = lines[index].slice(afterMarker);
  const padding = indentOf(rest);
  const inset = afterMarker + (isBlank(rest) || padding > 4 ? 1 : padding);
  const content = [lines[index].slice(inset)];
  let to = index + 1;
  let afterBlank = false;
  for (; to < lines.length; to += 1) {
    const line = lines[to];
    if (isBlank(line)) {
      afterBlank = true;
      content.push("");
      continue;
    }
    const indent = indentOf(line);
    // Agents often indent nested lists by two spaces, whatever the marker's width.
    const isNested =
      indent >= inset || (indent >= base + 2 && LIST_MARKER.test(line.slice(indent)));
    if (isNested) {
      content.push(line.slice(Math.min(indent, inset)));
    } else if (!afterBlank && !interruptsParagraph(line) && !LIST_MARKER.test(line)) {
      content.push(line.trimStart());
    } else {
      break;
    }
    afterBlank = false;
  }
  while (content.length > 1 && isBlank(content.at(-1))) {
    content.pop();
    to -= 1;
  }
  const task = TASK.exec(content[0]);
  if (task) content[0] = content[0].slice(task[0].length).trimStart();
  const blocks = parseBlocks(content, depth + 1);
  const hasGap = blocks.some((block, place) => place > 0 && isBlank(content[block.from - 1]));
  const isChecked = task ? task[1] !== " " : null;
  return { type: "item", isChecked, blocks, hasGap, raw: lines.slice(index, to).join("\n"), to };
}

function splitRow(line) {
  const cells = [];
  let cell = "";
  let inCode = false;
  const row = line.trim();
  for (let index = row[0] === "|" ? 1 : 0; index < row.length; index += 1) {
    const character = row[index];
    if (character === "\\" && row[index + 1] === "|") {
      cell += "|";
      index += 1;
    } else if (character === "|" && !inCode) {
      cells.push(cell.trim());
      cell = "";
    } else {
      if (character === "`") inCode = !inCode && row.includes("`", index + 1);
      cell += character;
    }
  }
  if (cell.trim() !== "" || row.at(-1) !== "|") cells.push(cell.trim());
  return cells;
}

function startsTable(lines, index) {
  if (!lines[index].includes("|") || index + 1 >= lines.length) return false;
  const rule = lines[index + 1];
  if (!/^[ \t|:-]+$/.test(rule) || !rule.includes("-")) return false;
  const columns = splitRow(rule);
  return (
    columns.every((cell) => /^:?-+:?$/.test(cell)) &&
    columns.length === splitRow(lines[index]).length
  );
}

function parseTable(lines, index) {
  const align = splitRow(lines[index + 1]).map((cell) => {
    if (cell.endsWith(":")) return cell.startsWith(":") ? "center" : "right";
    return cell.startsWith(":") ? "left" : null;
  });
  const toCells = (line) =>
    splitRow(line)
      .slice(0, align.length)
      .map((cell) => parseInline(cell));
  const rows = [];
  let to = index + 2;
  for (; to < lines.length && !isBlank(lines[to]) && !interruptsParagraph(lines[to]); to += 1) {
    const cells = toCells(lines[to]);
    while (cells.length < align.length) cells.push([]);
    rows.push({ type: "row", cells, raw: lines[to] });
  }
  return { type: "table", align, header: toCells(lines[index]), rows, to };
}

function parseParagraph(lines, index) {
  let to = index + 1;
  for (; to < lines.length && !isBlank(lines[to]); to += 1) {
    const underline = SETEXT.exec(lines[to]);
    if (underline) {
      const level = underline[1][0] === "=" ? 1 : 2;
      return { type: "heading", level, children: inlineOf(lines, index, to), to: to + 1 };
    }
    if (interruptsParagraph(lines[to]) || startsTable(lines, to)) break;
  }
  return { type: "paragraph", children: inlineOf(lines, index, to), to };
}

function inlineOf(lines, from, to) {
  return parseInline(
    lines
      .slice(from, to)
      .map((line) => line.trimStart())
      .join("\n")
      .trimEnd(),
  );
}

/* -------------------------------------------------------------- stream -- */

/**
 * Parses a text that grows at its end, at the cost of its last two blocks.
 *
 * What is appended can change the last block, or join it with the one before
 * (a list that goes on after an empty line), and nothing earlier.
 */
export class MarkdownStream {
  #text = "";
  blocks = [];

  /** Give the blocks of `text`; the same objects for those that did not change. */
  update(text) {
    const kept = text.startsWith(this.#text) ? this.blocks.slice(0, -2) : [];
    const from = kept.length > 0 ? this.blocks[kept.length].start : 0;
    const fresh = parseMarkdown(text.slice(from));
    for (const block of fresh) block.start += from;
    this.#text = text;
    this.blocks = [...kept, ...fresh];
    return this.blocks;
  }
}
