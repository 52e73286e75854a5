/**
 * Client of the relay's WebSocket protocol (`relay.v1`), usable alone.
 *
 * Three parts, from pure to impure:
 * - `RunStore` turns events into the state of runs;
 * - `Inbox` turns frames into events that are each seen once and in order;
 * - `RelayClient` owns the socket, the timers and the commands under way.
 *
 * The first two know no clock, socket or browser.
 */

const PROTOCOL = "relay.v1";

/** Closed for good: the same token would be refused again. */
const FINAL_CLOSE_CODES = new Map([
  [1008, "The gateway closed this connection because of what it was sent."],
  [4401, "The token has expired or was revoked."],
  [4403, "This token may not connect here."],
]);

const TERMINAL_TYPES = new Set(["agent_completed", "agent_error", "agent_cancelled"]);
const TERMINAL_STATUSES = new Set(["completed", "error", "cancelled"]);

/* ---------------------------------------------------------------- text -- */

/** Count Unicode code points: the unit of `text_delta.position` (a string's `length` is UTF-16). */
export function codePointLength(text) {
  let count = text.length;
  for (let index = 0; index < text.length - 1; index += 1) {
    const unit = text.charCodeAt(index);
    if (unit < 0xd800 || unit > 0xdbff) continue;
    const next = text.charCodeAt(index + 1);
    if (next >= 0xdc00 && next <= 0xdfff) {
      count -= 1;
      index += 1;
    }
  }
  return count;
}

/** Give the code points from `start` up to `end` as a string. */
export function codePointSlice(text, start, end = Infinity) {
  let first = 0;
  let last = text.length;
  let point = 0;
  for (let index = 0; index <= text.length; point += 1) {
    if (point === start) first = index;
    if (point === end || index === text.length) {
      last = index;
      break;
    }
    index += text.codePointAt(index) > 0xffff ? 2 : 1;
  }
  return point < start ? "" : text.slice(first, last);
}

/**
 * A streamed message, built from pieces placed at their positions.
 *
 * Placing a piece twice changes nothing; what lies between two pieces that do
 * not touch is a visible hole until a later piece covers it.
 */
export class PlacedText {
  /** Disjoint pieces by rising start; one piece from 0 unless something is missing. */
  #pieces = [];

  get hasHole() {
    return this.#pieces.length > 1 || (this.#pieces.length === 1 && this.#pieces[0].start > 0);
  }

  /** Length in code points up to the end of the last piece. */
  get length() {
    const last = this.#pieces.at(-1);
    return last ? last.start + last.length : 0;
  }

  place(position, text) {
    const length = codePointLength(text);
    const last = this.#pieces.at(-1);
    if (last && last.start + last.length === position) {
      last.text += text;
      last.length += length;
      return;
    }
    if (length > 0) this.#merge({ start: position, length, text });
  }

  #merge(piece) {
    const before = [];
    const after = [];
    let { start, length, text } = piece;
    for (const other of this.#pieces) {
      const otherEnd = other.start + other.length;
      const end = start + length;
      if (otherEnd < start) before.push(other);
      else if (other.start > end) after.push(other);
      else {
        const head = other.start < start ? codePointSlice(other.text, 0, start - other.start) : "";
        const tail = otherEnd > end ? codePointSlice(other.text, end - other.start) : "";
        text = head + text + tail;
        start = Math.min(start, other.start);
        length = Math.max(end, otherEnd) - start;
      }
    }
    this.#pieces = [...before, { start, length, text }, ...after];
  }

  /** The text; `[…]` stands where a part of it is missing. */
  toString() {
    if (!this.hasHole) return this.#pieces.length === 0 ? "" : this.#pieces[0].text;
    const lead = this.#pieces[0].start > 0 ? "[…]" : "";
    return lead + this.#pieces.map((piece) => piece.text).join("[…]");
  }
}

/* ---------------------------------------------------------------- runs -- */

function newRun(runId, threadId, agent, attempt) {
  return {
    runId,
    threadId,
    agent,
    /** The run that asked for this one, for a sub-agent. */
    parentRunId: null,
    attempt,
    status: "queued",
    /** First and last `seq` applied; `isComplete` says that none between 1 and the last is missing. */
    firstSeq: 0,
    lastSeq: 0,
    hasHole: false,
    firstOffset: 0,
    request: null,
    queuedAt: null,
    startedAt: null,
    endedAt: null,
    /** When the last lifecycle event happened. */
    lastEventAt: null,
    items: [],
    messages: [],
    progress: null,
    isStalled: false,
    cancelRequested: null,
    result: undefined,
    summary: null,
    usage: null,
    durationMs: null,
    error: null,
    cancelled: null,
    /** Known from a list of runs only: its events have not been seen. */
    isOutline: false,
    /** Rises with every change, so that a view can skip what it has drawn. */
    version: 0,
  };
}

/** True once a run has ended. */
export function isEnded(run) {
  return TERMINAL_STATUSES.has(run.status);
}

/** True where every lifecycle event from the first to the last known one was seen. */
export function isUnbroken(run) {
  return run.firstSeq === 1 && !run.hasHole;
}

