/** The page: puts the client and the views together. */

import { ArchivingStore } from "./archive.js";
import { Composer } from "./composer.js";
import { ConnectionView, drawGate } from "./connection.js";
import { ConversationView } from "./conversation.js";
import { titleOf } from "./describe.js";
import { icon, setText } from "./dom.js";
import { drawEmpty } from "./empty.js";
import { isActive, Nesting } from "./nesting.js";
import { isEnded, randomId, RelayClient } from "./relay-client.js";
import * as session from "./session.js";
import { listenToTheme } from "./theme-toggle.js";
import { ThreadsView } from "./threads.js";
import { TimelineView } from "./timeline.js";
import { toast } from "./toasts.js";

const TICK_MS = 100;
const PIN_PX = 32;
const MAX_EVENTS = 5_000;
/** After connecting, history streams in for a moment; only then is it known which thread is the newest. */
const REPLAY_MS = 1_500;
/** What ended longer ago is history: a new page begins with a new conversation. */
const RECENT_MS = 5 * 60_000;
/** Drawing may take at most a quarter of the time, so that typing stays smooth in a token flood. */
const REST_FACTOR = 3;

const byId = (id) => document.getElementById(id);

class Page {
  /** Every lifecycle event received, for diagnosis: the last 5,000. */
  events = [];
  client = null;

  #threadId = null;
  /** Until the user acts in this tab, it shows what the user does in another one. */
  #isFollowing = false;
  #establishedAt = Infinity;
  #stoppedReason = null;
  #selectedRunId = null;
  #store = new ArchivingStore();
  /** Messages that no event confirms yet: {id, threadId, content, agent, state, error} */
  #outgoing = [];
  #stopping = new Set();
  #isScheduled = false;
  #restUntil = 0;
  #isPinned = true;
  #isRunPinned = true;
  #bannerHeight = 0;

