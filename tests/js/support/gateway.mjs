/** A gateway's wire without a gateway: real HTTP and WebSocket on a real port, scripted by the test. */

import { createHash } from "node:crypto";
import { EventEmitter, once } from "node:events";
import { createServer } from "node:http";

const MAGIC = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

export class ScriptedGateway extends EventEmitter {
  /** Set to {status, headers?, body?} to refuse upgrades and tickets alike. */
  refusal = null;
  connections = [];
  ticketRequests = [];

  static async start() {
    const gateway = new ScriptedGateway();
    gateway.server = createServer((request, response) => gateway.#answer(request, response));
    gateway.server.on("upgrade", (request, socket) => gateway.#upgrade(request, socket));
    gateway.server.listen(0, "127.0.0.1");
    await once(gateway.server, "listening");
    gateway.url = `http://127.0.0.1:${gateway.server.address().port}/`;
    return gateway;
  }

  async stop() {
    for (const connection of this.connections) connection.socket.destroy();
    this.server.close();
    await once(this.server, "close");
  }

  /** Wait for the next connection. */
  async accept() {
    const [connection] = await once(this, "connection");
    return connection;
  }

  #answer(request, response) {
    this.ticketRequests.push({
      path: request.url,
      method: request.method,
      headers: request.headers,
    });
    this.emit("ticket");
    const {
      status = 200,
      headers = {},
      body = { ticket: "once", expires_in_s: 30 },
    } = this.refusal ?? {};
    response.writeHead(status, {
      "Content-Type": "application/json",
      Connection: "close",
      ...headers,
    });
    response.end(JSON.stringify(body));
  }

  #upgrade(request, socket) {
    socket.on("error", () => socket.destroy());
    if (this.refusal) {
      socket.end(
        `HTTP/1.1 ${this.refusal.status} Refused\r\nConnection: close\r\nContent-Length: 0\r\n\r\n`,
      );
      return;
    }
    const accept = createHash("sha1")
      .update(request.headers["sec-websocket-key"] + MAGIC)
      .digest("base64");
    socket.write(
      "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" +
        `Sec-WebSocket-Accept: ${accept}\r\nSec-WebSocket-Protocol: relay.v1\r\n\r\n`,
    );
    const connection = new Connection(request, socket);
    this.connections.push(connection);
    this.emit("connection", connection);
  }
}

class Connection extends EventEmitter {
  #buffer = Buffer.alloc(0);
  received = [];

  constructor(request, socket) {
    super();
    this.socket = socket;
    this.url = new URL(request.url, "http://gateway");
    this.protocols = request.headers["sec-websocket-protocol"].split(/,\s*/);
    socket.on("data", (bytes) => this.#read(bytes));
    socket.on("close", () => this.emit("closed"));
  }

  establish(fields = {}) {
    this.send({
      type: "connection_established",
      connection_id: "c1",
      user_id: "alice",
      node: "gateway-1",
      position: "e1:0",
      recovered: true,
      runs: [],
      agents: [{ name: "docs", description: "Answers" }],
      heartbeat_ms: 15_000,
      limits: { max_content_chars: 1000 },
      server_time: new Date().toISOString(),
      ...fields,
    });
    return this;
  }

  send(frame) {
    this.#write(0x1, Buffer.from(JSON.stringify(frame)));
  }

  close(code, reason = "") {
    const payload = Buffer.alloc(2 + Buffer.byteLength(reason));
    payload.writeUInt16BE(code);
    payload.write(reason, 2);
    this.#write(0x8, payload);
    this.socket.end();
  }

  /** The connection is cut without a word, as by a killed process. */
  cut() {
    this.socket.destroy();
  }

  /** Wait for the next frame of a type, also one that came already. */
  async next(type) {
    for (;;) {
      const index = this.received.findIndex((frame) => frame.type === type);
      if (index >= 0) return this.received.splice(index, 1)[0];
      await once(this, "frame");
    }
  }

  #write(opcode, payload) {
    const { length } = payload;
    let head;
    if (length < 126) head = Buffer.from([0x80 | opcode, length]);
    else if (length < 65_536) head = Buffer.from([0x80 | opcode, 126, length >> 8, length & 0xff]);
    else {
      head = Buffer.alloc(10);
      head.set([0x80 | opcode, 127]);
      head.writeBigUInt64BE(BigInt(length), 2);
    }
    this.socket.write(Buffer.concat([head, payload]));
  }

  #read(bytes) {
    this.#buffer = Buffer.concat([this.#buffer, bytes]);
    for (;;) {
      const buffer = this.#buffer;
      if (buffer.length < 2) return;
      const short = buffer[1] & 0x7f;
      const at = short === 126 ? 4 : short === 127 ? 10 : 2;
      if (buffer.length < at + 4) return;
      const length =
        short === 126
          ? buffer.readUInt16BE(2)
          : short === 127
            ? Number(buffer.readBigUInt64BE(2))
            : short;
      if (buffer.length < at + 4 + length) return;
      const mask = buffer.subarray(at, at + 4);
      const payload = Buffer.from(buffer.subarray(at + 4, at + 4 + length)).map(
        (byte, index) => byte ^ mask[index % 4],
      );
      this.#buffer = buffer.subarray(at + 4 + length);
      if ((buffer[0] & 0x0f) === 0x1) {
        this.received.push(JSON.parse(payload.toString()));
        this.emit("frame");
      } else if ((buffer[0] & 0x0f) === 0x8) {
        this.closeCode = payload.length >= 2 ? payload.readUInt16BE(0) : null;
        this.#write(0x8, payload.subarray(0, 2));
        this.socket.end();
      }
    }
  }
}
