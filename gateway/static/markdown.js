/**
 * Markdown to a tree of plain objects. Pure: no DOM, so that it can be tested alone.
 *
 * CommonMark as agents write it, plus tables, task items, strikethrough and bare
 * links. HTML is text like any other. Work is near linear in the input and
 * nesting is bounded, whatever the input: it comes from a model.
 */

const MAX_BLOCK_DEPTH = 12;
const MAX_OPENERS = 64;
const MAX_DELIMITER_RUN = 3;
const MAX_DESTINATION = 2_000;
const SAFE_PROTOCOLS = new Set(["http:", "https:", "mailto:"]);

/** Give the normalised address of a link that may be followed, otherwise `null`. */
export function safeHref(destination) {
  if (!URL.canParse(destination)) return null;
  const url = new URL(destination);
  return SAFE_PROTOCOLS.has(url.protocol) ? url.href : null;
}

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
  const language = info.trim().split(/\s/, 1)[0].slice(0, 40);
  return { type: "code", language, text: content.join("\n"), isClosed, to };
}

function parseIndentedCode(lines, index) {
  let to = index;
  while (to < lines.length && (isBlank(lines[to]) || indentOf(lines[to]) >= 4)) to += 1;
  while (isBlank(lines[to - 1])) to -= 1;
  const text = lines.slice(index, to).map((line) => line.slice(4)).join("\n");
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
    else if (to > index && !isBlank(content.at(-1)) && !interruptsParagraph(lines[to])) content.push(lines[to]);
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
    const isNested = indent >= inset || (indent >= base + 2 && LIST_MARKER.test(line.slice(indent)));
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
  return columns.every((cell) => /^:?-+:?$/.test(cell)) && columns.length === splitRow(lines[index]).length;
}

function parseTable(lines, index) {
  const align = splitRow(lines[index + 1]).map((cell) => {
    if (cell.endsWith(":")) return cell.startsWith(":") ? "center" : "right";
    return cell.startsWith(":") ? "left" : null;
  });
  const toCells = (line) => splitRow(line).slice(0, align.length).map((cell) => parseInline(cell));
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
  return parseInline(lines.slice(from, to).map((line) => line.trimStart()).join("\n").trimEnd());
}

/* -------------------------------------------------------------- inline -- */