/** The text of the current attempt, all messages joined. */
export function textOf(run) {
  return run.messages.map((message) => message.text.toString()).join("");
}

/** Tools that have started and not completed in the current attempt. */
export function openTools(run) {
  return run.items.filter((item) => item.type === "tool_executing" && !item.completed);
}

/** Input requests that still wait for an answer. */
export function openInputs(run) {
  return run.items.filter((item) => item.type === "input_requested" && !item.resolved);
}

function addItem(run, event, fields) {
  const item = {
    type: event.type,
    seq: event.seq ?? null,
    attempt: event.attempt ?? run.attempt,
    at: event.timestamp ?? null,
    note: event.data?.message ?? null,
    isSuperseded: false,
    version: 0,
    ...fields,
  };
  run.items.push(item);
  return item;
}

function closeOpenItems(run, event, outcome) {
  // The writer of a terminal closes them first; this is for runs whose
  // history begins in the middle, so that nothing seems to go on for ever.
  for (const item of openTools(run)) {
    item.completed = { seq: null, at: event.timestamp, status: outcome, durationMs: null };
    item.version += 1;
  }
  for (const item of openInputs(run)) {
    item.resolved = { seq: null, at: event.timestamp, outcome: "cancelled", by: null };
    item.version += 1;
  }
}

function findItem(run, type, key, value) {
  return run.items.findLast((item) => item.type === type && item[key] === value);
}

/** Add an item, or fill in the one that an outline of the run has put in its place. */
function placeItem(run, event, key, fields) {
  const outlined = findItem(run, event.type, key, fields[key]);
  if (!outlined || outlined.seq !== null || outlined.completed || outlined.resolved) {
    return addItem(run, event, fields);
  }
  Object.assign(outlined, fields, { seq: event.seq ?? null, at: event.timestamp ?? null });
  outlined.version += 1;
  return outlined;
}

function end(run, event, status) {
  closeOpenItems(run, event, status === "error" ? "error" : "cancelled");
  run.status = status;
  run.endedAt = event.timestamp;
  run.durationMs = event.data.duration_ms ?? null;
  run.isStalled = false;
}

const APPLY = {
  agent_queued(run, event, data) {
    run.status = "queued";
    run.queuedAt = event.timestamp;
    run.request = {
      messageId: data.message_id ?? null,
      content: data.content ?? "",
      metadata: data.metadata ?? null,
    };
    run.parentRunId = data.metadata?.parent_run_id ?? null;
    addItem(run, event, {});
  },
  agent_started(run, event, data) {
    run.status = "running";
    run.startedAt ??= event.timestamp;
    addItem(run, event, { model: data.model ?? null });
  },
  agent_thinking(run, event, data) {
    run.status = "running";
    run.progress = {
      step: data.step ?? null,
      totalSteps: data.total_steps ?? null,
      percentage: data.progress_percentage ?? null,
      remainingMs: data.estimated_remaining_ms ?? null,
    };
    addItem(run, event, { thought: data.thought ?? "", progress: run.progress });
  },
  tool_executing(run, event, data) {
    run.status = openInputs(run).length > 0 ? "waiting" : "running";
    placeItem(run, event, "toolCallId", {
      toolCallId: data.tool_call_id,
      toolName: data.tool_name,
      purpose: data.purpose ?? null,
      parameters: data.parameters ?? null,
      estimatedDurationMs: data.estimated_duration_ms ?? null,
      progress: null,
      completed: null,
    });
  },
  tool_completed(run, event, data) {
    const item =
      findItem(run, "tool_executing", "toolCallId", data.tool_call_id) ??
      addItem(
        run,
        { ...event, type: "tool_executing", seq: null },
        {
          toolCallId: data.tool_call_id,
          toolName: data.tool_name,
          purpose: null,
          parameters: null,
          estimatedDurationMs: null,
          progress: null,
        },
      );
    item.completed = {
      seq: event.seq,
      at: event.timestamp,
      status: data.status,
      result: data.result,
      error: data.error,
      durationMs: data.duration_ms ?? null,
      note: data.message ?? null,
    };
    item.version += 1;
  },
  tool_progress(run, event, data) {
    const item = findItem(run, "tool_executing", "toolCallId", data.tool_call_id);
    if (!item || item.completed) return;
    item.progress = { percentage: data.progress_percentage ?? null, note: data.note ?? null };
    item.version += 1;
  },
  input_requested(run, event, data) {
    run.status = "waiting";
    placeItem(run, event, "requestId", {
      requestId: data.request_id,
      prompt: data.prompt ?? "",
      kind: data.kind ?? "text",
      schema: data.schema ?? null,
      expiresAt: data.expires_at ?? null,
      resolved: null,
    });
  },
  input_resolved(run, event, data) {
    const item = findItem(run, "input_requested", "requestId", data.request_id);
    if (item) {
      item.resolved = {
        seq: event.seq,
        at: event.timestamp,
        outcome: data.outcome,
        value: data.value,
        by: data.by ?? null,
      };
      item.version += 1;
    }
    run.status = openInputs(run).length > 0 ? "waiting" : "running";
  },
  agent_stalled(run, event, data) {
    run.isStalled = true;
    addItem(run, event, { idleMs: data.idle_ms ?? null, lastEvent: data.last_event ?? null });
  },
  agent_retrying(run, event, data) {
    closeOpenItems(run, event, "error");
    for (const item of run.items) {
      if (item.isSuperseded || item.type === "agent_queued") continue;
      item.isSuperseded = true;
      item.version += 1;
    }
    run.status = "retrying";
    run.messages = [];
    run.progress = null;
    // Whether the event names the attempt that failed or the one to come, what
    // follows is newer than anything seen.
    run.attempt = Math.max(run.attempt + 1, data.attempt ?? 0);
    addItem(run, event, {
      nextAttempt: run.attempt,
      reason: data.reason ?? null,
      delayMs: data.delay_ms ?? null,
    });
  },
  cancel_requested(run, event, data) {
    run.cancelRequested = { by: data.by ?? null, reason: data.reason ?? null };
    addItem(run, event, { by: data.by ?? null, reason: data.reason ?? null });
  },
  custom(run, event, data) {
    addItem(run, event, { name: data.name, value: data.value });
  },
  agent_completed(run, event, data) {
    end(run, event, "completed");
    run.result = data.result;
    run.summary = data.summary ?? null;
    run.usage = data.usage ?? null;
    addItem(run, event, { durationMs: run.durationMs, usage: run.usage });
  },
  agent_error(run, event, data) {
    end(run, event, "error");
    run.error = {
      code: data.code,
      message: data.error_message ?? "",
      isRecoverable: data.is_recoverable ?? false,
      recoverySuggestions: data.recovery_suggestions ?? [],
      retryAfterMs: data.retry_after_ms ?? null,
      supportId: data.support_id ?? null,
    };
    addItem(run, event, { error: run.error });
  },
  agent_cancelled(run, event, data) {
    end(run, event, "cancelled");
    run.cancelled = { by: data.by ?? null, reason: data.reason ?? null };
    addItem(run, event, { by: run.cancelled.by, reason: run.cancelled.reason });
  },
  text_delta(run, event, data) {
    let message = run.messages.findLast((known) => known.messageId === data.message_id);
    if (!message) {
      message = { messageId: data.message_id, attempt: event.attempt, text: new PlacedText() };
      // Resumed text comes as one piece with its last piece's time. That writing began when the
      // event before it happened is known to every tab, so all of them show the same.
      const at = run.lastEventAt ?? event.timestamp;
      message.item = addItem(run, event, { messageId: data.message_id, at, lastAt: null });
      run.messages.push(message);
    }
    message.text.place(data.position, data.text);
    message.item.lastAt = event.timestamp ?? message.item.lastAt;
    message.item.characters = message.text.length;
    message.item.version += 1;
    if (run.status === "queued" || run.status === "retrying") run.status = "running";
  },
};

