// Keys. One table: what is pressed, what it does, and the help that shows it.

import { h } from "./dom.js";
import { show } from "./dialogs.js";

/** [keys as shown, test of an event, name of what it does, words]. `free`: only where nothing is typed. */
export const SHORTCUTS = [
  { keys: ["Enter"], words: "Send" },
  { keys: ["Shift", "Enter"], words: "New line" },
  { keys: ["Esc"], does: "escape", when: (e) => e.key === "Escape", words: "Stop the reply, or close" },
  { keys: ["↑"], words: "Edit the last message, from an empty field" },
  { keys: ["/"], does: "write", free: true, when: (e) => e.key === "/", words: "Write a message" },
  { keys: ["Alt", "N"], does: "fresh", when: (e) => e.altKey && e.code === "KeyN", words: "New conversation" },
  { keys: ["Ctrl", "K"], does: "search", when: (e) => (e.ctrlKey || e.metaKey) && e.key.toLowerCase() === "k", words: "Search conversations" },
  { keys: ["Alt", "S"], does: "settings", when: (e) => e.altKey && e.code === "KeyS", words: "Settings" },
  { keys: ["Alt", "R"], does: "again", when: (e) => e.altKey && e.code === "KeyR", words: "Another reply to the last message" },
  { keys: ["Alt", "C"], does: "copy", when: (e) => e.altKey && e.code === "KeyC", words: "Copy the last reply" },
  { keys: ["Alt", "D"], does: "theme", when: (e) => e.altKey && e.code === "KeyD", words: "Light or dark" },
  { keys: ["J"], does: "down", free: true, when: (e) => e.key === "j", words: "Next message" },
  { keys: ["K"], does: "up", free: true, when: (e) => e.key === "k", words: "Message before" },
  { keys: ["["], does: "left", free: true, when: (e) => e.key === "[", words: "Other version of the message, back" },
  { keys: ["]"], does: "right", free: true, when: (e) => e.key === "]", words: "Other version of the message, on" },
  { keys: ["?"], does: "help", free: true, when: (e) => e.key === "?", words: "This help" },
];

/** Listen. `actions` are functions by name; one that returns false leaves the key to the browser. */
export function listen(actions) {
  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.isComposing || document.querySelector("dialog[open]")) return;
    const typing = event.target.closest("input, textarea, select, [contenteditable]");
    const found = SHORTCUTS.find((one) => one.when?.(event) && (!one.free || (!typing && !event.ctrlKey && !event.metaKey && !event.altKey)));
    if (found && actions[found.does]?.(event) !== false) event.preventDefault();
  });
}

export function showHelp() {
  return show("Keys", () =>
    h("dl.keys", {}, SHORTCUTS.map(({ keys, words }) => h("div", {}, h("dt", {}, words), h("dd", {}, keys.map((key) => h("kbd", {}, key)))))),
  );
}
