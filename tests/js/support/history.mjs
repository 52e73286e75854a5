/** Writes a user's events as Redis would number them. */

export class History {
  offset = 0;
  events = [];
  #seqs = new Map();

  constructor(userId = "alice") {
    this.userId = userId;
  }

  lifecycle(type, data = {}, { run = "run_1", attempt = 1, thread = "t1" } = {}) {
    const seq = (this.#seqs.get(run) ?? 0) + 1;
    this.#seqs.set(run, seq);
    return this.#add({ type, seq, run_id: run, attempt, thread_id: thread, agent: "docs", data });
  }

  delta(messageId, position, text, { run = "run_1", attempt = 1, thread = "t1" } = {}) {
    const data = { message_id: messageId, position, text };
    return this.#add({
      type: "text_delta",
      run_id: run,
      attempt,
      thread_id: thread,
      agent: "docs",
      data,
    });
  }

  progress(toolCallId, percentage, { run = "run_1", attempt = 1, thread = "t1" } = {}) {
    const data = { tool_call_id: toolCallId, progress_percentage: percentage };
    return this.#add({
      type: "tool_progress",
      run_id: run,
      attempt,
      thread_id: thread,
      agent: "docs",
      data,
    });
  }

  /** A whole run: two tools, text in two messages, an answer. */
  exampleRun(run = "run_1") {
    const where = { run };
    this.lifecycle(
      "agent_queued",
      { message_id: `m_${run}`, content: "Why?", metadata: {} },
      where,
    );
    this.lifecycle("agent_started", {}, where);
    this.lifecycle(
      "agent_thinking",
      { thought: "Hm", step: 1, total_steps: 2, progress_percentage: 20 },
      where,
    );
    this.lifecycle(
      "tool_executing",
      { tool_call_id: "a", tool_name: "search", parameters: { q: "x" } },
      where,
    );
    this.progress("a", 50, where);
    this.lifecycle(
      "tool_executing",
      { tool_call_id: "b", tool_name: "read", parameters: {} },
      where,
    );
    this.lifecycle(
      "tool_completed",
      { tool_call_id: "a", tool_name: "search", status: "ok", result: 3, duration_ms: 9 },
      where,
    );
    this.lifecycle(
      "tool_completed",
      { tool_call_id: "b", tool_name: "read", status: "error", error: "no", duration_ms: 4 },
      where,
    );
    this.delta("m1", 0, "Because ", where);
    this.delta("m1", 8, "🙂🙂 ", where);
    this.delta("m1", 11, "of it.", where);
    this.lifecycle("agent_thinking", { thought: "More" }, where);
    this.delta("m2", 0, " That is all.", where);
    this.lifecycle(
      "agent_completed",
      { result: "Because 🙂🙂 of it. That is all.", duration_ms: 30 },
      where,
    );
    return this.events;
  }

  #add(event) {
    this.offset += 1;
    const timestamp = new Date(Date.UTC(2026, 10, 22, 14, 0, 0) + this.offset * 10).toISOString();
    const whole = { ...event, offset: this.offset, user_id: this.userId, timestamp };
    this.events.push(whole);
    return whole;
  }
}
