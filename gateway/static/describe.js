/** What the page says about a run, in words. Pure. */

import { formatBrief, formatName } from "./format.js";
import { isEnded, openInputs, openTools } from "./relay-client.js";

export const STATUS_WORDS = {
  queued: "Queued",
  running: "Working",
  waiting: "Needs you",
  retrying: "Trying again",
  completed: "Done",
  error: "Failed",
  cancelled: "Stopped",
  lost: "Unknown",
};

const ERROR_TITLES = {
  agent_failed: "The agent ran into a problem",
  timeout: "This took too long",
  rate_limited: "Too many requests",
  upstream_unavailable: "A service the agent needs is unavailable",
  invalid_request: "The agent could not work with this request",
  worker_lost: "The worker went away",
  payload_too_large: "The answer is too large",
  internal: "Something went wrong in the relay",
};

export function errorTitle(code) {
  return ERROR_TITLES[code] ?? "Something went wrong";
}

export function toolTitle(item) {
  return item.purpose ?? formatName(item.toolName);
}

/** How long a run has taken, from its start as its events tell it; `null` if that is not known. */
export function elapsedOf(run, nowMs) {
  const startMs = Date.parse(run.startedAt ?? run.queuedAt ?? "");
  const elapsedMs = (isEnded(run) ? Date.parse(run.endedAt) : nowMs) - startMs;
  return Number.isNaN(elapsedMs) ? null : elapsedMs;
}

/** One sentence: what the run is doing now. */
export function activityOf(run) {
  if (run.cancelRequested) return "Stopping";
  if (run.isStalled) return "No sign of life from the agent";
  if (run.status === "queued") return "Waiting for a worker";
  if (run.status === "retrying") return "Trying again";
  if (openInputs(run).length > 0) return "Waiting for your answer";
  const tool = openTools(run).at(-1);
  if (tool) {
    const percentage = tool.progress?.percentage;
    return toolTitle(tool) + (percentage == null ? "" : `, ${Math.round(percentage)} %`);
  }
  const last = run.items.findLast((item) => !item.isSuperseded);
  if (last?.type === "text_delta") return "Writing";
  if (last?.type === "agent_thinking") return formatBrief(last.thought, 120);
  return "Thinking";
}

/** Who did something, if it was not `userId`: else "". */
export function othersName(by, userId) {
  return by && by !== userId && by !== "user" ? by : "";
}

/** Who answered a question, if it was somebody else: neither `userId` nor time that ran out. */
export function answeredBy(by, userId = null) {
  return by === "system" ? "" : othersName(by, userId);
}

/** Who stopped a run, from the point of view of `userId`. */
export function stoppedBy(by, userId) {
  if (!by) return "Stopped";
  return `Stopped by ${othersName(by, userId) || "you"}`;
}

/** A name for a conversation: the first line of its first question. */
export function titleOf(runs) {
  const content = runs.find((run) => run.request)?.request.content ?? "";
  const line = content.split("\n").find((words) => words.trim() !== "") ?? "";
  return formatBrief(line, 64) || "Conversation";
}

/** What the values of a choice are: from the request's JSON schema. */
export function choicesOf(schema) {
  const options =
    schema?.enum ?? schema?.oneOf ?? schema?.anyOf ?? schema?.properties?.value?.enum ?? [];
  return options.map((option) =>
    option !== null && typeof option === "object" && "const" in option
      ? { value: option.const, label: option.title ?? String(option.const) }
      : { value: option, label: String(option) },
  );
}

/** How much of a run was seen: the proof that nothing is missing, or what is. */
export function completenessOf(run, isRunning) {
  if (run.lastSeq === 0) return null;
  if (run.hasHole) return { isWhole: false, text: "Part of this run’s history is missing" };
  if (run.firstSeq > 1)
    return { isWhole: false, text: `Events 1–${run.firstSeq - 1} are no longer kept` };
  if (run.status === "lost")
    return { isWhole: false, text: `What came after event ${run.lastSeq} is lost` };
  const events = run.lastSeq === 1 ? "Event 1" : `Events 1–${run.lastSeq}`;
  return {
    isWhole: true,
    text: isRunning ? `${events}, none missing so far` : `${events}, none missing`,
  };
}
