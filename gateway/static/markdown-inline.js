/** The inline half of the Markdown parser: emphasis, code, links. Pure. */

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

const PUNCTUATION = /[\p{P}\p{S}]/u;
const SPECIAL = /[\\`*_~![\]<&\n]|https?:\/\//g;
const ENTITIES = {
  "&amp;": "&",
  "&lt;": "<",
  "&gt;": ">",
  "&quot;": '"',
  "&#39;": "'",
  "&nbsp;": "\u00a0",
};

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
    const leads =
      !/\s/.test(after) &&
      (!PUNCTUATION.test(after) || /\s/.test(before) || PUNCTUATION.test(before));
    const trails =
      !/\s/.test(before) &&
      (!PUNCTUATION.test(before) || /\s/.test(after) || PUNCTUATION.test(after));
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
    const target =
      bracket && this.#text[this.#at + 1] === "(" ? this.#destination(this.#at + 2) : null;
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
