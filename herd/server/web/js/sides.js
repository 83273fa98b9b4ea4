// The conversations on the left and the settings on the right: open or not. On narrow windows they lie over the messages.

import { by } from "./dom.js";

export const NARROW = matchMedia("(max-width: 56rem)");

export class Sides {
  constructor() {
    NARROW.addEventListener("change", () => this.update());
    by("shade").addEventListener("click", () => this.closeOver());
  }

  get sidebarOpen() {
    const { classList } = document.body;
    return NARROW.matches ? classList.contains("sidebar-over") : !classList.contains("no-sidebar");
  }

  get panelOpen() {
    return document.body.classList.contains("panel-open");
  }

  /** Open or close the conversations; with `onlyNarrow` nothing happens where there is room for them. */
  sidebar(open = !this.sidebarOpen, onlyNarrow = false) {
    if (onlyNarrow && !NARROW.matches) return;
    const inside = by("sidebar").contains(document.activeElement);
    document.body.classList.toggle(NARROW.matches ? "sidebar-over" : "no-sidebar", NARROW.matches ? open : !open);
    if (open && NARROW.matches) document.body.classList.remove("panel-open");
    this.update();
    if (open) by("search").focus();
    else if (inside) by("open-sidebar").focus();
  }

  panel(open = !this.panelOpen) {
    const inside = by("panel").contains(document.activeElement);
    document.body.classList.toggle("panel-open", open);
    if (open && NARROW.matches) document.body.classList.remove("sidebar-over");
    this.update();
    if (open) by("system").focus();
    else if (inside) by("open-panel").focus();
  }

  /** Close what lies over the messages. Whether there was something. */
  closeOver() {
    if (this.panelOpen) this.panel(false);
    else if (NARROW.matches && this.sidebarOpen) this.sidebar(false);
    else return false;
    return true;
  }

  /** What is not seen is not reached by keys either. */
  update() {
    const [sidebar, panel] = [this.sidebarOpen, this.panelOpen];
    by("sidebar").inert = !sidebar;
    by("panel").inert = !panel;
    by("main").inert = NARROW.matches && (sidebar || panel);
    by("shade").hidden = !(NARROW.matches && (sidebar || panel));
    by("open-panel").setAttribute("aria-expanded", String(panel));
    by("open-sidebar").setAttribute("aria-expanded", String(sidebar));
  }
}
