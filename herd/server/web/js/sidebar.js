// The list of conversations: found by their words, opened, renamed, exported, deleted.

import { ask, confirm } from "./dialogs.js";
import { by, h, iconButton } from "./dom.js";
import { day } from "./format.js";
import { titleOf } from "./tree.js";

export class Sidebar {
  /** `app` opens, renames, removes and exports. */
  constructor(app) {
    this.app = app;
    this.list = by("conversations");
    this.search = by("search");
    this.search.addEventListener("input", () => this.draw());
    this.search.addEventListener("keydown", (event) => {
      if (event.key === "ArrowDown") this.list.querySelector("button")?.focus();
    });
    this.list.addEventListener("keydown", (event) => this.move(event));
    this.all = [];
  }

  async refresh() {
    this.all = await this.app.store.all();
    this.draw();
  }

  draw() {
    const words = this.search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = this.all.filter((one) => words.every((word) => textOf(one).includes(word)));
    this.list.replaceChildren(...found.map((one) => this.row(one)));
    if (!found.length) this.list.append(h("li.none", {}, words.length ? "Nothing has these words." : "Conversations stay in this browser."));
  }

  row(one) {
    const open = one.id === this.app.conversation.id;
    const title = titleOf(one);
    const actions = h("span.row-actions", {},
      iconButton("edit", `Rename ${title}`, async () => {
        const name = await ask("Rename", "Title", title, "Rename");
        if (name) await this.app.rename(one.id, name);
      }),
      iconButton("save", `Export ${title}`, () => this.app.export(one.id)),
      iconButton("trash", `Delete ${title}`, async () => {
        if (await confirm("Delete this conversation?", `“${title}” is only in this browser. It cannot be brought back.`, "Delete")) await this.app.remove(one.id);
      }),
    );
    return h(open ? "li.open" : "li", {},
      h("button.row", { type: "button", "aria-current": open ? "true" : null, onclick: () => this.app.openConversation(one.id) }, h("span.row-title", {}, title), h("span.row-day", {}, day(one.updated))),
      actions,
    );
  }

  /** Arrows go from row to row. */
  move(event) {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step || !event.target.classList.contains("row")) return;
    const rows = [...this.list.querySelectorAll("button.row")];
    const next = rows[rows.indexOf(event.target) + step];
    (next ?? (step < 0 ? this.search : null))?.focus();
    event.preventDefault();
  }
}

function textOf(conversation) {
  return [titleOf(conversation), ...Object.values(conversation.nodes).map((node) => node.content)].join("\n").toLowerCase();
}
