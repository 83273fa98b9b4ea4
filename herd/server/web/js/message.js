// One message on the page. It is drawn again whenever its node changes; what grows keeps its elements.

import { drawCalls } from "./calls.js";
import { copyText, h, icon, iconButton } from "./dom.js";
import { count, counted, rate, time } from "./format.js";
import { Drawing } from "./markdown.js";
import { siblings } from "./tree.js";

export class MessageView {
  /** `app` does what the buttons say. */
  constructor(app, node) {
    this.app = app;
    this.node = node;
    const who = node.role === "user" ? "You" : node.model || "Model";
    this.body = h("div.prose");
    this.images = h("div.images");
    this.extra = h("div.extra");
    this.foot = h("footer");
    this.element = h(`article.message.${node.role}`, { tabindex: "-1", "aria-label": node.role === "user" ? "You" : `Reply of ${who}`, "data-node": node.id },
      node.role === "assistant" ? h("div.who", {}, who) : null, this.images, this.body, this.extra, this.foot);
    this.drawing = new Drawing(this.body);
  }

  draw(results = []) {
    const { node } = this;
    if (this.editing) return;
    if (node.role === "user") this.body.textContent = node.content;
    else this.drawing.update(node.content);
    this.body.hidden = !node.content;
    this.element.classList.toggle("writing", node.state === "writing");
    this.drawImages();
    // fields that somebody types into are not thrown away
    const typing = !results.length && document.activeElement?.tagName === "TEXTAREA" && this.extra.contains(document.activeElement);
    if (!typing) this.extra.replaceChildren(...this.extras(results));
    if (!this.foot.contains(document.activeElement) || this.stale()) this.drawFoot();
  }

  stale() {
    return this.drawnState !== this.node.state;
  }

  drawImages() {
    const { images = [] } = this.node;
    if (this.images.childElementCount === images.length) return;
    this.images.replaceChildren(...images.map((image) => h("img", { src: image.url, alt: image.name, width: image.width, height: image.height })));
  }

  extras(results) {
    const { node, app } = this;
    const out = [];
    if (node.truncated) out.push(h("p.note", {}, `${counted(node.truncated.dropped_messages, "older message")} (${counted(node.truncated.dropped_tokens, "token")}) did not fit and were left out of this request.`));
    if (node.state === "waiting") out.push(h("p.waiting", {}, h("span.dots", { "aria-hidden": "true" }, h("i"), h("i"), h("i")), app.waitingFor ?? "Reading"));
    if (node.calls?.length) {
      out.push(drawCalls(node, results, { endpoint: app.conversation.settings.endpoint, busy: app.busy, answer: (texts) => app.answerCalls(node, texts) }));
    }
    if (node.finish === "length") out.push(h("p.note", {}, node.detail === "context_full" ? "The context is full." : "The reply was cut at the most tokens that are allowed."));
    if (node.finish === "stopped") out.push(h("p.note", {}, "Stopped."));
    if (node.error) out.push(this.failure(node.error));
    return out;
  }

  failure({ message, hint, code, status }) {
    const actions = [h("button", { type: "button", onclick: () => this.app.regenerate(this.node) }, icon("again"), "Try again")];
    if (code === "unsupported_content") actions.push(h("button", { type: "button", onclick: () => this.app.withoutImages(this.node) }, "Send without pictures"));
    if (status === 401) actions.push(h("button", { type: "button", onclick: () => this.app.changeKey() }, "Change the key"));
    return h("div.failure", { role: "alert" }, h("p", {}, message), hint ? h("p.hint", {}, hint) : null, h("div.actions", {}, actions));
  }

  drawFoot() {
    const { node, app } = this;
    this.drawnState = node.state;
    if (node.state) {
      this.foot.replaceChildren();
      return;
    }
    const { index, count: many } = siblings(app.conversation, node);
    const parts = [];
    if (many > 1) {
      parts.push(h("span.branches", { role: "group", "aria-label": "Versions" },
        iconButton("left", "Version before", () => app.turn(node, -1), { disabled: index === 0 || app.busy }),
        h("span", { "aria-label": `Version ${index + 1} of ${many}` }, `${index + 1}/${many}`),
        iconButton("right", "Next version", () => app.turn(node, 1), { disabled: index === many - 1 || app.busy })));
    }
    const copy = iconButton("copy", "Copy", async () => {
      const done = await copyText(node.content);
      copy.replaceChildren(icon(done ? "check" : "close"));
      setTimeout(() => copy.replaceChildren(icon("copy")), 1500);
    });
    if (node.content) parts.push(copy);
    parts.push(iconButton("edit", "Edit", () => this.edit(), { disabled: app.busy }));
    if (node.role === "assistant") parts.push(iconButton("again", "Another reply", () => app.regenerate(node), { disabled: app.busy }));
    this.foot.replaceChildren(h("span.tools", {}, parts), h("span.stats", {}, this.stats()));
  }

  /** Tokens, speed and the first token's time, as the server and the clock say. */
  stats() {
    const { node } = this;
    if (node.role === "user") return Number.isInteger(node.tokens) ? counted(node.tokens, "token") : "";
    const parts = [];
    if (node.usage) parts.push(counted(node.usage.completion_tokens, "token"));
    if (node.timings?.predicted_per_second) parts.push(`${rate(node.timings.predicted_per_second)} tok/s`);
    if (node.first !== undefined) parts.push(`first after ${time(node.first)}`);
    const cached = node.usage?.prompt_tokens_details?.cached_tokens;
    if (cached) parts.push(`${count(cached)} of ${count(node.usage.prompt_tokens)} read from the cache`);
    return parts.join(" · ");
  }

  edit() {
    const { node, app } = this;
    this.editing = true;
    const field = h("textarea", { value: node.content, "aria-label": "Edit this message", rows: "3" });
    const done = (keep) => {
      this.editing = false;
      this.element.classList.remove("editing");
      if (keep && field.value !== node.content) app.edited(node, field.value);
      else app.draw();
      app.focusMessage(node.id);
    };
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.preventDefault();
        done(false);
      } else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
        event.preventDefault();
        done(true);
      }
    });
    this.element.classList.add("editing");
    this.body.hidden = false;
    this.drawing = new Drawing(this.body);
    this.body.replaceChildren(field);
    this.extra.replaceChildren();
    this.foot.replaceChildren(h("div.actions", {}, h("button", { type: "button", onclick: () => done(false) }, "Cancel"), h("button.primary", { type: "button", onclick: () => done(true) }, node.role === "user" ? "Send" : "Keep")));
    field.focus();
    field.setSelectionRange(field.value.length, field.value.length);
  }
}
