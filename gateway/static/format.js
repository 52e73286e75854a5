/** How the page writes durations, times and values. Pure. */

/** 840 ms, 4.2 s, 42 s, 3 min 05 s, 1 h 04 min. */
export function formatDuration(milliseconds) {
  const ms = Math.max(0, milliseconds);
  if (ms < 999.5) return `${Math.round(ms)} ms`;
  if (ms < 9_950) return `${(ms / 1000).toFixed(1)} s`;
  const seconds = Math.round(ms / 1000);
  if (seconds < 60) return `${seconds} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes} min ${pad(seconds % 60)} s`;
  return `${Math.floor(minutes / 60)} h ${pad(minutes % 60)} min`;
}

/** A duration that is still growing: in tenths, so that it moves without flicker. */
export function formatElapsed(milliseconds) {
  const ms = Math.max(0, milliseconds);
  return ms < 60_000 ? `${(ms / 1000).toFixed(1)} s` : formatDuration(ms);
}

/** How long after the start something happened; nothing for what happened at the start. */
export function formatMoment(milliseconds) {
  if (milliseconds < 50) return "";
  return `+${milliseconds < 999.5 ? formatDuration(milliseconds) : formatElapsed(milliseconds)}`;
}

/**
 * What stands at the start, the middle and the end of a time axis.
 *
 * Times are known to the millisecond: what took less than a few has no axis, and gives `null`.
 * While the axis grows it keeps to seconds, whose last digit can be read.
 */
export function axisLabels(spanMs, isGrowing = false) {
  if (isGrowing || spanMs >= 999.5)
    return ["0 s", formatElapsed(spanMs / 2), formatElapsed(spanMs)];
  if (spanMs < 4) return null;
  return ["0 ms", formatDuration(spanMs / 2), formatDuration(spanMs)];
}

function pad(number) {
  return String(number).padStart(2, "0");
}

/** A value as text for people: strings as they are, the rest as indented JSON. */
export function formatValue(value, limit = 4_000) {
  const text = typeof value === "string" ? value : (JSON.stringify(value, null, 2) ?? "");
  if (text.length <= limit) return text;
  return `${text.slice(0, limit)}\n… ${(text.length - limit).toLocaleString()} more characters`;
}

/** Whether a value has nothing to show: none, an empty text, an empty list or object. */
export function isEmptyValue(value) {
  if (value === null || value === undefined || value === "") return true;
  return typeof value === "object" && Object.keys(value).length === 0;
}

/** A value in one short line. */
export function formatBrief(value, limit = 80) {
  if (value === null || value === undefined) return "";
  let text;
  if (typeof value === "object" && !Array.isArray(value)) {
    text = Object.entries(value)
      .map(([key, part]) => `${key}: ${formatBrief(part, 40)}`)
      .join(", ");
  } else {
    text = typeof value === "string" ? value : JSON.stringify(value);
  }
  text = text.replace(/\s+/g, " ").trim();
  return text.length > limit ? `${text.slice(0, limit - 1).trimEnd()}…` : text;
}

/** `query_csv` → `Query csv`. */
export function formatName(name) {
  const words = String(name).replace(/[_-]+/g, " ").trim();
  return words.charAt(0).toUpperCase() + words.slice(1);
}

/** One plural rule: enough for what the page counts. */
export function count(number, noun) {
  return `${number.toLocaleString()} ${noun}${number === 1 ? "" : "s"}`;
}
