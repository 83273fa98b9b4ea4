// One reply: from the messages before it to a node that grows. What the server tells of it (counts, times) is kept with it.

import { Failure } from "./api.js";
import { messages } from "./tree.js";

/** The fields of a request besides its messages: what is not set is the model's own default. Throws Failure. */
export function request(conversation, parent) {
  const { settings } = conversation;
  const body = { model: conversation.model, messages: messages(conversation, parent) };
  for (const name of ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"]) {
    if (typeof settings[name] === "number") body[name] = settings[name];
  }
  const stop = (settings.stop ?? "").split("\n").filter(Boolean).map((line) => line.replaceAll("\\n", "\n"));
  if (stop.length) body.stop = stop;
  if (settings.truncate) body.truncation = "auto";
  const tools = parseTools(settings.tools ?? "");
  if (tools.length) body.tools = tools;
  return body;
}

/** Tool definitions: a list in OpenAI's shape, or of bare functions. Throws Failure naming what is wrong. */
export function parseTools(text) {
  if (!text.trim()) return [];
  let found;
  try {
    found = JSON.parse(text);
  } catch (error) {
    throw new Failure(`The tool definitions are no JSON: ${error.message}`, { status: 400, param: "tools" });
  }
  const list = Array.isArray(found) ? found : [found];
  return list.map((tool, i) => {
    const described = tool?.type === "function" ? tool.function : tool;
    if (typeof described?.name !== "string") throw new Failure(`Tool ${i + 1} has no name.`, { status: 400, param: "tools" });
    return { type: "function", function: described };
  });
}

/** Let `node` grow until the reply is complete, stopped or failed. `changed()` is called on the way. Never throws. */
export async function run(api, conversation, node, signal, changed) {
  const began = performance.now();
  node.state = "waiting";
  try {
    for await (const chunk of api.chat(request(conversation, node.parent), signal)) {
      take(node, chunk, (performance.now() - began) / 1000);
      changed();
    }
  } catch (error) {
    if (error.name === "AbortError") node.finish = "stopped";
    else node.error = (error instanceof Failure ? error : new Failure(`This page failed: ${error.message}`, { status: -1 })).plain();
  }
  node.seconds = (performance.now() - began) / 1000;
  delete node.state;
  changed();
}

function take(node, chunk, seconds) {
  if (chunk.truncated) node.truncated = chunk.truncated;
  if (chunk.usage) node.usage = chunk.usage;
  if (chunk.timings) node.timings = chunk.timings;
  for (const choice of chunk.choices ?? []) {
    const { delta = {} } = choice;
    if (delta.content || delta.tool_calls) {
      node.first ??= seconds;
      node.state = "writing";
    }
    if (delta.content) node.content += delta.content;
    for (const piece of delta.tool_calls ?? []) {
      const calls = (node.calls ??= []);
      const call = (calls[piece.index] ??= { id: "", name: "", arguments: "" });
      if (piece.id) call.id = piece.id;
      if (piece.function?.name) call.name = piece.function.name;
      call.arguments += piece.function?.arguments ?? "";
    }
    if (choice.finish_reason) {
      node.finish = choice.finish_reason;
      node.detail = choice.stop_reason ?? null;
    }
  }
}
