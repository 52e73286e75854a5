/** Types of relay-client.js. Wire names are snake_case, names of this module camelCase. */

export type EventType =
  | "agent_queued"
  | "agent_started"
  | "agent_thinking"
  | "tool_executing"
  | "tool_completed"
  | "input_requested"
  | "input_resolved"
  | "agent_stalled"
  | "agent_retrying"
  | "cancel_requested"
  | "agent_completed"
  | "agent_error"
  | "agent_cancelled"
  | "custom"
  | "text_delta"
  | "tool_progress"
  | "notice";

/** An event as the gateway sends it. */
export interface RelayEvent {
  type: EventType;
  offset: number;
  /** Absent on a notice, as are the other run fields. */
  run_id?: string;
  /** Lifecycle events only: 1, 2, 3… within a run, over all its attempts. */
  seq?: number;
  attempt?: number;
  thread_id?: string;
  user_id: string;
  agent?: string;
  timestamp: string;
  data: Record<string, any>;
}

export interface RunOutline {
  run_id: string;
  thread_id: string;
  agent: string;
  /** The run that asked for this one, for a sub-agent. */
  parent_run_id: string | null;
  status: RunStatus;
  attempt: number;
  first_offset: number;
  open_tools: { tool_call_id: string; tool_name: string }[];
  open_inputs: {
    request_id: string;
    prompt: string;
    kind: InputKind;
    schema?: Record<string, any>;
    expires_at: string;
  }[];
  cancel_requested: boolean;
}

export type RunStatus =
  "queued" | "running" | "waiting" | "retrying" | "completed" | "error" | "cancelled";

export type InputKind = "approval" | "text" | "choice";

/* ---- text ---- */

export function codePointLength(text: string): number;
export function codePointSlice(text: string, start: number, end?: number): string;

export class PlacedText {
  readonly hasHole: boolean;
  readonly length: number;
  place(position: number, text: string): void;
  toString(): string;
}

/* ---- runs ---- */

export interface RunMessage {
  messageId: string;
  attempt: number;
  text: PlacedText;
  item: RunItem;
}

/** One entry of a run's timeline; the further fields depend on `type`. */
export interface RunItem {
  type: EventType;
  seq: number | null;
  attempt: number;
  at: string | null;
  /** `data.message`: a sentence for people. */
  note: string | null;
  isSuperseded: boolean;
  version: number;
  [field: string]: any;
}

export interface Run {
  runId: string;
  threadId: string;
  agent: string;
  /** The run that asked for this one, for a sub-agent. */
  parentRunId: string | null;
  attempt: number;
  status: RunStatus;
  firstSeq: number;
  lastSeq: number;
  hasHole: boolean;
  firstOffset: number;
  request: { messageId: string | null; content: string; metadata: unknown } | null;
  queuedAt: string | null;
  startedAt: string | null;
  endedAt: string | null;
  lastEventAt: string | null;
  items: RunItem[];
  /** Streamed messages of the current attempt. */
  messages: RunMessage[];
  progress: {
    step: number | null;
    totalSteps: number | null;
    percentage: number | null;
    remainingMs: number | null;
  } | null;
  isStalled: boolean;
  cancelRequested: { by: string | null; reason: string | null } | null;
  /** The whole answer, once `status` is `completed`. */
  result: unknown;
  summary: string | null;
  usage: unknown;
  durationMs: number | null;
  error: {
    code: string;
    message: string;
    isRecoverable: boolean;
    recoverySuggestions: string[];
    retryAfterMs: number | null;
    supportId: string | null;
  } | null;
  cancelled: { by: string | null; reason: string | null } | null;
  isOutline: boolean;
  version: number;
}

export function applyEvent(run: Run, event: RelayEvent): boolean;
export function isEnded(run: Run): boolean;
export function isUnbroken(run: Run): boolean;
export function textOf(run: Run): string;
export function openTools(run: Run): RunItem[];
export function openInputs(run: Run): RunItem[];

export class RunStore {
  runs: Map<string, Run>;
  apply(event: RelayEvent): Run | null;
  outline(runs: RunOutline[]): void;
  reset(runs?: RunOutline[]): void;
  ofThread(threadId: string): Run[];
  active(): Run[];
}

/* ---- frames ---- */

export interface Position {
  epoch: string;
  offset: number;
}

export type Frame = { type: string; [field: string]: any };

