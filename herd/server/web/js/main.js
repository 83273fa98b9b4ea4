// The chat page: what its buttons and keys do.

import { App, lastModel } from "./app.js";
import { toast } from "./dialogs.js";
import { by, copyText, h, icon } from "./dom.js";
import { listen, showHelp } from "./shortcuts.js";
import { NARROW } from "./sides.js";
import { Store } from "./store.js";
import { switchTheme, themeButton } from "./theme.js";
import { path } from "./tree.js";

function dress(id, drawing, label, onclick) {
  const button = by(id);
  button.replaceChildren(icon(drawing));
  if (label) Object.assign(button, { title: label, ariaLabel: label });
  if (onclick) button.addEventListener("click", onclick);
}

async function start() {
  const app = new App(await Store.open());
  dress("new", "plus", "New conversation", () => app.newOne());
  dress("close-sidebar", "close", "Close the list", () => app.sides.sidebar(false));
  dress("open-sidebar", "menu", "Conversations", () => app.sides.sidebar());
  dress("to-engine", "pulse");
  dress("help", "help", "Keys", showHelp);
  dress("open-panel", "tune", "Settings", () => app.sides.panel());
  dress("latest", "down", "To the latest message", () => app.stick(true));
  dress("attach", "image", "Attach pictures");
  themeButton(by("theme"));
  by("panel").querySelector(".panel-body").append(h("section", {}, h("h3", {}, "This conversation"), h("div.actions.left", {},
    h("button", { type: "button", onclick: () => app.export(app.conversation.id, true) }, "Save as markdown"),
    h("button", { type: "button", onclick: () => app.export(app.conversation.id) }, "Save as JSON"),
    h("button", { type: "button", onclick: () => app.changeKey() }, "API key"))));
  by("export-all").addEventListener("click", () => app.exportAll());
  by("import").addEventListener("click", () => by("import-file").click());
  by("import-file").addEventListener("change", ({ target }) => {
    if (target.files[0]) app.import(target.files[0]);
    target.value = "";
  });
  by("model").addEventListener("change", ({ target }) => {
    app.conversation.model = target.value;
    lastModel.set(target.value);
    app.drawModels();
    app.save();
  });
  by("scroll").addEventListener("scroll", ({ target }) => {
    app.atEnd = target.scrollHeight - target.scrollTop - target.clientHeight < 40;
    by("latest").hidden = app.atEnd;
  }, { passive: true });
  addEventListener("pagehide", () => app.save(true));
  listen({
    escape: () => {
      if (document.activeElement?.closest("article.editing")) return false;
      if (app.busy) app.stop();
      else if (!app.sides.closeOver()) by("draft").focus();
      return true;
    },
    write: () => by("draft").focus(),
    fresh: () => app.newOne(),
    search: () => (app.sides.sidebar(true), by("search").select()),
    settings: () => app.sides.panel(),
    again: () => {
      const last = path(app.conversation).filter((node) => node.role === "assistant").at(-1);
      if (last && !app.busy) app.regenerate(last);
    },
    copy: async () => {
      const last = path(app.conversation).filter((node) => node.role === "assistant").at(-1);
      if (last && (await copyText(last.content))) toast("The last reply is copied.");
    },
    theme: () => switchTheme(),
    down: () => app.step(1),
    up: () => app.step(-1),
    left: () => app.focused && app.turn(app.focused, -1),
    right: () => app.focused && app.turn(app.focused, 1),
    help: showHelp,
  });
  app.show(app.conversation);
  app.sides.update();
  await app.sidebar.refresh();
  if (app.store.problem) toast(`This browser keeps nothing (${app.store.problem}): export what should last.`);
  await app.loadModels();
  if (!NARROW.matches) by("draft").focus();
  document.body.dataset.ready = "yes";
}

start();
