// Conversations as files: JSON that comes back whole, and markdown to read.

import { ROOT, VERSION, newId, path, titleOf } from "./tree.js";

const ROLES = { user: 1, assistant: 1, tool: 1 };

/** Conversations as JSON text. */
export function toJson(conversations) {
  return `${JSON.stringify({ herd: "conversations", version: VERSION, conversations }, null, 1)}\n`;
}

/** The conversations of a JSON text, checked, with new ids. Throws Error saying what is wrong. */
export function fromJson(text) {
  let found;
  try {
    found = JSON.parse(text);
  } catch (error) {
    throw new Error(`This file is no JSON: ${error.message}`);
  }
  if (found?.herd !== "conversations" || !Array.isArray(found.conversations)) throw new Error("This file was not exported from this page.");
  if (found.version !== VERSION) throw new Error(`This file has version ${found.version}; this page reads version ${VERSION}.`);
  return found.conversations.map((one, i) => checked(one, `conversation ${i + 1}`));
}

function checked(one, where) {
  const wrong = (what) => new Error(`${where}: ${what}`);
  if (typeof one !== "object" || one === null || typeof one.nodes !== "object" || one.nodes === null) throw wrong("it has no messages");
  const nodes = {};
  for (const [id, node] of Object.entries(one.nodes)) {
    if (node?.id !== id || !Object.hasOwn(ROLES, node.role) || typeof node.content !== "string") throw wrong(`message ${id} is damaged`);
    if (node.parent !== ROOT && !Object.hasOwn(one.nodes, node.parent)) throw wrong(`message ${id} answers one that is not there`);
    const isImage = (image) => typeof image?.url === "string" && /^data:image\/(png|jpeg|webp|gif);base64,/.test(image.url);
    const isCall = (call) => typeof call?.name === "string" && typeof call.arguments === "string";
    if (node.images && !(Array.isArray(node.images) && node.images.every(isImage))) throw wrong(`a picture of message ${id} is damaged`);
    if (node.calls && !(Array.isArray(node.calls) && node.calls.every(isCall))) throw wrong(`a tool call of message ${id} is damaged`);
    nodes[id] = { ...node, created: Number(node.created) || 0 };
  }
  for (const id of Object.keys(nodes)) {
    const seen = new Set();
    for (let at = id; at !== ROOT; at = nodes[at].parent) {
      if (seen.has(at)) throw wrong("its messages go in a circle");
      seen.add(at);
    }
  }
  const text = (value) => (typeof value === "string" ? value : "");
  const chosen = Object.fromEntries(Object.entries(one.chosen ?? {}).filter(([, id]) => Object.hasOwn(nodes, id)));
  const settings = typeof one.settings === "object" && one.settings !== null ? one.settings : {};
  return {
    version: VERSION, id: newId(), title: text(one.title), created: Number(one.created) || Date.now(), updated: Number(one.updated) || Date.now(),
    model: text(one.model), system: text(one.system), settings, nodes, chosen,
  };
}

/** The branch that is shown, as markdown. */
export function toMarkdown(conversation) {
  const parts = [`# ${titleOf(conversation)}`, `*${conversation.model || "herd"}, ${new Date(conversation.created).toISOString().slice(0, 10)}*`];
  if (conversation.system.trim()) parts.push("## System", conversation.system.trim());
  for (const node of path(conversation)) {
    parts.push(`## ${{ user: "User", assistant: node.model || "Assistant", tool: "Result of a tool" }[node.role]}`);
    for (const image of node.images ?? []) parts.push(`*(picture: ${image.name || "without a name"})*`);
    if (node.role === "tool") parts.push(fenced(node.content, ""));
    else if (node.content) parts.push(node.content.trim());
    for (const call of node.calls ?? []) parts.push(`Calls \`${call.name}\`:`, fenced(call.arguments, "json"));
    if (node.error) parts.push(`> Error: ${node.error.message}`);
  }
  return `${parts.join("\n\n")}\n`;
}

function fenced(text, language) {
  const longest = Math.max(2, ...Array.from(text.matchAll(/`+/g), (run) => run[0].length));
  const mark = "`".repeat(longest + 1);
  return `${mark}${language}\n${text}\n${mark}`;
}

/** Give a text to the user as a file. */
export function download(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  const link = document.createElement("a");
  Object.assign(link, { href: url, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** A name for a file. */
export function fileName(title, ending) {
  const plain = title.normalize("NFKD").replace(/[^\w\s-]/g, "").trim().replace(/\s+/g, "-").slice(0, 48).toLowerCase();
  return `${plain || "conversation"}.${ending}`;
}