/**
 * Apply one event to a run, in place.
 *
 * Applying an event a second time changes nothing; an event of a superseded
 * attempt, or one after the terminal event, changes nothing either.
 *
 * @returns {boolean} Whether the run changed.
 */
export function applyEvent(run, event) {
  const apply = APPLY[event.type];
  if (!apply || isEnded(run)) return false;
  if (event.seq != null) {
    if (event.seq <= run.lastSeq) return false;
    if (run.lastSeq === 0) run.firstSeq = event.seq;
    else if (event.seq > run.lastSeq + 1) run.hasHole = true;
    run.lastSeq = event.seq;
    run.lastEventAt = event.timestamp;
  } else if (event.attempt < run.attempt) {
    return false;
  }
  if (event.attempt > run.attempt) run.attempt = event.attempt;
  if (run.isStalled && event.type !== "agent_stalled") run.isStalled = false;
  run.firstOffset ||= event.offset;
  apply(run, event, event.data ?? {});
  run.version += 1;
  return true;
}

/** More than a gateway retains for one user; a page that stays open for weeks must not grow. */
const MAX_RUNS = 2_000;

/** The runs of one user, as far as events tell. */
export class RunStore {
  /** @type {Map<string, object>} run id → run */
  runs = new Map();

  /** Apply an event; gives the run that changed, or `null`. */
  apply(event) {
    if (!event.run_id) return null;
    let run = this.runs.get(event.run_id);
    // An outline gives way to the events themselves once they come from the start.
    if (!run || (run.isOutline && event.seq === 1)) {
      run = newRun(event.run_id, event.thread_id, event.agent, event.attempt ?? 1);
      this.runs.set(event.run_id, run);
    }
    const hasChanged = applyEvent(run, event);
    if (hasChanged && isEnded(run)) this.#forgetOldRuns();
    return hasChanged ? run : null;
  }

