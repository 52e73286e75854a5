import assert from "node:assert/strict";
import { test } from "node:test";

import { randomId, reconnectDelayMs, retryAfterMs } from "../../gateway/static/relay-client.js";

test("the first retry comes within 300 ms", () => {
  assert.equal(reconnectDelayMs(0, 0), 0);
  assert.ok(reconnectDelayMs(0, 0.999) < 300);
});

test("later retries are spread over a doubling window, up to a cap", () => {
  const windows = [1, 2, 3, 4, 5, 6, 7, 20, 1000].map((retries) => reconnectDelayMs(retries, 1));
  assert.deepEqual(windows, [1_000, 2_000, 4_000, 8_000, 16_000, 20_000, 20_000, 20_000, 20_000]);
  assert.equal(reconnectDelayMs(5, 0), 0, "full jitter: the window begins at 0");
});

test("Retry-After is seconds or a date", () => {
  const now = Date.UTC(2026, 10, 22, 14);
  assert.equal(retryAfterMs("7", now), 7_000);
  assert.equal(retryAfterMs("Sun, 22 Nov 2026 14:00:05 GMT", now), 5_000);
  assert.equal(retryAfterMs("Sun, 22 Nov 2026 13:00:00 GMT", now), 0);
  assert.equal(retryAfterMs("soon", now), null);
  assert.equal(retryAfterMs(null, now), null);
});

test("ids are long enough not to meet, and fit the protocol", () => {
  const ids = new Set(Array.from({ length: 1_000 }, () => randomId("m_")));
  assert.equal(ids.size, 1_000);
  assert.match([...ids][0], /^m_[0-9a-f]{24}$/);
});
