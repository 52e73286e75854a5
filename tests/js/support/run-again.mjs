/** Node 20 has a WebSocket only behind a flag: there, a test file runs itself again with it. */

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { test } from "node:test";

/** Give true where sockets can be tested in this process. */
export function hasWebSocket(file) {
  if (globalThis.WebSocket) return true;
  test("with Node's own WebSocket", async () => {
    // A test runner below a test runner stays silent unless its context is taken away.
    const { NODE_TEST_CONTEXT: _, ...env } = process.env;
    const child = spawn(process.execPath, ["--experimental-websocket", "--test", file], { env });
    let output = "";
    child.stdout.on("data", (bytes) => (output += bytes));
    child.stderr.on("data", (bytes) => (output += bytes));
    const code = await new Promise((resolve) => child.on("close", resolve));
    assert.equal(code, 0, output);
    assert.match(output, /# pass [1-9]/, output);
  });
  return false;
}
