// The chat: a conversation, its messages on the page, and everything that is done to them.

import { Api } from "./api.js";
import { Composer } from "./composer.js";
import { askForKey, toast } from "./dialogs.js";
import { announce, by, h } from "./dom.js";
import { bytes, counted, parameters } from "./format.js";
import { MessageView } from "./message.js";
import { run } from "./reply.js";
import { Settings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { Sides } from "./sides.js";
import { download, fileName, fromJson, toJson, toMarkdown } from "./transfer.js";
import { ROOT, add, messages, newConversation, path, siblings, titleOf, turn } from "./tree.js";

const SAVE_MS = 1500;
const PROGRESS_MS = 700;
const STARTERS = ["Tell me a story about a dog.", "Why is the sky blue?", "Write a short poem about the sea."];

export class App {
  constructor(store) {
    this.store = store;
    this.api = new Api((failure) => askForKey(this.api, failure));
    this.models = [];
    this.engine = null;
    this.views = new Map();
    this.sides = new Sides();
    this.atEnd = true;
    this.running = null; // {node, controller} while a reply is written
    this.conversation = this.fresh();
    this.sidebar = new Sidebar(this);
    this.settings = new Settings(() => this.save(), () => this.sides.panel(false));
    this.composer = new Composer(this);
  }

  get busy() {
    return this.running !== null;
  }

  /** Tokens of the chosen model's context; null when that is not known. */
  get context() {
    return this.models.find((one) => one.id === this.conversation.model)?.context ?? null;
  }

  /** What the engine page's numbers say of the chosen model. */
  get row() {
    const { model } = this.conversation;
    const base = this.models.find((one) => one.id === model)?.parent ?? model.split("@")[0];
    return this.engine?.models.find((one) => one.name === base || one.aliases.includes(base)) ?? null;
  }

  fresh() {
    const before = this.conversation;
    const model = before?.model ?? lastModel.get();
    return newConversation({ model, settings: before ? { ...before.settings } : {}, system: before?.system ?? "" });
  }

  // ---- models ----

  async loadModels() {
    try {
      [this.models, this.engine] = await Promise.all([this.api.models(), this.api.engine()]);
    } catch (error) {
      toast(`${error.message} ${error.hint ?? ""}`.trim(), ["Try again", () => this.loadModels()]);
      return;
    }
    this.drawModels();
  }

  drawModels() {
    const select = by("model");
    const known = this.models.map((one) => one.id);
    const { conversation } = this;
    if (known.length && !known.includes(conversation.model) && !Object.keys(conversation.nodes).length) conversation.model = known[0] ?? "";
    const bases = this.models.filter((one) => one.parent === null);
    const option = (one) => h("option", { value: one.id }, one.id);
    const groups = bases.map((base) => {
      const adapters = this.models.filter((one) => one.parent === base.id);
      return adapters.length ? h("optgroup", { label: base.id }, option(base), adapters.map(option)) : option(base);
    });
    if (conversation.model && !known.includes(conversation.model)) groups.push(h("option", { value: conversation.model }, `${conversation.model} (not here)`));
    if (!groups.length) groups.push(h("option", { value: "" }, "No models"));
    select.replaceChildren(...groups);
    select.value = conversation.model;
    this.drawFacts();
    this.drawEmpty();
    this.composer.count();
  }

  drawFacts() {
    const { row } = this;
    const facts = [["Name", this.conversation.model || "–"], ["State", row?.state ?? "unknown"]];
    if (row?.parameters) facts.push(["Parameters", parameters(row.parameters)], ["Weights", row.kind], ["Context", counted(row.context, "token")], ["Prompt format", row.format ?? "none (a base model)"], ["Tools", row.tools ? "yes" : "no"]);
    if (row?.memory) facts.push(["Memory", bytes(row.memory)]);
    this.settings.defaults(row?.defaults, facts);
  }

  /** Tokens of the conversation with `draft` behind it; null when not known. Does not load a model for that. */
  async countContext(draft, signal) {
    const { model } = this.conversation;
    if (!model || this.row?.state !== "ready") return null;
    const last = path(this.conversation).at(-1);
    const all = messages(this.conversation, last?.id ?? ROOT).map((one) => (Array.isArray(one.content) ? { ...one, content: one.content.filter((part) => part.type === "text") } : one));
    if (draft) all.push({ role: "user", content: draft });
    if (!all.length) return 0;
    return this.api.count(model, { messages: all }, signal);
  }

  // ---- conversations ----

  async openConversation(id) {
    if (id === this.conversation.id) {
      this.sides.sidebar(false, true);
      return;
    }
    const found = await this.store.get(id);
    if (!found) return;
    this.leave();
    this.show(found);
    by("scroll").scrollTop = by("scroll").scrollHeight;
    announce(`${titleOf(found)} is open.`);
  }

  newOne() {
    this.leave();
    this.show(this.fresh());
    by("draft").focus();
  }

  leave() {
    this.stop(); // what has come of the reply is kept when it has ended
    this.running = null;
    this.save(true);
    this.sides.sidebar(false, true);
  }

  show(conversation) {
    this.conversation = conversation;
    for (const node of Object.values(conversation.nodes)) delete node.state; // a reply that a closed tab left
    this.views.clear();
    by("log").replaceChildren();
    this.settings.show(conversation);
    this.drawModels();
    this.draw();
    this.sidebar.draw();
  }

  /** Keep the conversation; soon, or at once. One without messages is not kept. */
  async save(now = false, conversation = this.conversation) {
    clearTimeout(this.saving);
    if (!Object.keys(conversation.nodes).length || conversation.deleted) return;
    if (!now) {
      this.saving = setTimeout(() => this.save(true), SAVE_MS);
      return;
    }
    try {
      await this.store.put(structuredClone(conversation));
    } catch (error) {
      toast(`This conversation could not be kept: ${error?.message ?? error}`, ["Export it", () => this.export(conversation.id)]);
    }
    await this.sidebar.refresh();
  }

  async rename(id, title) {
    const found = id === this.conversation.id ? this.conversation : await this.store.get(id);
    found.title = title;
    await this.store.put(structuredClone(found));
    await this.sidebar.refresh();
    this.drawTitle();
  }

  async remove(id) {
    if (id === this.conversation.id) {
      this.stop();
      this.running = null;
      clearTimeout(this.saving);
      this.conversation.deleted = true;
      this.show(this.fresh());
    }
    await this.store.remove(id);
    await this.sidebar.refresh();
    by("search").focus();
  }

  async export(id, markdown = false) {
    const found = id === this.conversation.id ? this.conversation : await this.store.get(id);
    const title = titleOf(found);
    if (markdown) download(fileName(title, "md"), toMarkdown(found), "text/markdown");
    else download(fileName(title, "json"), toJson([found]), "application/json");
  }

  async exportAll() {
    await this.save(true);
    download("herd-conversations.json", toJson(await this.store.all()), "application/json");
  }

  async import(file) {
    try {
      const found = fromJson(await file.text());
      for (const one of found) await this.store.put(one);
      await this.sidebar.refresh();
      toast(`${counted(found.length, "conversation")} imported.`);
      if (found.length === 1) await this.openConversation(found[0].id);
    } catch (error) {
      toast(error.message);
    }
  }

  // ---- messages ----

  async send(text, images) {
    if (!this.conversation.model) {
      toast("There is no model to ask.", ["Look again", () => this.loadModels()]);
      return;
    }
    if (!matchMedia("(pointer: coarse)").matches) by("draft").focus();
    const last = path(this.conversation).at(-1);
    const node = add(this.conversation, last?.id ?? ROOT, { role: "user", content: text, ...(images.length ? { images } : {}) });
    await this.reply(node.id);
  }

  /** Ask for a reply to what stands behind `parent`. */
  async reply(parent) {
    if (this.busy) return;
    const { conversation } = this;
    const node = add(conversation, parent, { role: "assistant", model: conversation.model });
    const controller = new AbortController();
    const running = { node, controller };
    this.running = running;
    this.waitingFor = null;
    this.draw();
    this.stick(true);
    announce("The reply is being written.");
    const watching = this.watchLoading(node);
    let drawing = false;
    const changed = () => {
      if (this.conversation === conversation) this.save();
      if (drawing) return;
      drawing = true;
      requestAnimationFrame(() => {
        drawing = false;
        if (this.conversation === conversation) this.drawNode(node);
      });
    };
    await run(this.api, conversation, node, controller.signal, changed);
    clearInterval(watching);
    if (this.running === running) this.running = null;
    conversation.updated = Date.now();
    await this.save(true, conversation);
    if (this.conversation !== conversation) return;
    this.draw();
    this.finished(node);
  }

  async finished(node) {
    announce(node.error ? `Error: ${node.error.message}` : node.calls?.length ? `The model calls ${node.calls.map((call) => call.name).join(", ")}.` : `The reply is complete: ${node.content.slice(0, 300)}`);
    if (node.usage && this.context) this.composer.meter(node.usage.total_tokens);
    if (this.context === null || this.row?.state !== "ready") await this.loadModels();
    const asked = this.conversation.nodes[node.parent];
    if (!node.error && asked?.role === "user" && asked.tokens === undefined && asked.content) {
      const tokens = await this.api.count(this.conversation.model, { prompt: asked.content, add_special_tokens: false });
      if (tokens !== null) {
        asked.tokens = tokens;
        this.drawNode(asked);
        this.save();
      }
    }
  }

  /** Say how far loading is, while a reply waits for its model. */
  watchLoading(node) {
    return setInterval(async () => {
      if (node.state !== "waiting") return;
      this.engine = await this.api.engine().catch(() => this.engine);
      const progress = this.row?.progress;
      const share = progress?.share ? ` ${Math.round(progress.share * 100)}%` : "";
      this.waitingFor = progress ? `Loading ${this.conversation.model}: ${progress.phase}${share}` : null;
      if (node.state === "waiting") this.drawNode(node);
    }, PROGRESS_MS);
  }

  stop() {
    this.running?.controller.abort();
  }

  regenerate(node) {
    return this.reply(node.parent);
  }

  edited(node, content) {
    const kept = node.role === "user" ? { images: node.images } : { model: node.model };
    const made = add(this.conversation, node.parent, { role: node.role, content, ...kept });
    this.draw();
    this.save();
    if (node.role === "user") this.reply(made.id);
  }

  withoutImages(node) {
    const asked = this.conversation.nodes[node.parent];
    for (let at = asked; at; at = this.conversation.nodes[at.parent]) delete at.images;
    this.views.clear();
    by("log").replaceChildren();
    if (asked.content) return this.reply(asked.id);
    toast("There is no text to send.");
    return this.draw();
  }

  /** Results of all calls of `node`, one text each. */
  answerCalls(node, texts) {
    let parent = node.id;
    node.calls.forEach((call, i) => (parent = add(this.conversation, parent, { role: "tool", call: call.id, name: call.name, content: texts[i] }).id));
    return this.reply(parent);
  }

  turn(node, step) {
    if (this.busy || !turn(this.conversation, node, step)) return;
    this.draw();
    this.save();
    const shown = path(this.conversation).find((one) => one.parent === node.parent);
    const { index, count } = siblings(this.conversation, shown);
    announce(`Version ${index + 1} of ${count}`);
    this.focusMessage(shown.id);
  }

  editLast() {
    const last = path(this.conversation).filter((node) => node.role === "user").at(-1);
    if (!last || this.busy) return false;
    this.views.get(last.id)?.edit();
    return true;
  }

  async changeKey() {
    if (await askForKey(this.api, { message: "The key is not right." })) await this.loadModels();
  }

  // ---- drawing ----

  draw() {
    const log = by("log");
    const nodes = path(this.conversation);
    const shown = nodes.filter((node) => node.role !== "tool");
    for (const [id, view] of this.views) {
      if (!shown.some((node) => node.id === id)) {
        view.element.remove();
        this.views.delete(id);
      }
    }
    let before = null;
    for (const node of shown) {
      if (!this.views.has(node.id)) this.views.set(node.id, new MessageView(this, node));
      const { element } = this.views.get(node.id);
      if ((before ? before.nextSibling : log.firstChild) !== element) log.insertBefore(element, before ? before.nextSibling : log.firstChild);
      before = element;
      this.drawNode(node, nodes, true);
    }
    by("empty").hidden = shown.length > 0;
    this.drawTitle();
    this.composer.state();
    this.composer.count();
    this.stick();
  }

  drawNode(node, nodes = path(this.conversation), fresh = false) {
    const view = this.views.get(node.id);
    if (!view) return;
    const from = nodes.indexOf(node) + 1;
    const results = [];
    for (let i = from; nodes[i]?.role === "tool"; i += 1) results.push(nodes[i]);
    if (fresh) view.drawnState = undefined;
    view.draw(results);
    this.stick();
  }

  drawTitle() {
    const title = titleOf(this.conversation);
    by("title").textContent = title;
    document.title = Object.keys(this.conversation.nodes).length ? `${title} · herd` : "herd";
  }

  drawEmpty() {
    const { row } = this;
    const facts = row?.parameters ? [`${parameters(row.parameters)} parameters`, row.kind, counted(row.context, "token")].join(" · ") : row ? { unloaded: "loaded with the first message", loading: "loading", failed: row.error }[row.state] ?? "" : "";
    by("empty").replaceChildren(
      h("img", { src: "web/icon.svg", alt: "", width: "56", height: "56" }),
      h("p.greeting", {}, this.conversation.model || "herd"),
      h("p.hint", {}, facts),
      h("div.starters", {}, STARTERS.map((text) => h("button", { type: "button", onclick: () => this.send(text, []) }, text))),
    );
  }

  /** Stay at the end while the reader is there. */
  stick(force = false) {
    const scroll = by("scroll");
    if (force) this.atEnd = true;
    if (this.atEnd) scroll.scrollTop = scroll.scrollHeight;
    by("latest").hidden = this.atEnd;
  }

  focusMessage(id) {
    this.views.get(id)?.element.focus({ preventScroll: false });
  }

  /** The message that has the focus, or the last. */
  get focused() {
    const id = document.activeElement?.closest("[data-node]")?.dataset.node;
    return this.conversation.nodes[id] ?? path(this.conversation).filter((node) => node.role !== "tool").at(-1);
  }

  step(by_) {
    const shown = path(this.conversation).filter((node) => node.role !== "tool");
    const inside = document.activeElement?.closest("[data-node]");
    const at = inside ? shown.findIndex((node) => node.id === inside.dataset.node) : shown.length;
    const node = shown[Math.max(0, Math.min(shown.length - 1, at + by_))];
    if (node) this.focusMessage(node.id);
  }
}

/** The model that was chosen last in this browser. */
export const lastModel = {
  get: () => localStorage.getItem("herd.model") ?? "",
  set: (name) => localStorage.setItem("herd.model", name),
};
