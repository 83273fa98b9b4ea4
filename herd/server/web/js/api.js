// The server: requests with the key, and failures that say what is wrong and what helps.

import { events } from "./events.js";

const KEY = "herd.key";

/** What went wrong. `status` is 0 when nothing was reached; `hint` is what the user can do. */
export class Failure extends Error {
  constructor(message, { status = 0, code = null, param = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, code, param, retryAfter });
  }

  get hint() {
    if (this.status === 0) return "Is herd serve still running, and can this browser reach it?";
    if (this.status === 401) return "Give an API key of this server.";
    if (this.code === "context_length_exceeded") return "Shorten the conversation, begin a new one, or allow leaving out the oldest messages in the settings.";
    if (this.code === "unsupported_content") return "Choose a model that sees, or send the message without its pictures.";
    if (this.code === "model_not_found") return "Choose another model above.";
    if (this.status === 429) return this.retryAfter ? `Try again in ${this.retryAfter} s.` : "Try again in a moment.";
    if (this.status === 503) return "The model is not ready. The engine page says what it is doing.";
    if (this.status === 500) return "The server's log says more.";
    return "";
  }

  plain() {
    return { message: this.message, hint: this.hint, status: this.status, code: this.code, param: this.param };
  }
}

export class Api {
  /** `askForKey(failure)` gives a key, or null when the user has none. */
  constructor(askForKey) {
    this.askForKey = askForKey;
    this.asking = null;
    this.counting = true;
  }

  get key() {
    return sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY) ?? "";
  }

  keep(key, always) {
    sessionStorage.removeItem(KEY);
    localStorage.removeItem(KEY);
    if (key) (always ? localStorage : sessionStorage).setItem(KEY, key);
  }

  /** A response that is fine. Asks for the key once when there must be one. Throws Failure, or AbortError. */
  async fetch(path, body = null, { signal } = {}) {
    for (let asked = false; ; asked = true) {
      const used = this.key;
      const headers = { Accept: "application/json" };
      if (used) headers.Authorization = `Bearer ${used}`;
      if (body !== null) headers["Content-Type"] = "application/json";
      let response;
      try {
        response = await fetch(path, { method: body === null ? "GET" : "POST", headers, body: body === null ? null : JSON.stringify(body), signal, cache: "no-store" });
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new Failure("The server cannot be reached.");
      }
      if (response.ok) return response;
      const failure = await failureOf(response);
      if (failure.status !== 401 || asked) throw failure;
      if (this.key === used && !(await this.newKey(failure))) throw failure;
    }
  }

  /** Several requests may need a key at once; the user is asked once. */
  newKey(failure) {
    this.asking ??= this.askForKey(failure).finally(() => (this.asking = null));
    return this.asking;
  }

  async json(path, body = null, more = {}) {
    const response = await this.fetch(path, body, more);
    try {
      return await response.json();
    } catch {
      throw new Failure(`What ${path} answers is no JSON: is this herd's server?`, { status: response.status });
    }
  }

  /** [{id, parent, context, state, format}] of what can be asked for. */
  async models() {
    const { data } = await this.json("v1/models");
    return data.map((row) => ({ id: row.id, parent: row.parent ?? null, context: row.max_model_len ?? null, state: row.meta?.state ?? null }));
  }

  engine() {
    return this.json("v1/engine");
  }

  /** How many tokens; null when this server does not count for others. `what`: {prompt} or {messages}. */
  async count(model, what, signal) {
    if (!this.counting) return null;
    try {
      const { count } = await this.json("tokenize", { model, ...what }, { signal });
      return Number.isInteger(count) ? count : null;
    } catch (error) {
      if (error instanceof Failure && (error.status === 404 || error.status === 405)) this.counting = false;
      return null;
    }
  }

  /** The chunks of a reply. */
  async *chat(body, signal) {
    const response = await this.fetch("v1/chat/completions", { ...body, stream: true, stream_options: { include_usage: true } }, { signal });
    let done = false;
    try {
      for await (const data of events(response.body)) {
        if (data === "[DONE]") {
          done = true;
          break;
        }
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Failure(chunk.error.message, { status: chunk.error.status ?? 500, code: chunk.error.code, param: chunk.error.param });
        yield chunk;
      }
    } catch (error) {
      if (error.name === "AbortError" || error instanceof Failure) throw error;
      throw new Failure("The connection to the server broke off.");
    }
    if (!done) throw new Failure("The reply broke off: the server ended the connection.");
  }
}

async function failureOf(response) {
  const text = await response.text().catch(() => "");
  let told = {};
  try {
    const body = JSON.parse(text);
    told = typeof body.error === "string" ? { message: body.error } : (body.error ?? { message: body.detail });
  } catch {
    told = { message: text.slice(0, 300) };
  }
  const wait = Number(response.headers.get("Retry-After"));
  return new Failure(told.message || `The server answered ${response.status} ${response.statusText}.`, {
    status: response.status, code: told.code ?? null, param: told.param ?? null, retryAfter: wait > 0 ? wait : null,
  });
}
