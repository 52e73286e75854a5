import assert from "node:assert/strict";
import { once } from "node:events";
import { afterEach, beforeEach, describe, test } from "node:test";
import { fileURLToPath } from "node:url";

import { RelayClient } from "../../gateway/static/relay-client.js";
import { ScriptedGateway } from "./support/gateway.mjs";
import { History } from "./support/history.mjs";
import { hasWebSocket } from "./support/run-again.mjs";

if (hasWebSocket(fileURLToPath(import.meta.url))) {
  describe("RelayClient", { timeout: 20_000 }, () => {
    let gateway;
    let client;
    let states;

    beforeEach(async () => {
      gateway = await ScriptedGateway.start();
      states = [];
    });

    afterEach(async () => {
      client.close();
      if (gateway.server.listening) await gateway.stop();
    });

    function newClient(options = {}) {
      client = new RelayClient({ url: gateway.url, token: "a.b.c", clientId: "tab-1", ...options });
      client.addEventListener("state", ({ detail }) => states.push(detail));
      return client;
    }

    /** Connect and be live. */
    async function live(fields, options) {
      newClient(options).connect();
      const connection = (await gateway.accept()).establish(fields);
      await reach("live");
      return connection;
    }

    async function reach(state) {
      while (client.state !== state) await once(client, "state");
      return states.at(-1);
    }

    test("offers the protocol and the token, and names the tab", async () => {
      const connection = await live();
      assert.deepEqual(connection.protocols, ["relay.v1", "bearer.a.b.c"]);
      assert.equal(connection.url.pathname, "/v1/ws");
      assert.equal(connection.url.searchParams.get("since"), "active");
      assert.equal(connection.url.searchParams.get("client_id"), "tab-1");
      assert.equal(client.node, "gateway-1");
      assert.equal(client.userId, "alice");
      assert.deepEqual(
        client.agents.map(({ name }) => name),
        ["docs"],
      );
    });

    for (const [form, prefix] of [
      ["", "/"],
      ["?page=1#top", "/"],
      ["v1/ws", "/"],
      ["relay/", "/relay/"],
      ["relay", "/relay/"],
      ["relay?page=1#top", "/relay/"],
      ["a/b//", "/a/b/"],
      ["relay/v1/ws?since=now", "/relay/"],
    ]) {
      test(`with the address …/${form} it asks below ${prefix}`, async () => {
        newClient({ url: gateway.url + form }).connect();
        const { url, socket } = await gateway.accept();
        assert.equal(url.pathname, `${prefix}v1/ws`);
        assert.deepEqual([...url.searchParams.keys()], ["since", "client_id"]);
        gateway.refusal = { status: 403, body: { title: "Forbidden" } };
        socket.destroy();
        await reach("stopped");
        const asked = new URL(gateway.ticketRequests[0].path, gateway.url);
        assert.equal(asked.pathname, `${prefix}v1/tickets`);
      });
    }

    test("takes the address of a WebSocket, and leaves a URL object as it is", async () => {
      const given = new URL(gateway.url.replace("http:", "ws:"));
      given.hash = "top";
      newClient({ url: given }).connect();
      const { url, socket } = await gateway.accept();
      assert.equal(url.pathname, "/v1/ws");
      gateway.refusal = { status: 403, body: { title: "Forbidden" } };
      socket.destroy();
      await reach("stopped");
      assert.equal(gateway.ticketRequests.length, 1);
      assert.deepEqual([given.protocol, given.hash], ["ws:", "#top"]);
    });

    test("delivers each event once and keeps the runs", async () => {
      const connection = await live();
      const seen = [];
      client.addEventListener("event", ({ detail }) => seen.push(detail.offset));
      const history = new History();
      for (const event of [...history.exampleRun(), ...history.events]) connection.send(event);
      connection.send({ type: "heartbeat", position: `e1:${history.offset}` });
      await once(client, "heartbeat");
      assert.deepEqual(
        seen,
        history.events.map(({ offset }) => offset),
      );
      assert.equal(client.store.runs.get("run_1").status, "completed");
    });

    test("comes back at once with its position, and to no other start", async () => {
      const connection = await live();
      const history = new History();
      connection.send(history.lifecycle("agent_queued", { content: "x" }));
      connection.send(history.lifecycle("agent_started"));
      while (client.position !== "e1:2") await once(client, "event");
      const cutAt = performance.now();
      connection.cut();
      const again = await gateway.accept();
      assert.ok(performance.now() - cutAt < 600);
      assert.equal(again.url.searchParams.get("since"), "e1:2");
      assert.equal(again.url.searchParams.get("client_id"), "tab-1");
    });

    test("follows a heartbeat into a new epoch", async () => {
      const connection = await live();
      connection.send({
        type: "heartbeat",
        position: "e2:9",
        server_time: new Date().toISOString(),
      });
      await once(client, "heartbeat");
      connection.cut();
      assert.equal((await gateway.accept()).url.searchParams.get("since"), "e2:9");
    });

    test("a message sent while disconnected goes out once the connection is there", async () => {
      newClient().connect();
      const sent = client.sendMessage({ threadId: "t1", content: "Hi", agent: "docs" });
      const connection = (await gateway.accept()).establish();
      const frame = await connection.next("user_message");
      assert.deepEqual([frame.thread_id, frame.content, frame.agent], ["t1", "Hi", "docs"]);
      connection.send({ type: "ack", id: frame.id, run_id: "run_9", duplicate: false });
      assert.equal((await sent).run_id, "run_9");
    });

    test("a message without its ack is sent again with the same id", async () => {
      const connection = await live();
      const sent = client.sendMessage({ threadId: "t1", content: "Hi", id: "m_1" });
      assert.equal((await connection.next("user_message")).id, "m_1");
      connection.cut();
      const again = (await gateway.accept()).establish();
      assert.equal((await again.next("user_message")).id, "m_1");
      again.send({ type: "ack", id: "m_1", run_id: "run_1", duplicate: true });
      assert.equal((await sent).duplicate, true);
      assert.equal(client.pending, 0);
    });

    test("sending the same id twice is one message", async () => {
      const connection = await live();
      const first = client.sendMessage({ threadId: "t1", content: "Hi", id: "m_1" });
      const second = client.sendMessage({ threadId: "t1", content: "Hi", id: "m_1" });
      const frame = await connection.next("user_message");
      connection.send({ type: "ack", id: frame.id, run_id: "run_1", duplicate: false });
      assert.deepEqual(await first, await second);
      assert.equal(connection.received.length, 0);
    });

    test("a refusal carries code and guidance", async () => {
      const connection = await live();
      const refused = assert.rejects(client.cancel("run_1"), {
        name: "RelayError",
        code: "unknown_run",
        recoverySuggestions: ["Look at the list."],
      });
      const { id } = await connection.next("cancel");
      connection.send({
        type: "error",
        id,
        code: "unknown_run",
        message: "No.",
        retryable: false,
        recovery_suggestions: ["Look at the list."],
      });
      await refused;
    });

    test("while Redis is away a command waits and is sent again", async () => {
      const connection = await live({}, { random: () => 0 });
      const sent = client.sendMessage({ threadId: "t1", content: "Hi" });
      const { id } = await connection.next("user_message");
      connection.send({
        type: "error",
        id,
        code: "unavailable",
        message: "Redis is away.",
        retryable: true,
        retry_after_ms: 20,
      });
      assert.equal((await connection.next("user_message")).id, id);
      connection.send({ type: "ack", id, run_id: "run_1", duplicate: false });
      assert.equal((await sent).run_id, "run_1");
    });

    test("an error that names no command is told as such", async () => {
      const connection = await live();
      const refused = once(client, "refused");
      connection.send({ type: "error", code: "invalid_json", message: "Bad.", retryable: false });
      assert.equal((await refused)[0].detail.code, "invalid_json");
    });

    test("answers input requests, or declines them", async () => {
      const connection = await live();
      const answered = client.answerInput("run_1", "req_1", { choice: 2 });
      const frame = await connection.next("input_response");
      assert.deepEqual(
        [frame.run_id, frame.request_id, frame.value, frame.denied],
        ["run_1", "req_1", { choice: 2 }, undefined],
      );
      connection.send({ type: "ack", id: frame.id });
      await answered;
      const denied = client.denyInput("run_1", "req_1");
      const denial = await connection.next("input_response");
      assert.deepEqual([denial.denied, "value" in denial], [true, false]);
      connection.send({ type: "ack", id: denial.id });
      await denied;
    });

    test("a ping is not sent again, and not left hanging", async () => {
      const connection = await live();
      const ping = client.ping();
      const { id } = await connection.next("ping");
      connection.send({ type: "pong", id, position: "e1:4" });
      assert.ok((await ping) >= 0);
      assert.equal(client.position, "e1:4");
      const lost = assert.rejects(client.ping(), { code: "not_connected" });
      await connection.next("ping");
      connection.cut();
      await lost;
    });

    for (const code of [4401, 4403, 1008]) {
      test(`close code ${code} stops it`, async () => {
        const connection = await live();
        const pending = assert.rejects(client.sendMessage({ threadId: "t1", content: "Hi" }), {
          code: "not_connected",
        });
        await connection.next("user_message");
        connection.close(code, "because");
        assert.deepEqual((({ code: seen, reason }) => ({ seen, reason }))(await reach("stopped")), {
          seen: code,
          reason: "because",
        });
        await pending;
        await assert.rejects(client.sendMessage({ threadId: "t1", content: "Hi" }), {
          code: "not_connected",
        });
        assert.equal(gateway.connections.length, 1);
      });
    }

    for (const code of [1001, 1011, 1012, 4408, 4410, 4429]) {
      test(`close code ${code} makes it come back`, async () => {
        const connection = await live();
        const again = gateway.accept();
        connection.close(code);
        assert.equal((await again).url.searchParams.get("since"), "e1:0");
      });
    }

    test("after it was stopped, a new token connects it where it was", async () => {
      const connection = await live();
      connection.send({ type: "heartbeat", position: "e1:7" });
      connection.close(4401, "token expired");
      await reach("stopped");
      client.connect("d.e.f");
      const again = await gateway.accept();
      assert.deepEqual(again.protocols, ["relay.v1", "bearer.d.e.f"]);
      assert.equal(again.url.searchParams.get("since"), "e1:7");
    });

    test("a refused upgrade is explained by the ticket endpoint: 401 stops it", async () => {
      gateway.refusal = {
        status: 401,
        body: { title: "Unauthorized", detail: "The token has expired." },
      };
      newClient().connect();
      const { code, reason } = await reach("stopped");
      assert.deepEqual([code, reason], [401, "The token has expired."]);
      const [{ path, method, headers }] = gateway.ticketRequests;
      assert.deepEqual(
        [path, method, headers.authorization],
        ["/v1/tickets?since=active&client_id=tab-1", "POST", "Bearer a.b.c"],
      );
      assert.equal(gateway.ticketRequests.length, 1);
    });

    test("the ticket endpoint is asked as the upgrade was: a device's own place is no other's", async () => {
      const connection = await live({}, { clientId: "tab 1 & 2" });
      connection.send({ type: "heartbeat", position: "e1:7" });
      await once(client, "heartbeat");
      gateway.refusal = { status: 403, body: { title: "Forbidden" } };
      connection.cut();
      await reach("stopped");
      const { path } = gateway.ticketRequests[0];
      const { pathname, searchParams } = new URL(path, gateway.url);
      assert.equal(pathname, "/v1/tickets");
      assert.deepEqual(
        [...searchParams],
        [
          ["since", "e1:7"],
          ["client_id", "tab 1 & 2"],
        ],
      );
    });

    test("403 stops it", async () => {
      gateway.refusal = { status: 403, body: { title: "Forbidden" } };
      newClient().connect();
      assert.equal((await reach("stopped")).reason, "Forbidden");
    });

    for (const status of [429, 503]) {
      test(`${status} is waited for as long as the gateway says`, async () => {
        gateway.refusal = { status, headers: { "Retry-After": "1" }, body: { detail: "Later." } };
        newClient().connect();
        await once(gateway, "ticket");
        const refusedAt = performance.now();
        gateway.refusal = null;
        await gateway.accept();
        assert.ok(performance.now() - refusedAt >= 950);
        const { reason, retryAt } = states.findLast((detail) => detail.retryAt !== null);
        assert.equal(reason, "Later.");
        assert.ok(retryAt > 0);
      });
    }

    test("a gateway that is not there is tried again", async () => {
      const { url } = gateway;
      await gateway.stop();
      newClient({ url, random: () => 0.05 }).connect();
      while (states.filter(({ retryAt }) => retryAt !== null).length < 3)
        await once(client, "state");
      assert.match(
        states.findLast(({ state }) => state === "reconnecting").reason,
        /^The gateway could not be reached\.$/,
      );
    });

    test("a malformed token stops it instead of throwing", () => {
      newClient({ token: "not a token" }).connect();
      assert.equal(client.state, "stopped");
    });

    test("a reconnect frame is obeyed: when, and that it is a drain", async () => {
      const connection = await live();
      connection.send({ type: "reconnect", after_ms: 400, reason: "restarting" });
      connection.close(1012, "drain");
      const closedAt = performance.now();
      await gateway.accept();
      const waitedMs = performance.now() - closedAt;
      assert.ok(waitedMs >= 350 && waitedMs < 1_500, `waited ${waitedMs} ms`);
      assert.equal(states.findLast(({ state }) => state === "reconnecting").reason, "restarting");
    });

    test("a gateway that announces a drain and never closes is left all the same", async () => {
      const connection = await live();
      const again = gateway.accept();
      connection.send({ type: "reconnect", after_ms: 50, reason: "restarting" });
      await again;
    });

    test("silence for two and a half heartbeats is a dead connection", async () => {
      const connection = await live({ heartbeat_ms: 80 });
      const again = gateway.accept();
      for (let beat = 0; beat < 4; beat += 1) {
        await new Promise((resolve) => setTimeout(resolve, 80));
        connection.send({ type: "heartbeat", position: "e1:0" });
      }
      assert.equal(client.state, "live");
      const silentAt = performance.now();
      await again;
      assert.ok(performance.now() - silentAt >= 180);
      assert.equal(
        states.findLast(({ state }) => state === "reconnecting").reason,
        "The gateway went silent.",
      );
    });

    test("a hole makes it read again from before the hole", async () => {
      const connection = await live();
      const [queued, started, thinking, ...rest] = new History().exampleRun();
      connection.send(queued);
      const again = gateway.accept();
      connection.send(thinking);
      const second = (await again).establish({ position: "e1:1" });
      assert.equal(second.url.searchParams.get("since"), "e1:1");
      for (const event of [started, thinking, ...rest]) second.send(event);
      while (client.store.runs.get("run_1").status !== "completed") await once(client, "event");
      assert.equal(client.store.runs.get("run_1").hasHole, false);
    });

    test("a reset drops the runs, and the next connection starts from it", async () => {
      const connection = await live();
      connection.send(new History().lifecycle("agent_queued", { content: "x" }));
      connection.send({ type: "reset", position: "e9:40", reason: "history was cut", runs: [] });
      await once(client, "reset");
      assert.equal(client.store.runs.size, 0);
      connection.cut();
      assert.equal((await gateway.accept()).url.searchParams.get("since"), "e9:40");
    });

    test("degraded is shown until it ends", async () => {
      const connection = await live();
      connection.send({
        type: "degraded",
        reason: "Redis does not answer.",
        since: new Date().toISOString(),
      });
      assert.equal((await reach("degraded")).reason, "Redis does not answer.");
      connection.send({ type: "degraded", ended: true });
      await reach("live");
    });

    test("an expiring token is announced, and a new one is used at once and later", async () => {
      const connection = await live();
      const announced = once(client, "token_expiring");
      connection.send({ type: "token_expiring", expires_at: "2026-11-22T14:00:00.000Z" });
      await announced;
      const refreshed = client.refreshToken("d.e.f");
      const { id, token } = await connection.next("refresh_token");
      assert.equal(token, "d.e.f");
      connection.send({ type: "ack", id, expires_at: "2026-11-22T15:00:00.000Z" });
      await refreshed;
      connection.cut();
      assert.deepEqual((await gateway.accept()).protocols, ["relay.v1", "bearer.d.e.f"]);
    });

    test("runs of a reloaded page can be stopped before any event comes", async () => {
      const connection = await live({
        runs: [
          {
            run_id: "run_7",
            thread_id: "t",
            agent: "docs",
            status: "running",
            attempt: 1,
            first_offset: 3,
            open_tools: [],
            open_inputs: [],
            cancel_requested: false,
          },
        ],
      });
      const [run] = client.store.active();
      const stopped = client.cancel(run.runId, "enough");
      const frame = await connection.next("cancel");
      assert.deepEqual([frame.run_id, frame.reason], ["run_7", "enough"]);
      connection.send({ type: "ack", id: frame.id, run_id: "run_7", status: "running" });
      await stopped;
    });

    test("a closed client stays closed and lets the process end", async () => {
      const connection = await live();
      const closed = once(connection, "closed");
      client.close();
      await closed;
      assert.equal(client.state, "closed");
      assert.equal(gateway.connections.length, 1);
    });
  });
}