  constructor() {
    this.scroller = byId("conversation");
    const actions = {
      userId: () => this.client?.userId,
      nowMs: () => Date.now() + (this.client?.clockSkewMs ?? 0),
      select: (runId) => this.#select(runId),
      retry: (run) => this.#send(run.request.content, run.agent),
      answer: (...answer) => this.#answer(...answer),
      resend: (id) => this.#resend(id),
      discard: (id) => this.#discard(id),
    };
    this.actions = actions;
    this.conversation = new ConversationView(byId("messages"), actions);
    this.timeline = new TimelineView(byId("run-panel"), actions);
    this.threads = new ThreadsView(byId("threads"), (threadId) => this.#open(threadId));
    this.connection = new ConnectionView(
      {
        root: byId("connection"),
        text: byId("connection-text"),
        details: byId("connection-details"),
        banner: byId("banner"),
      },
      {
        retryNow: () => this.client.retryNow(),
        askForToken: () => this.#askForToken(),
        facts: () => this.#facts(),
      },
    );
    this.composer = new Composer(
      {
        form: byId("composer"),
        field: byId("message-field"),
        picker: byId("agent-picker"),
        hint: byId("composer-hint"),
        stop: byId("stop"),
        send: byId("send"),
      },
      {
        send: (content, agent) => this.#send(content, agent),
        stop: () => this.#stop(),
        changed: (text) => {
          session.keepDraft(text);
          if (text) this.#isFollowing = false;
        },
      },
    );
    this.#listen();
  }

  async start() {
    const token = session.takeToken();
    const known = session.threadInAddress();
    this.#isFollowing = known === null;
    this.#threadId = known ?? randomId("t_");
    this.composer.text = session.draft();
    this.#draw();
    setInterval(() => this.#tick(), TICK_MS);
    if (token) this.#connect(token, await session.claimClientId());
    else this.#askForToken();
  }

  /* -- connection -- */

  #connect(token, clientId) {
    // From the start of what is kept: the list of conversations survives a reload.
    const client = new RelayClient({
      url: new URL(".", document.baseURI),
      token,
      clientId,
      since: "0",
      store: this.#store,
    });
    this.client = client;
    client.addEventListener("state", ({ detail }) => {
      this.#stoppedReason = detail.state === "stopped" ? detail.reason : null;
      this.connection.update(detail);
    });
    client.addEventListener("established", () => this.#established());
    client.addEventListener("event", ({ detail }) => this.#received(detail));
    client.addEventListener("reset", () => this.#schedule());
    client.addEventListener("notice", ({ detail }) => {
      toast(detail.data.title ?? "Notice", detail.data.body, detail.data.severity);
    });
    client.addEventListener("refused", ({ detail }) =>
      toast(detail.message, detail.recoverySuggestions.join(" "), "error"),
    );
    client.addEventListener("gap", ({ detail }) => {
      if (detail.isFilled === false)
        toast("A part of a run’s history is missing.", "The relay no longer has it.", "warning");
    });
    client.addEventListener("token_expiring", () => {
      toast("Your link is about to expire.", "Make a new one to stay connected.", "warning", {
        label: "Use a new link",
        act: () => this.#askForToken(),
      });
    });
    client.connect();
  }

  #established() {
    const { client } = this;
    this.#establishedAt = Date.now();
    this.composer.setAgents(client.agents);
    this.composer.setLimit(client.limits?.max_content_chars ?? null);
    setText(byId("user"), client.userId);
    drawEmpty(byId("empty"), client.agents, (name) => this.composer.choose(name));
    for (const message of this.#outgoing)
      if (message.state === "waiting") message.state = "sending";
    this.#schedule();
  }

  #received(event) {
    if (event.seq !== undefined) {
      this.events.push(event);
      if (this.events.length > MAX_EVENTS) this.events.splice(0, this.events.length - MAX_EVENTS);
    }
    if (event.type === "agent_queued") {
      this.#outgoing = this.#outgoing.filter((message) => message.id !== event.data.message_id);
    }
    this.#schedule();
  }

  #facts() {
    const { client } = this;
    return {
      Gateway: client?.node,
      Address: location.host,
      User: client?.userId,
      Position: client?.position,
      "Not yet sent": client?.pending || null,
    };
  }

  #askForToken() {
    const gate = byId("gate");
    drawGate(gate, {
      reason: this.#stoppedReason,
      address: new URL(".", document.baseURI).href.replace(/\/$/, ""),
      readToken: session.readPastedToken,
      onToken: (token) => {
        gate.close();
        this.#useToken(token);
      },
    });
    gate.oncancel = (event) => {
      if (!this.client) event.preventDefault();
    };
    if (!gate.open) gate.showModal();
  }

  async #useToken(token) {
    session.keepToken(token);
    const { client } = this;
    if (!client || subjectOf(token) !== client.userId) {
      location.reload();
    } else if (client.state === "live" || client.state === "degraded") {
      try {
        await client.refreshToken(token);
        toast("The new link is in use.", "", "info");
      } catch (error) {
        this.#reportRefusal(error);
      }
    } else {
      client.connect(token);
    }
  }

  /* -- commands -- */

