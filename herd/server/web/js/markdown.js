// Markdown as elements. A reply that grows is drawn again from its first changed block on.

import { parseBlocks } from "./blocks.js";
import { copyText, h, icon } from "./dom.js";
import { highlight } from "./highlight.js";
import { parseInline } from "./inline.js";

const LONGEST = 400_000;

/** Draws a text into an element, again and again while it grows. */
export class Drawing {
  constructor(element) {
    this.element = element;
    this.drawn = [];
  }

  update(text) {
    if (text.length > LONGEST) {
      this.drawn = [];
      this.element.replaceChildren(h("pre.plain", {}, text));
      return;
    }
    const blocks = parseBlocks(text);
    let same = 0;
    while (same < blocks.length && same < this.drawn.length && this.drawn[same].source === blocks[same].source) same += 1;
    for (const old of this.drawn.splice(same)) old.node.remove();
    if (same === 0) this.element.replaceChildren();
    for (const block of blocks.slice(same)) {
      const node = drawBlock(block);
      this.drawn.push({ source: block.source, node });
      this.element.append(node);
    }
  }
}

/** A whole text as elements. */
export function drawMarkdown(text) {
  const element = h("div");
  new Drawing(element).update(text);
  return element;
}

function drawBlock(block) {
  switch (block.type) {
    case "heading":
      // the page has the first two levels: what a reply calls 1 is 3 for a screen reader
      return h("p.heading", { role: "heading", "aria-level": String(Math.min(6, block.level + 2)), "data-level": String(block.level) }, inline(block.text));
    case "code":
      return drawCode(block.text, block.language);
    case "math":
      return h("p.math", {}, block.text);
    case "rule":
      return h("hr");
    case "quote":
      return h("blockquote", {}, block.blocks.map(drawBlock));
    case "list":
      return h(block.ordered ? "ol" : "ul", { start: block.ordered && block.start !== 1 ? block.start : null }, block.items.map((item) => drawItem(item, block.loose)));
    case "table":
      return drawTable(block);
    default:
      return h("p", {}, inline(block.text));
  }
}

function drawItem(item, loose) {
  const parts = item.blocks.map((block) => (block.type === "paragraph" && !loose ? inline(block.text) : drawBlock(block)));
  if (item.checked === null) return h("li", {}, parts);
  const box = h("input", { type: "checkbox", checked: item.checked, disabled: true, "aria-label": item.checked ? "done" : "to do" });
  return h("li.task", {}, box, h("div", {}, parts));
}

function drawTable({ align, head, rows }) {
  const cell = (tag) => (text, i) => h(`${tag}${align[i] ? `.${align[i]}` : ""}`, tag === "th" ? { scope: "col" } : {}, inline(text));
  const table = h("table", {}, h("thead", {}, h("tr", {}, head.map(cell("th")))), h("tbody", {}, rows.map((row) => h("tr", {}, row.map(cell("td"))))));
  return h("div.table", { tabindex: "0", role: "region", "aria-label": "Table" }, table);
}

/** A block of code with its language, colours and a button that copies it. */
export function drawCode(text, language = "") {
  const said = h("span", {}, "Copy");
  const button = h("button.quiet.copy", {
    type: "button",
    "aria-label": "Copy this code",
    onclick: async () => {
      said.textContent = (await copyText(text)) ? "Copied" : "Not copied";
      setTimeout(() => (said.textContent = "Copy"), 1600);
    },
  }, icon("copy"), said);
  const parts = highlight(text, language).map(([kind, part]) => (kind === null ? part : h(`span.${kind}`, {}, part)));
  const label = language ? `Code, ${language}` : "Code";
  return h("div.code", {}, h("div.code-head", {}, h("span", {}, language || "text"), button), h("pre", { tabindex: "0", role: "region", "aria-label": label }, h("code", {}, parts)));
}

function inline(text) {
  return parseInline(text).map(drawInline);
}

function drawInline(node) {
  switch (node.type) {
    case "text":
      return node.text;
    case "code":
      return h("code", {}, node.text);
    case "math":
      return h("span.math", {}, node.text);
    case "break":
      return h("br");
    case "link":
      return h("a", { href: node.href, target: "_blank", rel: "noopener noreferrer nofollow", title: node.href }, node.children.map(drawInline));
    case "image":
      // not fetched: an address that a model makes up can carry what was said to somebody else
      return node.href === null
        ? node.text
        : h("a.picture", { href: node.href, target: "_blank", rel: "noopener noreferrer nofollow", title: node.href }, icon("image"), node.text || "picture");
    default:
      return h({ strong: "strong", em: "em", strike: "s" }[node.type], {}, node.children.map(drawInline));
  }
}