  #forgetOldRuns() {
    let surplus = this.runs.size - MAX_RUNS;
    for (const [runId, run] of this.runs) {
      if (surplus <= 0) break;
      if (isEnded(run) && this.runs.delete(runId)) surplus -= 1;
    }
  }

  /** Take over the runs of a `connection_established` or `reset` frame that are not known yet. */
  outline(runs) {
    for (const known of runs) {
      if (this.runs.has(known.run_id)) continue;
      const run = newRun(known.run_id, known.thread_id, known.agent, known.attempt ?? 1);
      run.isOutline = true;
      run.status = known.status;
      run.parentRunId = known.parent_run_id ?? null;
      run.firstOffset = known.first_offset ?? 0;
      if (known.cancel_requested) run.cancelRequested = { by: null, reason: null };
      for (const tool of known.open_tools ?? []) {
        APPLY.tool_executing(run, { type: "tool_executing" }, tool);
      }
      for (const input of known.open_inputs ?? []) {
        APPLY.input_requested(run, { type: "input_requested" }, input);
      }
      run.status = known.status;
      this.runs.set(run.runId, run);
    }
  }

  /** Forget everything, then start from the runs that a `reset` frame lists. */
  reset(runs = []) {
    this.runs.clear();
    this.outline(runs);
  }

  /** The runs of a thread in the order of their first event. */
  ofThread(threadId) {
    return [...this.runs.values()]
      .filter((run) => run.threadId === threadId)
      .sort((a, b) => a.firstOffset - b.firstOffset);
  }

  /** The runs that have not ended, oldest first. */
  active() {
    return [...this.runs.values()]
      .filter((run) => !isEnded(run))
      .sort((a, b) => a.firstOffset - b.firstOffset);
  }
}

/* --------------------------------------------------------------- inbox -- */

/** Read `epoch:offset`; `null` for anything else. */
export function parsePosition(text) {
  if (typeof text !== "string") return null;
  const colon = text.lastIndexOf(":");
  const offset = Number(text.slice(colon + 1));
  if (colon < 1 || !/^\d+$/.test(text.slice(colon + 1)) || !Number.isSafeInteger(offset))
    return null;
  return { epoch: text.slice(0, colon), offset };
}

const MAX_ENDED_TRACKS = 2_000;

/**
 * Decides what each frame means for the position and for the order of events.
 *
 * `receive` takes one parsed frame and returns what is to be done, in order:
 * `{kind: "event", event}`, `{kind: "gap", ...}` (do not go on: reconnect from
 * `position`), `{kind: "lost", ...}` (a gap that reconnecting did not fill) and
 * `{kind: "control", frame}` for every other frame.
 */
export class Inbox {
  /** @type {{epoch: string, offset: number} | null} where to resume */
  position = null;

  /** run id → {seq, fromStart, ended, ends: message → code points seen} */
  #tracks = new Map();
  #gapsSeen = new Set();
  /** offset → parts of an event that is still arriving */
  #assembling = new Map();
  /** Whole events that came while one of a lower offset was still arriving. */
  #held = [];

  /** `since` for the next connection, or `null` if there is no position yet. */
  get since() {
    return this.position && `${this.position.epoch}:${this.position.offset}`;
  }

  /** Forget what was half received: a new connection sends it again. */
  disconnected() {
    this.#assembling.clear();
    this.#held = [];
  }

  receive(frame) {
    switch (frame.type) {
      case "connection_established":
        this.disconnected();
        // Not recovered: a reset follows. Should the connection end before it has come, the next
        // one must be asked about the old position again.
        if (frame.recovered !== false || !this.position) {
          this.position = parsePosition(frame.position) ?? this.position;
        }
        return [{ kind: "control", frame }];
      case "reset":
        this.disconnected();
        this.#tracks.clear();
        this.#gapsSeen.clear();
        this.position = parsePosition(frame.position);
        return [{ kind: "control", frame }];
      case "heartbeat":
      case "pong":
        this.#follow(parsePosition(frame.position));
        return [{ kind: "control", frame }];
      case "event_part":
        return this.#part(frame);
      default:
        if (typeof frame.offset !== "number") return [{ kind: "control", frame }];
        return this.#event(frame);
    }
  }

