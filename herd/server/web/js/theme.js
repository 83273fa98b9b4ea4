// Light and dark: the system's choice until the user makes one.

import { icon } from "./dom.js";

const KEY = "herd.theme";
const system = matchMedia("(prefers-color-scheme: dark)");

export const isDark = () => (document.documentElement.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";

/** Make `button` switch, and show what it switches to. */
export function themeButton(button) {
  const draw = () => {
    const label = isDark() ? "Light colours" : "Dark colours";
    button.replaceChildren(icon(isDark() ? "sun" : "moon"));
    button.title = label;
    button.setAttribute("aria-label", label);
  };
  button.addEventListener("click", switchTheme);
  document.addEventListener("herd-theme", draw);
  system.addEventListener("change", draw);
  draw();
}

export function switchTheme() {
  const wanted = isDark() ? "light" : "dark";
  // the system's own choice needs no memory: it may change with the hour
  if ((wanted === "dark") === system.matches) {
    delete document.documentElement.dataset.theme;
    localStorage.removeItem(KEY);
  } else {
    document.documentElement.dataset.theme = wanted;
    localStorage.setItem(KEY, wanted);
  }
  document.dispatchEvent(new Event("herd-theme"));
}