  #send(content, agent) {
    this.#touch();
    const message = {
      id: randomId("m_"),
      threadId: this.#threadId,
      content,
      agent,
      state: "sending",
      error: null,
    };
    this.#outgoing.push(message);
    this.#selectedRunId = null;
    this.#isPinned = true;
    this.#deliver(message);
  }

  async #deliver(message) {
    const isConnected = ["live", "degraded"].includes(this.client?.state);
    message.state = isConnected ? "sending" : "waiting";
    message.error = null;
    this.#schedule();
    try {
      await this.client.sendMessage(message);
    } catch (error) {
      if (error.name !== "RelayError") throw error;
      message.state = "failed";
      message.error = error;
      this.#schedule();
    }
  }

  #resend(id) {
    const message = this.#outgoing.find((known) => known.id === id);
    if (message) this.#deliver(message);
  }

  #discard(id) {
    const message = this.#outgoing.find((known) => known.id === id);
    this.#outgoing = this.#outgoing.filter((known) => known.id !== id);
    if (message && this.composer.text.trim() === "") this.composer.text = message.content;
    this.composer.focus();
    this.#schedule();
  }

  /** The run that Stop would stop: the oldest of this thread that still goes on. */
  #stoppable() {
    const runs = this.#runs();
    const nesting = new Nesting(runs);
    // What stops a run stops those below it.
    const active = runs.filter((run) => {
      const parent = nesting.parentOf(run);
      return isActive(run) && !(parent && isActive(parent));
    });
    const run = active.find((known) => !known.cancelRequested && !this.#stopping.has(known.runId));
    return { run, state: run ? "active" : active.length > 0 ? "stopping" : "idle" };
  }

  async #stop() {
    const { run } = this.#stoppable();
    if (!run) return;
    this.#stopping.add(run.runId);
    this.#schedule();
    try {
      await this.client.cancel(run.runId);
    } catch (error) {
      this.#stopping.delete(run.runId);
      // It ended by itself in the meantime: what the user wanted.
      if (error.code !== "run_ended") this.#reportRefusal(error);
    }
    this.#schedule();
  }

  #answer(runId, requestId, { value, isDenied }) {
    return isDenied
      ? this.client.denyInput(runId, requestId)
      : this.client.answerInput(runId, requestId, value);
  }

  #reportRefusal(error) {
    if (error.name !== "RelayError") throw error;
    toast(error.message, error.recoverySuggestions.join(" "), "error");
  }

  /* -- threads -- */

  #allRuns() {
    const runs = new Map([...this.#store.archive, ...this.#store.runs]);
    return [...runs.values()].sort((a, b) => a.firstOffset - b.firstOffset);
  }

  #runs() {
    return this.#allRuns().filter((run) => run.threadId === this.#threadId);
  }

  /** From now on this tab is the user's own, not a mirror of another. */
  #touch() {
    this.#isFollowing = false;
    session.putThreadInAddress(this.#threadId, { replace: session.threadInAddress() === null });
  }

  #open(threadId) {
    this.#showThread(threadId);
    this.#touch();
    this.#setSidebar(false);
    this.composer.focus();
  }

  #showThread(threadId) {
    if (threadId === this.#threadId) return;
    this.#threadId = threadId;
    this.#selectedRunId = null;
    this.#isPinned = true;
    this.conversation.clear();
    this.#schedule();
  }

  #newThread() {
    this.#showThread(randomId("t_"));
    this.#isFollowing = false;
    session.putThreadInAddress(null);
    this.#setSidebar(false);
    this.composer.focus();
  }

  #follow(runs) {
    if (!this.#isFollowing) return;
    const newest = runs.at(-1);
    if (!newest || newest.threadId === this.#threadId) return;
    const isReplaying = Date.now() - this.#establishedAt < REPLAY_MS;
    const isEmpty = !runs.some((run) => run.threadId === this.#threadId);
    const endedAt = Date.parse(newest.endedAt ?? "");
    const isRecent = !isEnded(newest) || this.actions.nowMs() - endedAt < RECENT_MS;
    if (isRecent && (isEmpty || isReplaying)) this.#showThread(newest.threadId);
  }

  #select(runId) {
    this.#selectedRunId = runId;
    this.#isRunPinned = true;
    this.timeline.setOpen(true);
    this.#schedule();
  }

  /* -- drawing -- */

  /** Draw once per frame at most, however many events came. */
  #schedule() {
    if (this.#isScheduled) return;
    this.#isScheduled = true;
    const restMs = document.hidden ? 250 : this.#restUntil - performance.now();
    const draw = () => this.#draw();
    if (restMs > 0) setTimeout(draw, restMs);
    else requestAnimationFrame(draw);
  }

  #draw() {
    const startedAt = performance.now();
    this.#isScheduled = false;
    const all = this.#allRuns();
    this.#follow(all);
    const runs = all.filter((run) => run.threadId === this.#threadId);
    const outgoing = this.#outgoing.filter((message) => message.threadId === this.#threadId);
    const nesting = new Nesting(runs);
    const selected = this.#selected(nesting.roots);
    this.conversation.update(nesting, outgoing, selected?.runId);
    this.timeline.show(selected, nesting);
    this.threads.update(groupByThread(all), this.#threadId);
    this.#drawFrame(runs);
    this.#keepPinned();
    this.#restUntil = performance.now() + REST_FACTOR * (performance.now() - startedAt);
  }

  /** The run that the timeline shows: the chosen one, else the one at work, else the last. */
  #selected(runs) {
    const chosen = runs.find((run) => run.runId === this.#selectedRunId);
    return chosen ?? runs.findLast((run) => run.startedAt && !isEnded(run)) ?? runs.at(-1) ?? null;
  }

  #drawFrame(runs) {
    const title = runs.length > 0 ? titleOf(runs) : "New conversation";
    const { state } = this.#stoppable();
    setText(byId("thread-title"), title);
    this.composer.setStop(state);
    byId("empty").hidden = !this.conversation.isEmpty;
    const heading = runs.length > 0 ? `${title} · Agent Relay` : "Agent Relay";
    document.title = state === "idle" ? heading : `● ${heading}`;
  }

  #tick() {
    this.connection.tick();
    const { state } = this.#stoppable();
    if (state === "idle" || document.hidden) return;
    const nowMs = this.actions.nowMs();
    this.conversation.tick(nowMs);
    this.timeline.tick(nowMs);
  }

  #keepPinned() {
    if (this.#isPinned) this.scroller.scrollTop = this.scroller.scrollHeight;
    const { body } = this.timeline;
    if (this.#isRunPinned) body.scrollTop = body.scrollHeight;
    byId("jump").hidden = this.#isPinned || this.conversation.isEmpty;
  }

  /** The banner takes its room from the top: what is being read stays where it is. */
  #makeUpForBanner() {
    const height = byId("banner-slot").offsetHeight;
    if (!this.#isPinned) this.scroller.scrollTop += height - this.#bannerHeight;
    this.#bannerHeight = height;
  }

  /* -- the rest of the page -- */

  #setSidebar(isOpen) {
    byId("shell").classList.toggle("sidebar-open", isOpen);
    byId("menu").setAttribute("aria-expanded", String(isOpen));
  }

  #listen() {
    const isAtEnd = (node) => node.scrollHeight - node.scrollTop - node.clientHeight < PIN_PX;
    const { scroller } = this;
    const { body } = this.timeline;
    scroller.addEventListener(
      "scroll",
      () => {
        this.#isPinned = isAtEnd(scroller);
        byId("jump").hidden = this.#isPinned || this.conversation.isEmpty;
      },
      { passive: true },
    );
    body.addEventListener(
      "scroll",
      () => {
        this.#isRunPinned = isAtEnd(body);
      },
      { passive: true },
    );
    // The keyboard of a phone and the drawer change the height without a scroll.
    new ResizeObserver(() => this.#keepPinned()).observe(scroller);
    new ResizeObserver(() => this.#makeUpForBanner()).observe(byId("banner-slot"));
    byId("jump").prepend(icon("down"));
    byId("jump").addEventListener("click", () => {
      this.#isPinned = true;
      this.#keepPinned();
    });
    byId("new-thread").addEventListener("click", () => this.#newThread());
    byId("menu").addEventListener("click", () =>
      this.#setSidebar(!byId("shell").classList.contains("sidebar-open")),
    );
    byId("scrim").addEventListener("click", () => this.#setSidebar(false));
    document.addEventListener("keydown", (event) => this.#key(event));
    document.addEventListener("visibilitychange", () => this.#schedule());
    addEventListener("popstate", () => {
      const threadId = session.threadInAddress();
      this.#showThread(threadId ?? randomId("t_"));
    });
    addEventListener("hashchange", () => {
      if (new URLSearchParams(location.hash.slice(1)).has("token"))
        this.#useToken(session.takeToken());
    });
    listenToTheme(byId("theme-toggle"));
  }

  #key(event) {
    if (event.isComposing || byId("gate").open) return;
    if (event.key === "Escape") {
      if (byId("connection").open) byId("connection").open = false;
      else if (byId("shell").classList.contains("sidebar-open")) this.#setSidebar(false);
      else this.#stop();
    } else if (event.key === "/" && !event.target.closest("input, textarea, select")) {
      event.preventDefault();
      this.composer.focus();
    }
  }
}

function groupByThread(runs) {
  const threads = new Map();
  for (const run of runs) {
    if (threads.has(run.threadId)) threads.get(run.threadId).push(run);
    else threads.set(run.threadId, [run]);
  }
  return threads;
}

/** Read whom a token names; the gateway verifies it, this only compares. */
function subjectOf(token) {
  const [, payload] = token.split(".");
  const bytes = Uint8Array.from(atob(payload.replaceAll("-", "+").replaceAll("_", "/")), (byte) =>
    byte.charCodeAt(0),
  );
  return JSON.parse(new TextDecoder().decode(bytes)).sub;
}

const page = new Page();
window.relayPage = page;
await page.start();
