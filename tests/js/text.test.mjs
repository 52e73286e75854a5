import assert from "node:assert/strict";
import { test } from "node:test";

import { codePointLength, codePointSlice, PlacedText } from "../../gateway/static/relay-client.js";

const MIXED = "a🙂b👩‍👩‍👧é\u{1F1E9}\u{1F1EA}漢";

test("positions count code points, not UTF-16 units", () => {
  assert.equal(codePointLength("🙂🙂"), 2);
  assert.equal(codePointLength(MIXED), Array.from(MIXED).length);
  assert.equal(codePointLength("\ud83d"), 1, "half a pair counts as Python counts it");
  assert.equal(codePointLength("\ud83d\ud83d\ude00"), 2);
});

test("slices by code points", () => {
  const points = Array.from(MIXED);
  for (let start = 0; start <= points.length + 1; start += 1) {
    for (let end = start; end <= points.length + 1; end += 1) {
      assert.equal(codePointSlice(MIXED, start, end), points.slice(start, end).join(""));
    }
  }
  assert.equal(codePointSlice(MIXED, 3), points.slice(3).join(""));
});

test("placing a piece twice changes nothing", () => {
  const text = new PlacedText();
  text.place(0, "a🙂");
  text.place(2, "bc");
  text.place(2, "bc");
  text.place(0, "a🙂");
  text.place(0, "a🙂bc");
  assert.equal(String(text), "a🙂bc");
  assert.equal(text.length, 4);
  assert.equal(text.hasHole, false);
});

test("a hole is visible until a later piece covers it", () => {
  const text = new PlacedText();
  text.place(0, "one ");
  text.place(8, "three");
  assert.equal(text.hasHole, true);
  assert.equal(String(text), "one […]three");
  text.place(0, "one two three");
  assert.equal(text.hasHole, false);
  assert.equal(String(text), "one two three");
});

test("a text that is joined in the middle says so", () => {
  const text = new PlacedText();
  text.place(5, "tail");
  assert.equal(text.hasHole, true);
  assert.equal(String(text), "[…]tail");
});

test("pieces in any order and overlap give the same text", () => {
  const whole = Array.from(MIXED.repeat(6));
  for (let round = 0; round < 200; round += 1) {
    const text = new PlacedText();
    for (let piece = 0; piece < 12; piece += 1) {
      const start = Math.floor(Math.random() * whole.length);
      const end = start + Math.floor(Math.random() * (whole.length - start));
      text.place(start, whole.slice(start, end).join(""));
    }
    for (let start = 0; start < whole.length; start += 7) {
      text.place(start, whole.slice(start, start + 9).join(""));
    }
    assert.equal(String(text), whole.join(""));
    assert.equal(text.length, whole.length);
  }
});

test("20,000 pieces are placed quickly", () => {
  const text = new PlacedText();
  const startedAt = performance.now();
  for (let index = 0; index < 20_000; index += 1) text.place(index * 5, "🙂abcd");
  assert.equal(text.length, 100_000);
  assert.equal(codePointLength(String(text)), 100_000);
  assert.ok(performance.now() - startedAt < 1_000);
});
