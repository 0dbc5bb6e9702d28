/** The OpenAI API of the server that this page came from. */

import { eventsOf } from "./sse.js";

const DONE = "[DONE]";

/** A call that was refused or failed. `message` is the server's own. */
export class ApiError extends Error {
  constructor(message, { status = 0, code = "", requestId = "", retryAfter = "" } = {}) {
    super(message);
    Object.assign(this, { status, code, requestId, retryAfter });
  }

  /** What the server says beside the message. */
  get facts() {
    const facts = [this.status && `status ${this.status}`, this.code];
    if (this.retryAfter) facts.push(`try again in ${this.retryAfter} s`);
    if (this.requestId) facts.push(`request ${this.requestId}`);
    return facts.filter(Boolean).join(" · ");
  }
}

/** `key` goes into each call; an empty one is left out. */
export class Api {
  key = "";

  /** The models that are served: `id` and, where the server tells it, `max_model_len`. */
  async models() {
    const response = await this.#call("v1/models");
    return (await response.json()).data;
  }

  /** Whether a model can chat. True where the server does not tell. */
  async hasChatTemplate(model) {
    const query = model ? `?model=${encodeURIComponent(model)}` : "";
    try {
      const response = await this.#call(`tokenizer_info${query}`);
      return (await response.json()).chat_template !== null;
    } catch (error) {
      if (error instanceof ApiError && error.status !== 401) return true;
      throw error;
    }
  }

  /** Yield each chunk of a streamed answer. Raises ApiError; AbortError after an abort. */
  async *stream(path, body, signal) {
    const asked = { ...body, stream: true, stream_options: { include_usage: true } };
    const response = await this.#call(path, { body: asked, signal });
    for await (const data of eventsOf(response.body)) {
      if (data === DONE) return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw errorOf(chunk, response);
      yield chunk;
    }
    throw new ApiError("The connection broke off before the answer was whole.");
  }

  async #call(path, { body, signal } = {}) {
    const headers = {};
    if (this.key) headers.authorization = `Bearer ${this.key}`;
    if (body) headers["content-type"] = "application/json";
    const response = await fetch(path, {
      method: body ? "POST" : "GET",
      headers,
      body: body && JSON.stringify(body),
      signal,
      cache: "no-store",
      credentials: "omit",
    }).catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new ApiError(`The server cannot be reached: ${error.message}.`);
    });
    if (!response.ok) throw errorOf(await response.json().catch(() => ({})), response);
    return response;
  }
}

function errorOf(body, response) {
  const said = body.error ?? {};
  return new ApiError(said.message ?? `The server answered ${response.status}.`, {
    status: response.ok ? 0 : response.status,
    code: said.code ?? "",
    requestId: response.headers.get("x-request-id") ?? "",
    retryAfter: response.headers.get("retry-after") ?? "",
  });
}