  #follow(position) {
    if (!position) return;
    if (this.position && position.epoch !== this.position.epoch) {
      // The same history under a new name. While an event is still arriving the
      // gateway's offset may count it already; ours must not.
      const offset = this.#assembling.size > 0 ? this.position.offset : position.offset;
      this.position = { epoch: position.epoch, offset };
    } else if (this.#assembling.size === 0 && position.offset > (this.position?.offset ?? -1)) {
      this.position = position;
    }
  }

  #part({ offset, index, total, text }) {
    if (offset <= (this.position?.offset ?? -1)) return [];
    let parts = this.#assembling.get(offset);
    // A part that is there already: the event is sent anew from its beginning, and after a rewind
    // it may be another one.
    if (!parts || parts.texts[index] !== undefined) {
      parts = { texts: new Array(total), missing: total };
      this.#assembling.set(offset, parts);
    }
    parts.texts[index] = text;
    parts.missing -= 1;
    if (parts.missing > 0) return [];
    this.#assembling.delete(offset);
    return this.#event({ ...JSON.parse(parts.texts.join("")), offset });
  }

  #event(event) {
    if (this.#assembling.size === 0 && this.#held.length === 0) return this.#inOrder(event);
    this.#held.push(event);
    this.#held.sort((a, b) => a.offset - b.offset);
    const arriving = Math.min(...this.#assembling.keys());
    const effects = [];
    while (this.#held.length > 0 && this.#held[0].offset < arriving) {
      effects.push(...this.#inOrder(this.#held.shift()));
      if (effects.at(-1)?.kind === "gap") break;
    }
    return effects;
  }

  #inOrder(event) {
    if (event.offset <= (this.position?.offset ?? -1)) return [];
    const hole = this.#holeBefore(event);
    const effects = [];
    if (hole) {
      const key = `${hole.runId} ${hole.messageId ?? ""} ${hole.expected}`;
      // Once is enough: if history has the hole as well, waiting would not help.
      if (!this.#gapsSeen.has(key)) {
        this.#gapsSeen.add(key);
        return [{ kind: "gap", ...hole, position: this.since }];
      }
      effects.push({ kind: "lost", ...hole });
    }
    this.#advance(event);
    effects.push({ kind: "event", event });
    return effects;
  }

  #holeBefore(event) {
    const track = this.#tracks.get(event.run_id);
    if (!track) return null;
    if (event.seq != null) {
      if (event.seq <= track.seq + 1 || track.seq === 0) return null;
      return { runId: event.run_id, expected: track.seq + 1, received: event.seq };
    }
    if (event.type !== "text_delta") return null;
    const { message_id: messageId, position } = event.data;
    // Only of a run seen from its first event is it known that a message began at 0.
    const known = track.ends.get(`${event.attempt} ${messageId}`) ?? (track.fromStart ? 0 : null);
    if (known === null || position <= known) return null;
    return { runId: event.run_id, messageId, expected: known, received: position };
  }

  #advance(event) {
    this.position = { epoch: this.position?.epoch ?? "", offset: event.offset };
    if (!event.run_id) return;
    let track = this.#tracks.get(event.run_id);
    if (!track) {
      track = { seq: 0, fromStart: event.seq === 1, ended: false, ends: new Map() };
      this.#tracks.set(event.run_id, track);
    }
    if (event.seq != null) track.seq = Math.max(track.seq, event.seq);
    if (event.type === "text_delta") {
      const key = `${event.attempt} ${event.data.message_id}`;
      const end = event.data.position + codePointLength(event.data.text);
      track.ends.set(key, Math.max(track.ends.get(key) ?? 0, end));
    }
    if (TERMINAL_TYPES.has(event.type)) {
      track.ended = true;
      track.ends.clear();
      this.#forgetOldRuns();
    }
  }

  #forgetOldRuns() {
    if (this.#tracks.size <= MAX_ENDED_TRACKS) return;
    for (const [runId, track] of this.#tracks) {
      if (track.ended) this.#tracks.delete(runId);
      if (this.#tracks.size <= MAX_ENDED_TRACKS / 2) break;
    }
  }
}

/* -------------------------------------------------------------- client -- */

const FIRST_RETRY_MS = 300;
const BASE_RETRY_MS = 500;
const MAX_RETRY_MS = 20_000;
const OPEN_TIMEOUT_MS = 10_000;
/** A connection that lived this long was a good one: the next retry is a first one again. */
const SETTLED_MS = 1_000;
const SILENT_HEARTBEATS = 2.5;

/**
 * The wait before a connection attempt: the first within 300 ms, then full
 * jitter over a doubling window, up to 20 s.
 *
 * @param {number} retries Attempts since the last good connection.
 * @param {number} random In [0, 1).
 */
export function reconnectDelayMs(retries, random) {
  if (retries <= 0) return random * FIRST_RETRY_MS;
  return random * Math.min(MAX_RETRY_MS, BASE_RETRY_MS * 2 ** retries);
}

/** Read a `Retry-After` header: seconds or an HTTP date. `null` if it is neither. */
export function retryAfterMs(header, nowMs) {
  if (!header) return null;
  if (/^\s*\d+\s*$/.test(header)) return Number(header) * 1000;
  const date = Date.parse(header);
  return Number.isNaN(date) ? null : Math.max(0, date - nowMs);
}

/** A command that the gateway refused, or that can no longer be sent. */
export class RelayError extends Error {
  constructor(code, message, { retryable = false, recoverySuggestions = [] } = {}) {
    super(message);
    this.name = "RelayError";
    this.code = code;
    this.retryable = retryable;
    this.recoverySuggestions = recoverySuggestions;
  }
}

/** Give the address below which a gateway answers, from whatever form of it people have at hand. */
function baseAddress(url) {
  const base = new URL(url);
  base.protocol = base.protocol.replace("ws", "http");
  base.search = "";
  base.hash = "";
  // Without the slash at its end, the last part of the path would be no folder but a file in one.
  base.pathname = `${base.pathname.replace(/\/v1\/ws$/, "").replace(/\/+$/, "")}/`;
  return base;
}

