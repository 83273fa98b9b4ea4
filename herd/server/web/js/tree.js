// A conversation is a tree: editing and asking again add a branch, nothing is lost. Plain data, no DOM.
//
// Conversation: {version, id, title, created, updated, model, system, settings, nodes: {id: node}, chosen: {id: child's id}}.
// Node: {id, parent, role, content, created, ...}; the parent of the first messages is ROOT.

export const VERSION = 1;
export const ROOT = "";

export function newConversation(from = {}) {
  const now = Date.now();
  return { version: VERSION, id: newId(), title: "", created: now, updated: now, model: "", system: "", settings: {}, nodes: {}, chosen: {}, ...from };
}

export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Add a node under `parent`, on the path that is shown. */
export function add(conversation, parent, fields) {
  const node = { id: newId(), parent, created: Date.now(), content: "", ...fields };
  conversation.nodes[node.id] = node;
  conversation.chosen[parent] = node.id;
  conversation.updated = Date.now();
  return node;
}

/** What follows `parent`, oldest first. */
export function children(conversation, parent) {
  return Object.values(conversation.nodes).filter((node) => node.parent === parent).sort((a, b) => a.created - b.created || (a.id < b.id ? -1 : 1));
}

/** The messages that are shown, from the first. */
export function path(conversation) {
  const out = [];
  const seen = new Set();
  for (let node = next(conversation, ROOT); node && !seen.has(node.id); node = next(conversation, node.id)) {
    out.push(node);
    seen.add(node.id);
  }
  return out;
}

function next(conversation, parent) {
  const chosen = conversation.nodes[conversation.chosen[parent]];
  return chosen?.parent === parent ? chosen : children(conversation, parent).at(-1);
}

/** The messages from the first to `id`. */
export function upTo(conversation, id) {
  const out = [];
  for (let node = conversation.nodes[id]; node && out.length <= 100_000; node = conversation.nodes[node.parent]) out.unshift(node);
  return out;
}

/** {index, count, ids}: where a node stands among the others under its parent. */
export function siblings(conversation, node) {
  const ids = children(conversation, node.parent).map((one) => one.id);
  return { index: ids.indexOf(node.id), count: ids.length, ids };
}

/** Show the branch that is `step` beside `node`. Whether there was one. */
export function turn(conversation, node, step) {
  const { index, ids } = siblings(conversation, node);
  const other = ids[index + step];
  if (!other) return false;
  conversation.chosen[node.parent] = other;
  return true;
}

/** What the server is sent for a reply behind the node `id`. Failed and empty replies are left out. */
export function messages(conversation, id) {
  const out = conversation.system.trim() ? [{ role: "system", content: conversation.system }] : [];
  for (const node of upTo(conversation, id)) {
    if (node.role === "user") out.push({ role: "user", content: withImages(node) });
    else if (node.role === "tool") out.push({ role: "tool", tool_call_id: node.call, content: node.content });
    else if (node.calls?.length) out.push({ role: "assistant", content: node.content || null, tool_calls: node.calls.map(({ id: call, name, arguments: given }) => ({ id: call, type: "function", function: { name, arguments: given } })) });
    else if (node.content) out.push({ role: "assistant", content: node.content });
  }
  return out;
}

function withImages(node) {
  if (!node.images?.length) return node.content;
  const images = node.images.map(({ url }) => ({ type: "image_url", image_url: { url } }));
  return node.content ? [...images, { type: "text", text: node.content }] : images;
}

/** A title: what was said first, in a line. */
export function titleOf(conversation) {
  if (conversation.title) return conversation.title;
  const first = path(conversation).find((node) => node.role === "user");
  const line = first?.content.trim().split("\n")[0] ?? "";
  return line.length > 60 ? `${line.slice(0, 58).trimEnd()}…` : line || (first?.images?.length ? "A picture" : "New conversation");
}