export interface Hole {
  runId: string;
  /** Set where text is missing; `expected` and `received` are then positions, otherwise `seq`s. */
  messageId?: string;
  expected: number;
  received: number;
}

export type Effect =
  | { kind: "event"; event: RelayEvent }
  | { kind: "control"; frame: Frame }
  | ({ kind: "gap"; position: string | null } & Hole)
  | ({ kind: "lost" } & Hole);

export function parsePosition(text: unknown): Position | null;

export class Inbox {
  position: Position | null;
  readonly since: string | null;
  disconnected(): void;
  receive(frame: Frame): Effect[];
}

/* ---- client ---- */

export function reconnectDelayMs(retries: number, random: number): number;
export function retryAfterMs(header: string | null, nowMs: number): number | null;
export function randomId(prefix: string): string;

export class RelayError extends Error {
  constructor(
    code: string,
    message: string,
    options?: { retryable?: boolean; recoverySuggestions?: string[] },
  );
  code: string;
  retryable: boolean;
  recoverySuggestions: string[];
}

export type ConnectionState =
  "connecting" | "live" | "degraded" | "reconnecting" | "stopped" | "closed";

export interface StateDetail {
  state: ConnectionState;
  node: string | null;
  /** Why, in a sentence, for every state but `connecting` and `live`. */
  reason: string | null;
  /** With `stopped`: the close code or HTTP status. */
  code: number | null;
  /** With `reconnecting`: when, in milliseconds since the epoch; null while that is being asked. */
  retryAt: number | null;
}

export interface RelayClientEventMap {
  state: CustomEvent<StateDetail>;
  event: CustomEvent<RelayEvent>;
  established: CustomEvent<Frame>;
  heartbeat: CustomEvent<Frame>;
  reset: CustomEvent<Frame>;
  token_expiring: CustomEvent<Frame>;
  notice: CustomEvent<RelayEvent>;
  gap: CustomEvent<Hole & { isFilled: false | null }>;
  refused: CustomEvent<RelayError>;
}

export interface RelayClientOptions {
  /**
   * Where the gateway is, with the path prefix if it has one: `https://example.org/relay`. A slash
   * at its end, query and fragment make no difference, nor does `wss:` for `https:`.
   */
  url: string | URL;
  token: string;
  /** Names this tab or device to the gateway; keep it over reloads. */
  clientId?: string;
  /** `active` (default), `now`, `0` or a position. */
  since?: string;
  store?: RunStore;
  /** Replacements where the platform lacks them, and for tests. */
  WebSocket?: typeof WebSocket;
  fetch?: typeof fetch;
  random?: () => number;
}

export class RelayClient extends EventTarget {
  constructor(options: RelayClientOptions);
  readonly store: RunStore;
  readonly state: ConnectionState;
  readonly node: string | null;
  readonly userId: string | null;
  readonly agents: { name: string; description: string }[];
  readonly limits: {
    max_frame_bytes: number;
    max_content_chars: number;
    max_connections: number;
    frames_per_second: number;
  } | null;
  readonly clockSkewMs: number;
  readonly position: string | null;
  readonly pending: number;
  connect(token?: string): void;
  close(): void;
  retryNow(): void;
  sendMessage(message: {
    threadId: string;
    content: string;
    agent?: string;
    metadata?: Record<string, unknown>;
    id?: string;
  }): Promise<{ type: "ack"; id: string; run_id: string; duplicate: boolean }>;
  cancel(runId: string, reason?: string): Promise<Frame>;
  answerInput(runId: string, requestId: string, value: unknown): Promise<Frame>;
  denyInput(runId: string, requestId: string): Promise<Frame>;
  refreshToken(token: string): Promise<Frame>;
  ping(): Promise<number>;
  addEventListener<T extends keyof RelayClientEventMap>(
    type: T,
    listener: (event: RelayClientEventMap[T]) => void,
    options?: boolean | AddEventListenerOptions,
  ): void;
  addEventListener(
    type: string,
    listener: EventListenerOrEventListenerObject | null,
    options?: boolean | AddEventListenerOptions,
  ): void;
  removeEventListener<T extends keyof RelayClientEventMap>(
    type: T,
    listener: (event: RelayClientEventMap[T]) => void,
    options?: boolean | EventListenerOptions,
  ): void;
  removeEventListener(
    type: string,
    listener: EventListenerOrEventListenerObject | null,
    options?: boolean | EventListenerOptions,
  ): void;
}