/** A random id for messages, threads and clients; also where `crypto.randomUUID` needs HTTPS. */
export function randomId(prefix) {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return prefix + Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/**
 * One connection to the relay that heals itself.
 *
 * Dispatches `CustomEvent`s whose `detail` is:
 * - `state`: {state, node, reason, code, retryAt} — connecting, live, degraded, reconnecting, stopped, closed
 * - `event`: an event envelope, once each, in order, already applied to `store`
 * - `established`, `heartbeat`, `reset`, `token_expiring`, `notice`: the frame
 * - `gap`: a hole was seen, {runId, expected, received, isFilled}; `isFilled` is null while
 *   the client reconnects to fill it, false when history has the hole as well
 * - `refused`: a RelayError for a frame that named no command
 */
export class RelayClient extends EventTarget {
  state = "closed";
  node = null;
  userId = null;
  agents = [];
  limits = null;
  /** Add to `Date.now()` to have the gateway's clock. */
  clockSkewMs = 0;

  #base;
  #token;
  #clientId;
  #start;
  #WebSocket;
  #fetch;
  #random;
  #inbox = new Inbox();
  #socket = null;
  #generation = 0;
  #isEstablished = false;
  #establishedAt = 0;
  #retries = 0;
  #retryTimer = null;
  #openTimer = null;
  #silenceTimer = null;
  #lastFrameAt = 0;
  #heartbeatMs = 15_000;
  #drain = null;
  #degradedReason = null;
  /** id → {frame, resolve, reject, isSent, refusals}; in the order of the calls */
  #commands = new Map();

  /**
   * @param {object} options
   * @param {string|URL} options.url Where the gateway is, with the path prefix if it has one, e.g.
   *   `https://relay.example/` or `https://example.org/relay`; query and fragment do not count.
   * @param {string} options.token The user's JWT.
   * @param {string} [options.clientId] Names this tab or device; keep it over reloads.
   * @param {string} [options.since] Where to start: `active` (default), `now`, `0` or a position.
   * @param {RunStore} [options.store]
   */
  constructor({ url, token, clientId, since = "active", store = new RunStore(), ...seams }) {
    super();
    this.store = store;
    this.#base = baseAddress(url);
    this.#token = token;
    this.#clientId = clientId ?? randomId("c_");
    this.#start = since;
    this.#WebSocket = seams.WebSocket ?? globalThis.WebSocket;
    this.#fetch = seams.fetch ?? ((...request) => globalThis.fetch(...request));
    this.#random = seams.random ?? Math.random;
  }

  /** Where a new connection would resume, as `epoch:offset`, or `null` before the first. */
  get position() {
    return this.#inbox.since;
  }

  /** The commands that are not acknowledged yet. */
  get pending() {
    return this.#commands.size;
  }

  /** Open the connection; also after `stopped`, with a new token. */
  connect(token = this.#token) {
    this.#token = token;
    if (this.#socket) return;
    clearTimeout(this.#retryTimer);
    globalThis.addEventListener?.("online", this.#retryNow);
    globalThis.document?.addEventListener("visibilitychange", this.#retryNow);
    this.#open();
  }

  /** Close for good. Commands under way are rejected. */
  close() {
    this.#forgetSocket(1000, "closed by the page");
    this.#halt("closed", { reason: null });
  }

  /** While waiting to reconnect: try at once. */
  retryNow() {
    if (this.state === "reconnecting" && this.#retryTimer !== null) this.#open();
  }

  #retryNow = () => {
    if (globalThis.document?.visibilityState === "hidden") return;
    this.retryNow();
  };

  /* -- commands -- */

  /**
   * Ask an agent. While disconnected the message waits, and it is sent with the
   * same id until it is acknowledged: it makes one run, however often it is sent.
   */
  sendMessage({ threadId, content, agent, metadata, id = randomId("m_") }) {
    const frame = { type: "user_message", id, thread_id: threadId, content };
    if (agent) frame.agent = agent;
    if (metadata) frame.metadata = metadata;
    return this.#command(frame);
  }

  /** Ask for a run to be stopped; resolves when the request is recorded. */
  cancel(runId, reason) {
    const frame = { type: "cancel", id: randomId("x_"), run_id: runId };
    if (reason) frame.reason = reason;
    return this.#command(frame);
  }

  /** Answer an input request. */
  answerInput(runId, requestId, value) {
    const frame = { type: "input_response", id: randomId("i_"), run_id: runId };
    return this.#command({ ...frame, request_id: requestId, value });
  }

  /** Decline an input request. */
  denyInput(runId, requestId) {
    const frame = { type: "input_response", id: randomId("i_"), run_id: runId };
    return this.#command({ ...frame, request_id: requestId, denied: true });
  }

  /** Replace the token, on the open connection and for later ones. It must name the same user. */
  async refreshToken(token) {
    const ack = await this.#command({ type: "refresh_token", id: randomId("t_"), token });
    this.#token = token;
    return ack;
  }

  /** Measure a round trip to the gateway, in milliseconds. */
  async ping() {
    if (!this.#isEstablished) throw new RelayError("not_connected", "There is no connection.");
    const startedAt = performance.now();
    await this.#command({ type: "ping", id: randomId("p_") });
    return performance.now() - startedAt;
  }

  #command(frame) {
    if (this.state === "stopped" || this.state === "closed") {
      return Promise.reject(new RelayError("not_connected", "The connection is closed."));
    }
    const known = this.#commands.get(frame.id);
    if (known) return known.promise;
    const command = { frame, refusals: 0, timer: null };
    command.promise = new Promise((resolve, reject) => Object.assign(command, { resolve, reject }));
    this.#commands.set(frame.id, command);
    if (this.#isEstablished) this.#send(command);
    return command.promise;
  }

  #send(command) {
    command.timer = null;
    this.#socket.send(JSON.stringify(command.frame));
  }

  #settle(id, outcome, value) {
    const command = this.#commands.get(id);
    if (!command) return;
    clearTimeout(command.timer);
    this.#commands.delete(id);
    command[outcome](value);
  }

  #refuse(frame) {
    const error = new RelayError(frame.code, frame.message, {
      retryable: frame.retryable ?? false,
      recoverySuggestions: frame.recovery_suggestions ?? [],
    });
    const command = this.#commands.get(frame.id);
    if (!command) {
      this.#emit("refused", error);
    } else if (frame.code === "unavailable" && error.retryable) {
      // Redis is away: the command is not lost for that, it waits.
      command.refusals += 1;
      const waitMs =
        (frame.retry_after_ms ?? BASE_RETRY_MS) +
        reconnectDelayMs(command.refusals, this.#random());
      command.timer ??= setTimeout(() => this.#send(command), waitMs);
    } else {
      this.#settle(frame.id, "reject", error);
    }
  }

  /* -- the socket -- */

  #open() {
    clearTimeout(this.#retryTimer);
    this.#retryTimer = null;
    this.#drain = null;
    this.#degradedReason = null;
    const generation = ++this.#generation;
    this.#setState("connecting");
    const url = this.#address("v1/ws");
    url.protocol = url.protocol.replace("http", "ws");
    try {
      this.#socket = new this.#WebSocket(url, [PROTOCOL, `bearer.${this.#token}`]);
    } catch (error) {
      if (error.name !== "SyntaxError") throw error;
      this.#halt("stopped", { code: null, reason: "The token is not a valid one." });
      return;
    }
    const socket = this.#socket;
    let hasOpened = false;
    let hasEnded = false;
    const ended = (closed) => {
      if (hasEnded || generation !== this.#generation) return;
      hasEnded = true;
      this.#closed(closed, hasOpened);
    };
    socket.onopen = () => {
      hasOpened = true;
    };
    socket.onmessage = (message) => {
      if (generation === this.#generation) this.#receive(message.data);
    };
    socket.onclose = ended;
    // Node 20 reports a failed open as an error only; browsers follow it with a close.
    socket.onerror = () => hasOpened || ended({ code: 1006, reason: "" });
    this.#openTimer = setTimeout(() => {
      this.#forgetSocket(4000, "no answer");
      this.#retryAfter(this.#nextDelayMs(), "The gateway did not answer.");
    }, OPEN_TIMEOUT_MS);
  }

  #address(path) {
    const url = new URL(path, this.#base);
    url.searchParams.set("since", this.#inbox.since ?? this.#start);
    url.searchParams.set("client_id", this.#clientId);
    return url;
  }

  /** Leave the current socket: whatever it still says is not heard. */
  #forgetSocket(code, reason) {
    this.#generation += 1;
    clearTimeout(this.#openTimer);
    clearTimeout(this.#silenceTimer);
    this.#socket?.close(code, reason);
    this.#socket = null;
    this.#lost();
  }

  #lost() {
    clearTimeout(this.#openTimer);
    clearTimeout(this.#silenceTimer);
    clearTimeout(this.#drain?.timer);
    this.#socket = null;
    if (this.#isEstablished && Date.now() - this.#establishedAt >= SETTLED_MS) this.#retries = 0;
    this.#isEstablished = false;
    this.#inbox.disconnected();
    for (const [id, command] of this.#commands) {
      clearTimeout(command.timer);
      command.timer = null;
      if (command.frame.type === "ping") {
        this.#settle(id, "reject", new RelayError("not_connected", "The connection was lost."));
      }
    }
  }

  async #closed({ code, reason }, hasOpened) {
    const drain = this.#drain;
    const wasEstablished = this.#isEstablished;
    this.#lost();
    if (FINAL_CLOSE_CODES.has(code)) {
      this.#halt("stopped", { code, reason: reason || FINAL_CLOSE_CODES.get(code) });
    } else if (drain) {
      this.#retryAfter(Math.max(0, drain.until - Date.now()), drain.reason);
    } else if (hasOpened) {
      const why = wasEstablished
        ? "The connection was lost."
        : "The gateway closed the connection.";
      this.#retryAfter(this.#nextDelayMs(), reason || why);
    } else {
      await this.#askWhy();
    }
  }

  /** A browser hides the status of a failed upgrade; the same question asked by HTTP shows it. */
  async #askWhy() {
    const generation = this.#generation;
    this.#setState("reconnecting", { reason: "The gateway could not be reached." });
    let answer = null;
    let problem = {};
    try {
      answer = await this.#fetch(this.#address("v1/tickets"), {
        method: "POST",
        headers: { Authorization: `Bearer ${this.#token}` },
        signal: AbortSignal.timeout(5_000),
      });
      if (!answer.ok) problem = await answer.json();
    } catch (error) {
      // Not reachable by HTTP either, or an answer that is not the gateway's:
      // in both cases the status, if any, and the usual wait decide.
      problem = {
        detail: error.name === "TimeoutError" ? "The gateway did not answer in time." : undefined,
      };
    }
    if (generation !== this.#generation || this.state !== "reconnecting") return;
    const status = answer?.status ?? 0;
    if (status === 401 || status === 403) {
      const reason = problem.detail ?? problem.title ?? FINAL_CLOSE_CODES.get(4000 + status);
      this.#halt("stopped", { code: status, reason });
      return;
    }
    const wait =
      status === 429 || status === 503
        ? retryAfterMs(answer.headers.get("Retry-After"), Date.now())
        : null;
    const delayMs = this.#nextDelayMs();
    this.#retryAfter(wait === null ? delayMs : wait + delayMs * 0.2, problem.detail);
  }

  #nextDelayMs() {
    const delayMs = reconnectDelayMs(this.#retries, this.#random());
    this.#retries += 1;
    return delayMs;
  }

  #retryAfter(delayMs, reason = "The gateway could not be reached.") {
    this.#retryTimer = setTimeout(() => this.#open(), delayMs);
    this.#setState("reconnecting", { reason, retryAt: Date.now() + delayMs });
  }

  #halt(state, detail) {
    clearTimeout(this.#retryTimer);
    this.#retryTimer = null;
    globalThis.removeEventListener?.("online", this.#retryNow);
    globalThis.document?.removeEventListener("visibilitychange", this.#retryNow);
    this.#setState(state, detail);
    const reason = detail.reason ?? "The connection was closed.";
    for (const id of [...this.#commands.keys()]) {
      this.#settle(id, "reject", new RelayError("not_connected", reason));
    }
  }

  #watchSilence() {
    const limitMs = SILENT_HEARTBEATS * this.#heartbeatMs;
    this.#silenceTimer = setTimeout(
      () => {
        const leftMs = this.#lastFrameAt + limitMs - Date.now();
        if (leftMs > 0) return this.#watchSilence();
        this.#forgetSocket(4000, "no heartbeat");
        this.#retryAfter(this.#nextDelayMs(), "The gateway went silent.");
      },
      Math.max(50, this.#lastFrameAt + limitMs - Date.now()),
    );
  }

  /* -- frames -- */

  #receive(text) {
    this.#lastFrameAt = Date.now();
    for (const effect of this.#inbox.receive(JSON.parse(text))) this.#perform(effect);
  }

  #perform(effect) {
    if (effect.kind === "control") {
      this.#control(effect.frame);
    } else if (effect.kind === "event") {
      this.store.apply(effect.event);
      if (effect.event.type === "notice") this.#emit("notice", effect.event);
      this.#emit("event", effect.event);
    } else if (effect.kind === "lost") {
      this.#emit("gap", { ...effect, isFilled: false });
    } else {
      this.#forgetSocket(4000, "gap");
      this.#retryAfter(0, "Something was missing; reading it again.");
      this.#emit("gap", { ...effect, isFilled: null });
    }
  }

  #control(frame) {
    switch (frame.type) {
      case "connection_established":
        return this.#established(frame);
      case "heartbeat":
        this.#readClock(frame.server_time);
        return this.#emit("heartbeat", frame);
      case "ack":
      case "pong":
        return this.#settle(frame.id, "resolve", frame);
      case "error":
        return this.#refuse(frame);
      case "reset":
        this.store.reset(frame.runs);
        return this.#emit("reset", frame);
      case "degraded":
        this.#degradedReason = frame.ended ? null : (frame.reason ?? "The gateway is degraded.");
        return this.#showLive();
      case "reconnect":
        return this.#drained(frame);
      case "token_expiring":
        return this.#emit("token_expiring", frame);
      default:
        // A frame type of a later protocol version: not for this client.
        return undefined;
    }
  }

  #established(frame) {
    clearTimeout(this.#openTimer);
    this.#isEstablished = true;
    this.#establishedAt = Date.now();
    this.#heartbeatMs = frame.heartbeat_ms ?? this.#heartbeatMs;
    this.#readClock(frame.server_time);
    this.node = frame.node ?? null;
    this.userId = frame.user_id;
    this.agents = frame.agents ?? [];
    this.limits = frame.limits ?? null;
    this.store.outline(frame.runs ?? []);
    this.#watchSilence();
    this.#emit("established", frame);
    this.#showLive();
    for (const command of this.#commands.values()) {
      if (command.timer === null) this.#send(command);
    }
  }

  #readClock(serverTime) {
    const milliseconds = typeof serverTime === "number" ? serverTime : Date.parse(serverTime);
    if (!Number.isNaN(milliseconds)) this.clockSkewMs = milliseconds - Date.now();
  }

  #drained({ after_ms: afterMs = 0, reason }) {
    const why = reason ?? "The gateway is restarting.";
    this.#drain = {
      until: Date.now() + afterMs,
      reason: why,
      timer: setTimeout(() => {
        this.#forgetSocket(1000, "drain");
        this.#retryAfter(0, why);
      }, afterMs),
    };
  }

  #showLive() {
    if (!this.#isEstablished) return;
    if (this.#degradedReason) this.#setState("degraded", { reason: this.#degradedReason });
    else this.#setState("live");
  }

  #setState(state, { reason = null, code = null, retryAt = null } = {}) {
    this.state = state;
    this.#emit("state", { state, node: this.node, reason, code, retryAt });
  }

  #emit(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}
