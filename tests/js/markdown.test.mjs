import assert from "node:assert/strict";
import { describe, test } from "node:test";

import { MarkdownStream, parseMarkdown } from "../../gateway/static/markdown.js";
import { parseInline, safeHref } from "../../gateway/static/markdown-inline.js";

const PLACES = new Set(["raw", "start", "from", "to", "hasGap"]);

/** A tree without the fields that only say where a node stood. */
function tree(value) {
  return JSON.parse(JSON.stringify(value, (key, part) => (PLACES.has(key) ? undefined : part)));
}

const text = (content) => ({ type: "text", text: content });
const paragraph = (...children) => ({ type: "paragraph", children });
const parse = (source) => tree(parseMarkdown(source));

/** All nodes of a tree, blocks and inline. */
function* nodesOf(value) {
  if (Array.isArray(value)) for (const part of value) yield* nodesOf(part);
  else if (value !== null && typeof value === "object") {
    yield value;
    for (const part of Object.values(value)) yield* nodesOf(part);
  }
}

function plain(value) {
  return [...nodesOf(value)]
    .map((node) => (typeof node.text === "string" ? node.text : ""))
    .join("");
}

describe("blocks", () => {
  test("headings", () => {
    assert.deepEqual(parse("# One\n### Three ###\n#hashtag\n"), [
      { type: "heading", level: 1, children: [text("One")] },
      { type: "heading", level: 3, children: [text("Three")] },
      paragraph(text("#hashtag")),
    ]);
    assert.deepEqual(parse("Title\n===\nSub\n---"), [
      { type: "heading", level: 1, children: [text("Title")] },
      { type: "heading", level: 2, children: [text("Sub")] },
    ]);
  });

  test("fences keep their content, whatever it looks like", () => {
    assert.deepEqual(parse("```py title=x\n# no *heading*\n\n- no list\n```\nafter"), [
      { type: "code", language: "py", text: "# no *heading*\n\n- no list", isClosed: true },
      paragraph(text("after")),
    ]);
  });

  test("an unterminated fence is code up to the end", () => {
    const [code, ...rest] = parse("```js\nconst a = 1;\n\n<script>alert(1)</script>");
    assert.deepEqual(code, {
      type: "code",
      language: "js",
      text: "const a = 1;\n\n<script>alert(1)</script>",
      isClosed: false,
    });
    assert.deepEqual(rest, []);
  });

  test("a fence that has begun to close is no part of the code", () => {
    for (const end of ["`", "``"]) {
      const [block] = parse(`\`\`\`py\nx = 1\n${end}`);
      assert.deepEqual([block.text, block.isClosed], ["x = 1", false]);
    }
    assert.equal(parse("```py\nx = 1\n``y")[0].text, "x = 1\n``y");
    assert.equal(parse("```py\n``\nx = 1")[0].text, "``\nx = 1");
  });

  test("a shorter fence does not close a longer one", () => {
    assert.equal(parse("````\n```\n````")[0].text, "```");
  });

  test("nested lists", () => {
    const [list] = parse("1. one\n   - a\n   - b\n     1. deep\n2. two");
    assert.equal(list.isOrdered, true);
    assert.equal(list.items.length, 2);
    const [, inner] = list.items[0].blocks;
    assert.deepEqual(
      inner.items.map((item) => plain(item.blocks[0])),
      ["a", "b"],
    );
    assert.equal(inner.items[1].blocks[1].isOrdered, true);
    assert.equal(list.isTight, true);
  });

  test("two spaces nest a list under a number, as agents write it", () => {
    const [list, ...rest] = parse("1. one\n  - a\n2. two");
    assert.equal(rest.length, 0);
    assert.equal(list.items.length, 2);
    assert.equal(list.items[0].blocks[1].type, "list");
  });

  test("an ordered list starts where it says", () => {
    assert.equal(parse("7. seven\n8. eight")[0].first, 7);
  });

  test("empty lines make a list loose", () => {
    assert.equal(parse("- a\n\n- b")[0].isTight, false);
    assert.equal(parse("- a\n- b\n\ntext")[0].isTight, true);
  });

  test("task items", () => {
    assert.deepEqual(
      parse("- [x] done\n- [ ] open\n- [link] none")[0].items.map((item) => item.isChecked),
      [true, false, null],
    );
  });

  test("quotes, also lazy and nested", () => {
    const [quote] = parse("> one\ntwo\n> > three");
    assert.equal(quote.type, "quote");
    assert.deepEqual(quote.blocks[0], paragraph(text("one\ntwo")));
    assert.equal(quote.blocks[1].type, "quote");
  });

  test("tables with alignment, short rows and pipes in code", () => {
    const [table] = parse("| a | b |\n|:--|--:|\n| `x|y` | 2 |\n| \\| |");
    assert.deepEqual(table.align, ["left", "right"]);
    assert.deepEqual(table.rows[0].cells[0], [{ type: "code", text: "x|y" }]);
    assert.deepEqual(table.rows[1].cells, [[text("|")], []]);
  });

  test("a pipe alone makes no table", () => {
    assert.equal(parse("a | b\nc | d")[0].type, "paragraph");
  });

  test("rules are not lists", () => {
    assert.deepEqual(
      parse("- a\n\n---\n\n* * *").map(({ type }) => type),
      ["list", "rule", "rule"],
    );
  });

  test("line ends of Windows", () => {
    assert.deepEqual(
      parse("a\r\nb\r\n\r\n- c\r\n").map(({ type }) => type),
      ["paragraph", "list"],
    );
  });
});

