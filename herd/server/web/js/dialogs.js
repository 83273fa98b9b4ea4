// Questions to the user, in the browser's own dialogs: focus stays inside, Escape leaves, the place before is kept.

import { h, iconButton } from "./dom.js";

let made = 0;

/** Show a dialog of `content`; what `close(value)` was given, or null when the user left. */
export function show(title, build, { wide = false } = {}) {
  return new Promise((resolve) => {
    const id = `dialog-${(made += 1)}`;
    const dialog = h(wide ? "dialog.wide" : "dialog", { "aria-labelledby": id });
    let value = null;
    const close = (given = null) => {
      value = given;
      dialog.close();
    };
    dialog.append(h("div.bar", {}, h("h2", { id }, title), h("span.space"), iconButton("close", "Close", () => close())), build(close));
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(value);
    });
    dialog.addEventListener("pointerdown", (event) => event.target === dialog && close());
    document.body.append(dialog);
    dialog.showModal();
    (dialog.querySelector("[autofocus]") ?? dialog.querySelector("button.primary"))?.focus();
  });
}

/** Whether the user says yes. */
export async function confirm(title, text, yes) {
  const answer = await show(title, (close) =>
    h("form", { onsubmit: (event) => (event.preventDefault(), close(true)) }, h("p", {}, text), h("div.actions", {}, h("button", { type: "button", onclick: () => close() }, "Cancel"), h("button.danger", { type: "submit", autofocus: true }, yes))),
  );
  return answer === true;
}

/** A text of the user's, or null. */
export function ask(title, label, value, done) {
  return show(title, (close) => {
    const field = h("input", { type: "text", value, autofocus: true, required: true, maxlength: "200" });
    return h("form", { onsubmit: (event) => (event.preventDefault(), close(field.value.trim())) }, h("label.stacked", {}, label, field), h("div.actions", {}, h("button", { type: "button", onclick: () => close() }, "Cancel"), h("button.primary", { type: "submit" }, done)));
  });
}

/** Ask for an API key and keep it: until the tab is closed, or for good. Whether there is one. */
export function askForKey(api, failure) {
  return show("API key", (close) => {
    const field = h("input", { type: "password", autofocus: true, required: true, autocomplete: "off", spellcheck: "false", name: "key" });
    const always = h("input", { type: "checkbox" });
    const submit = (event) => {
      event.preventDefault();
      api.keep(field.value.trim(), always.checked);
      close(true);
    };
    return h("form", { onsubmit: submit },
      h("p", {}, "This server answers only who has a key."),
      api.key ? h("p.cause", {}, failure.message) : null,
      h("label.stacked", {}, "Key", field),
      h("label.check", {}, always, "Keep it in this browser"),
      h("div.actions", {}, h("button", { type: "button", onclick: () => close() }, "Cancel"), h("button.primary", { type: "submit" }, "Use this key")),
    );
  }).then((answer) => answer === true);
}

/** A short notice that goes by itself, with something to do about it if `action` is [label, function]. */
export function toast(text, action = null) {
  const notice = h("div.toast", {}, h("span", {}, text));
  if (action) notice.append(h("button.quiet", { type: "button", onclick: () => (notice.remove(), action[1]()) }, action[0]));
  notice.append(iconButton("close", "Close", () => notice.remove()));
  document.getElementById("toasts").append(notice);
  setTimeout(() => notice.remove(), action ? 12_000 : 7000);
}