const PUNCTUATION = /[\p{P}\p{S}]/u;
const SPECIAL = /[\\`*_~![\]<&\n]|https?:\/\//g;
const ENTITIES = { "&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&#39;": "'", "&nbsp;": "\u00a0" };

/** A doubly linked list: wrapping a stretch of nodes costs the same however long it is. */
class Chain {
  head = { next: null, previous: null };
  tail = this.head;

  append(node) {
    node.previous = this.tail;
    node.next = null;
    this.tail.next = node;
    this.tail = node;
    return node;
  }

  /** Put everything between two nodes under `parent`, which takes its place. */
  wrap(before, after, parent) {
    parent.first = before.next;
    parent.last = after ? after.previous : this.tail;
    parent.first.previous = null;
    parent.last.next = null;
    parent.previous = before;
    parent.next = after;
    before.next = parent;
    if (after) after.previous = parent;
    else this.tail = parent;
  }

  remove(node) {
    node.previous.next = node.next;
    if (node.next) node.next.previous = node.previous;
    else this.tail = node.previous;
  }
}

/** Parse the text of one block. */
export function parseInline(text) {
  return new InlineParser(text).parse();
}

class InlineParser {
  #text;
  #at = 0;
  #chain = new Chain();
  #delimiters = [];
  #brackets = [];
  /** Lengths of backtick runs that are known to have no closing run. */
  #unclosedRuns = new Set();

  constructor(text) {
    this.#text = text;
  }

  parse() {
    SPECIAL.lastIndex = 0;
    while (this.#at < this.#text.length) {
      SPECIAL.lastIndex = this.#at;
      const match = SPECIAL.exec(this.#text);
      const end = match ? match.index : this.#text.length;
      if (end > this.#at) this.#addText(this.#text.slice(this.#at, end));
      this.#at = end;
      if (match) this.#special(match[0]);
    }
    this.#emphasise(0);
    return toNodes(this.#chain.head.next);
  }

  #addText(text) {
    return this.#chain.append({ type: "text", text });
  }

  #take(length) {
    const taken = this.#text.slice(this.#at, this.#at + length);
    this.#at += length;
    return taken;
  }

  #special(mark) {
    switch (mark) {
      case "\\":
        return this.#escape();
      case "`":
        return this.#code();
      case "*":
      case "_":
      case "~":
        return this.#delimiter(mark);
      case "!":
        if (this.#text[this.#at + 1] !== "[") return this.#addText(this.#take(1));
        return this.#openBracket(2);
      case "[":
        return this.#openBracket(1);
      case "]":
        return this.#closeBracket();
      case "<":
        return this.#angle();
      case "&":
        return this.#entity();
      case "\n":
        return this.#lineEnd();
      default:
        return this.#bareLink();
    }
  }

  #escape() {
    const next = this.#text[this.#at + 1];
    if (next === "\n") {
      this.#at += 2;
      this.#chain.append({ type: "break" });
    } else if (next && /[!-/:-@[-`{-~]/.test(next)) {
      this.#at += 1;
      this.#addText(this.#take(1));
    } else {
      this.#addText(this.#take(1));
    }
  }

  #lineEnd() {
    this.#at += 1;
    const before = this.#chain.tail;
    if (before.type === "text" && before.text.endsWith("  ")) {
      before.text = before.text.trimEnd();
      this.#chain.append({ type: "break" });
    } else {
      this.#addText("\n");
    }
  }

  #runLength(mark) {
    let length = 0;
    while (this.#text[this.#at + length] === mark) length += 1;
    return length;
  }

  #code() {
    const length = this.#runLength("`");
    const from = this.#at + length;
    const end = this.#unclosedRuns.has(length) ? -1 : this.#closingRun(from, length);
    if (end < 0) {
      this.#unclosedRuns.add(length);
      this.#addText(this.#take(length));
      return;
    }
    let code = this.#text.slice(from, end).replaceAll("\n", " ");
    if (code.startsWith(" ") && code.endsWith(" ") && code.trim() !== "") code = code.slice(1, -1);
    this.#chain.append({ type: "code", text: code });
    this.#at = end + length;
  }

  #closingRun(from, length) {
    for (let at = this.#text.indexOf("`", from); at >= 0; at = this.#text.indexOf("`", at)) {
      let end = at;
      while (this.#text[end] === "`") end += 1;
      if (end - at === length) return at;
      at = end;
    }
    return -1;
  }

  #delimiter(mark) {
    const length = this.#runLength(mark);
    const before = this.#text[this.#at - 1] ?? " ";
    const after = this.#text[this.#at + length] ?? " ";
    const node = this.#addText(this.#take(length));
    if (length > MAX_DELIMITER_RUN || (mark === "~" && length !== 2)) return;
    const leads = !/\s/.test(after) && (!PUNCTUATION.test(after) || /\s/.test(before) || PUNCTUATION.test(before));
    const trails = !/\s/.test(before) && (!PUNCTUATION.test(before) || /\s/.test(after) || PUNCTUATION.test(after));
    const isWordBound = mark === "_";
    const canOpen = leads && (!isWordBound || !trails || PUNCTUATION.test(before));
    const canClose = trails && (!isWordBound || !leads || PUNCTUATION.test(after));
    if (canOpen || canClose) {
      this.#delimiters.push({ mark, node, length, original: length, canOpen, canClose });
    }
  }

  /** Match delimiters above `bottom` as CommonMark does, then drop them. */
  #emphasise(bottom) {
    const open = [];
    for (const closer of this.#delimiters.splice(bottom)) {
      while (closer.canClose && closer.length > 0) {
        const place = open.findLastIndex((opener) => isPair(opener, closer));
        if (place < 0) break;
        open.length = place + 1;
        this.#pair(open[place], closer);
        if (open[place].length === 0) open.pop();
      }
      if (closer.canOpen && closer.length > 0) {
        open.push(closer);
        if (open.length > MAX_OPENERS) open.shift();
      }
    }
  }

  #pair(opener, closer) {
    const isStrong = opener.length >= 2 && closer.length >= 2;
    const used = isStrong ? 2 : 1;
    const type = opener.mark === "~" ? "strike" : isStrong ? "strong" : "emphasis";
    for (const side of [opener, closer]) {
      side.length -= used;
      side.node.text = side.node.text.slice(used);
    }
    if (opener.node.next === closer.node) return;
    this.#chain.wrap(opener.node, closer.node, { type });
  }

  #openBracket(length) {
    const node = this.#addText(this.#take(length));
    this.#brackets.push({ node, isImage: length === 2, bottom: this.#delimiters.length });
    if (this.#brackets.length > MAX_OPENERS) this.#brackets.shift();
  }

  #closeBracket() {
    const bracket = this.#brackets.pop();
    const target = bracket && this.#text[this.#at + 1] === "(" ? this.#destination(this.#at + 2) : null;
    if (!target) {
      this.#addText(this.#take(1));
      return;
    }
    this.#emphasise(bracket.bottom);
    if (bracket.node === this.#chain.tail) this.#addText(target.destination);
    const href = safeHref(target.destination);
    // An image would make the reader's browser call whom the agent names: it is shown as a link.
    const link = href
      ? { type: "link", href, title: target.title }
      : { type: "reference", target: target.destination };
    this.#chain.wrap(bracket.node, null, link);
    this.#chain.remove(bracket.node);
    if (!bracket.isImage) this.#brackets = this.#brackets.filter((other) => other.isImage);
    this.#at = target.end;
  }

  /** Read `destination "title")` at `from`; `null` if it is not that. */
  #destination(from) {
    const window = this.#text.slice(from, from + MAX_DESTINATION);
    const start = /^\s*/.exec(window)[0].length;
    let at = start;
    let destination;
    if (window[at] === "<") {
      const end = window.indexOf(">", at);
      if (end < 0 || window.slice(at, end).includes("\n")) return null;
      destination = window.slice(at + 1, end);
      at = end + 1;
    } else {
      for (let depth = 0; at < window.length && !/\s/.test(window[at]); at += 1) {
        if (window[at] === "(") depth += 1;
        else if (window[at] === ")") depth -= 1;
        if (depth < 0 || depth > 8) break;
      }
      destination = window.slice(start, at);
    }
    const rest = /^(?:\s+(?:"([^"]*)"|'([^']*)'))?\s*\)/.exec(window.slice(at));
    if (!rest) return null;
    return { destination, title: rest[1] ?? rest[2] ?? null, end: from + at + rest[0].length };
  }

  #angle() {
    const window = this.#text.slice(this.#at, this.#at + MAX_DESTINATION);
    const match = /^<((?:https?:\/\/|mailto:)[^\s<>]+)>/i.exec(window);
    if (match) this.#link(match[1], match[0].length);
    else this.#addText(this.#take(1));
  }

  #bareLink() {
    const window = this.#text.slice(this.#at, this.#at + MAX_DESTINATION);
    let [address] = /^[^\s<>"`|]+/.exec(window);
    const isInsideWord = /[\p{L}\p{N}]/u.test(this.#text[this.#at - 1] ?? " ");
    let surplus = address.split(")").length - address.split("(").length;
    let end = address.length;
    for (; end > 0; end -= 1) {
      if (address[end - 1] === ")" && surplus > 0) surplus -= 1;
      else if (!/[.,:;!?'*_~\]]/.test(address[end - 1])) break;
    }
    address = address.slice(0, end);
    if (isInsideWord || address.length < 9) this.#addText(this.#take(address.length));
    else this.#link(address, address.length);
  }

  #link(address, length) {
    const href = safeHref(address);
    this.#at += length;
    const node = this.#addText(address);
    if (href) this.#chain.wrap(node.previous, null, { type: "link", href, title: null });
  }

  #entity() {
    const match = /^&(?:amp|lt|gt|quot|#39|nbsp);/.exec(this.#text.slice(this.#at, this.#at + 8));
    this.#addText(match ? ENTITIES[match[0]] : "&");
    this.#at += match ? match[0].length : 1;
  }
}

function isPair(opener, closer) {
  if (opener.mark !== closer.mark) return false;
  const isAmbiguous = opener.canClose || closer.canOpen;
  const isThird = (opener.original + closer.original) % 3 === 0;
  return !(isAmbiguous && isThird && (opener.original % 3 !== 0 || closer.original % 3 !== 0));
}

function toNodes(first, isInLink = false) {
  const nodes = [];
  for (let node = first; node; node = node.next) {
    if (node.type === "text") {
      const last = nodes.at(-1);
      if (node.text === "") continue;
      if (last?.type === "text") last.text += node.text;
      else nodes.push({ type: "text", text: node.text });
    } else if (node.first) {
      const { type, href, title, target } = node;
      const isLink = type === "link" || type === "reference";
      const children = toNodes(node.first, isInLink || isLink);
      if (isLink && isInLink) nodes.push(...children);
      else if (type === "link") nodes.push({ type, href, title, children });
      else if (type === "reference") nodes.push({ type, target, children });
      else nodes.push({ type, children });
    } else {
      nodes.push({ type: node.type, ...(node.text === undefined ? {} : { text: node.text }) });
    }
  }
  return nodes;
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