describe("inline", () => {
  test("emphasis", () => {
    assert.deepEqual(parseInline("*a **b** c*"), [
      {
        type: "emphasis",
        children: [text("a "), { type: "strong", children: [text("b")] }, text(" c")],
      },
    ]);
    assert.deepEqual(parseInline("~~gone~~ ~5"), [
      { type: "strike", children: [text("gone")] },
      text(" ~5"),
    ]);
  });

  test("snake_case, 2*3*4 and lone marks stay as they are", () => {
    for (const source of ["snake_case_name", "2 * 3 * 4", "a ** b", "*", "**", "_"]) {
      assert.deepEqual(parseInline(source), [text(source)], source);
    }
  });

  test("code wins over everything in it", () => {
    assert.deepEqual(parseInline("`*a* [b](c)`"), [{ type: "code", text: "*a* [b](c)" }]);
    assert.deepEqual(parseInline("`` a`b ``"), [{ type: "code", text: "a`b" }]);
    assert.deepEqual(parseInline("`open"), [text("`open")]);
  });

  test("escapes, entities and hard breaks", () => {
    assert.deepEqual(parseInline("\\*a\\* &lt;b&gt; &copy;"), [text("*a* <b> &copy;")]);
    assert.deepEqual(parseInline("a  \nb\\\nc"), [
      text("a"),
      { type: "break" },
      text("b"),
      { type: "break" },
      text("c"),
    ]);
  });

  test("links", () => {
    assert.deepEqual(parseInline('[a *b*](https://x.org/p_(q) "t")'), [
      {
        type: "link",
        href: "https://x.org/p_(q)",
        title: "t",
        children: [text("a "), { type: "emphasis", children: [text("b")] }],
      },
    ]);
    assert.equal(parseInline("<https://x.org>")[0].href, "https://x.org/");
    assert.equal(parseInline("see https://x.org/a.")[1].href, "https://x.org/a");
    assert.equal(plain(parseInline("see https://x.org/a.")), "see https://x.org/a.");
    assert.equal(parseInline("[mail](mailto:a@b.c)")[0].href, "mailto:a@b.c");
  });

  test("links do not nest", () => {
    for (const source of [
      "[a [b](https://b.org) c](https://c.org)",
      "[see https://b.org](https://c.org)",
      "[![i](https://b.org)](https://c.org)",
    ]) {
      for (const { type, children } of nodesOf(parseInline(source))) {
        if (type === "link")
          assert.equal(
            [...nodesOf(children)].some((node) => node.type === "link"),
            false,
            source,
          );
      }
    }
  });

  test("a file of the project is a reference, not a link", () => {
    assert.deepEqual(parseInline("[ADR](docs/adr/1.md)"), [
      { type: "reference", target: "docs/adr/1.md", children: [text("ADR")] },
    ]);
  });

  test("an image is a link: nothing is fetched because an agent says so", () => {
    assert.equal(parseInline("![pixel](https://evil.example/p.png)")[0].type, "link");
  });
});

