/** What this tab remembers: its token, its name, its thread, its draft. */

import { randomId } from "./relay-client.js";

const TOKEN = "relay.token";
const CLIENT = "relay.client";
const DRAFT = "relay.draft";
const THREAD_PARAMETER = "thread";

/** Take the token out of the address, where histories and screenshots would keep it. */
export function takeToken() {
  const token = new URLSearchParams(location.hash.slice(1)).get("token");
  if (token) {
    keepToken(token);
    history.replaceState(history.state, "", location.pathname + location.search);
  }
  return token ?? sessionStorage.getItem(TOKEN);
}

export function keepToken(token) {
  sessionStorage.setItem(TOKEN, token);
}

/** Find the token in what was pasted: a token, or a whole link that carries one. */
export function readPastedToken(pasted) {
  const words = pasted.trim();
  const inLink = /[#&]token=([^&\s]+)/.exec(words);
  const token = inLink ? decodeURIComponent(inLink[1]) : words;
  return /^[\w-]+\.[\w-]+\.[\w-]+$/.test(token) ? token : null;
}

/**
 * Name this tab to the gateway, the same over reloads.
 *
 * Duplicating a tab copies its session storage. The copy must not take the
 * original's place, so the name belongs to whoever holds its lock.
 */
export async function claimClientId() {
  const known = sessionStorage.getItem(CLIENT);
  const id = known && (await lock(known)) ? known : randomId("c_");
  if (id !== known) await lock(id);
  sessionStorage.setItem(CLIENT, id);
  return id;
}

function lock(id) {
  // Locks exist only on HTTPS and localhost; elsewhere a duplicated tab shares its place.
  if (!navigator.locks) return Promise.resolve(true);
  return new Promise((resolve) => {
    navigator.locks.request(`relay.${id}`, { ifAvailable: true }, (held) => {
      resolve(held !== null);
      // Held for as long as the page lives.
      return held && new Promise(() => {});
    });
  });
}

export function threadInAddress() {
  return new URLSearchParams(location.search).get(THREAD_PARAMETER);
}

export function putThreadInAddress(threadId, { replace = false } = {}) {
  const url = new URL(location.href);
  if (threadId) url.searchParams.set(THREAD_PARAMETER, threadId);
  else url.searchParams.delete(THREAD_PARAMETER);
  if (url.href === location.href) return;
  if (replace) history.replaceState(null, "", url);
  else history.pushState(null, "", url);
}

export function draft() {
  return sessionStorage.getItem(DRAFT) ?? "";
}

export function keepDraft(text) {
  if (text) sessionStorage.setItem(DRAFT, text);
  else sessionStorage.removeItem(DRAFT);
}