describe("hostile input", () => {
  const ADDRESSES = [
    "javascript:alert(1)",
    "JaVaScRiPt:alert(1)",
    " javascript:alert(1)",
    "java\tscript:alert(1)",
    "java\nscript:alert(1)",
    "\u0001javascript:alert(1)",
    "data:text/html,<script>alert(1)</script>",
    "vbscript:msgbox(1)",
    "file:///etc/passwd",
    "blob:https://x.org/1",
    "//evil.example",
    "/v1/runs",
    "",
  ];

  test("only http, https and mailto can be followed", () => {
    for (const address of ADDRESSES) assert.equal(safeHref(address), null, JSON.stringify(address));
    assert.equal(safeHref("https://x.org"), "https://x.org/");
  });

  test("no way of writing a link gets another scheme through", () => {
    for (const address of ADDRESSES) {
      for (const source of [
        `[x](${address})`,
        `[x](<${address}>)`,
        `![x](${address})`,
        `<${address}>`,
        address,
        `[x](${address} "t")`,
      ]) {
        for (const node of nodesOf(parseMarkdown(source))) {
          if (node.type === "link") assert.match(node.href, /^(https?|mailto):/, source);
        }
      }
    }
  });

  test("HTML is text", () => {
    const source = "<script>alert(1)</script> <img src=x onerror=alert(1)> <!-- c -->";
    assert.deepEqual(parse(source), [paragraph(text(source))]);
  });

  test("text survives: nothing is lost of what has no meaning", () => {
    for (const source of [
      "[a](b",
      "[[[",
      "]]](",
      "![",
      "<",
      "&",
      "\\",
      "**a",
      "a |",
      "http://",
      "[](",
      "[]()",
      "`",
      "~~~~",
    ]) {
      assert.doesNotThrow(() => parseMarkdown(source), source);
    }
    assert.equal(plain(parse("[a](b")), "[a](b");
  });

  const FLOODS = {
    openers: "*a ".repeat(30_000),
    "openers and closers": "*a ".repeat(20_000) + " b*".repeat(20_000),
    strong: "**a*".repeat(20_000),
    brackets: "[".repeat(60_000),
    "open links": "[a](".repeat(20_000),
    "closed brackets": "]".repeat(60_000),
    backticks: Array.from({ length: 400 }, (_, length) => "`".repeat(length + 1)).join("a"),
    quotes: ">".repeat(60_000),
    "nested lists": Array.from({ length: 1_500 }, (_, depth) => `${" ".repeat(depth * 2)}- x`).join(
      "\n",
    ),
    "list marks": "- ".repeat(30_000),
    "wide table": `${"|".repeat(30_000)}\n${"|-".repeat(30_000)}`,
    "closing parentheses": `http://a${")".repeat(60_000)} `.repeat(2),
    "heading spaces": `# ${" ".repeat(60_000)}x`,
    "rule or not": `${"- ".repeat(30_000)}x`,
    lines: "a\n".repeat(40_000),
    items: "- a\n\n".repeat(15_000),
  };

  for (const [name, source] of Object.entries(FLOODS)) {
    test(`a flood of ${name} neither hangs nor overflows`, () => {
      const startedAt = performance.now();
      JSON.stringify(parseMarkdown(source));
      assert.ok(performance.now() - startedAt < 2_000);
    });
  }
});

describe("a growing text", () => {
  const ANSWER = `# Title

Intro with **bold**, \`code\` and [a link](https://x.org).

- one
- two
  continued

  with a paragraph

- three

1. first

2. second
10. tenth

- [x] done

| a | b |
|:--|--:|
| 1 | 2 |
| 3 | 4 |

\`\`\`js
const x = \`y\`;

done();
\`\`\`

> quote
> > nested

Setext
------

    indented

***

End *of* it — 🙂`;

  test("ends as if it had been parsed at once, however it was cut", () => {
    const whole = tree(parseMarkdown(ANSWER));
    for (let round = 0; round < 150; round += 1) {
      const stream = new MarkdownStream();
      for (let end = 0; end < ANSWER.length;) {
        end = Math.min(ANSWER.length, end + 1 + Math.floor(Math.random() * (1 + (round % 40))));
        stream.update(ANSWER.slice(0, end));
        if (round < 5)
          assert.deepEqual(tree(stream.blocks), tree(parseMarkdown(ANSWER.slice(0, end))));
      }
      assert.deepEqual(tree(stream.blocks), whole);
    }
  });

  test("keeps the blocks that did not change", () => {
    const stream = new MarkdownStream();
    const [first, second] = stream.update("one\n\ntwo\n\nthree\n\nfo");
    const later = stream.update("one\n\ntwo\n\nthree\n\nfour");
    assert.equal(later[0], first);
    assert.equal(later[1], second);
    assert.equal(plain(later[3]), "four");
  });

  test("a text that is replaced is parsed anew", () => {
    const stream = new MarkdownStream();
    stream.update("one\n\ntwo\n\nthree");
    assert.deepEqual(tree(stream.update("other")), [paragraph(text("other"))]);
  });
});
