// Where messages are written: text, pictures, and how much of the context they take.

import { by, h, icon, iconButton } from "./dom.js";
import { count } from "./format.js";
import { MOST_IMAGES, imagesIn, readImage } from "./images.js";
import { toast } from "./dialogs.js";

const COUNT_AFTER_MS = 350;

export class Composer {
  /** `app` sends, stops and counts. */
  constructor(app) {
    this.app = app;
    this.field = by("draft");
    this.images = [];
    this.counting = null;
    by("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit();
    });
    this.field.addEventListener("keydown", (event) => this.key(event));
    this.field.addEventListener("input", () => this.changed());
    this.field.addEventListener("paste", (event) => {
      const files = imagesIn(event.clipboardData);
      if (files.length) event.preventDefault();
      this.attach(files);
    });
    const file = by("attach-file");
    by("attach").addEventListener("click", () => file.click());
    file.addEventListener("change", () => {
      this.attach([...file.files]);
      file.value = "";
    });
    const main = by("main");
    for (const kind of ["dragenter", "dragover"]) {
      main.addEventListener(kind, (event) => {
        if (!event.dataTransfer?.types.includes("Files")) return;
        event.preventDefault();
        main.classList.add("dropping");
      });
    }
    main.addEventListener("dragleave", (event) => !main.contains(event.relatedTarget) && main.classList.remove("dropping"));
    main.addEventListener("drop", (event) => {
      main.classList.remove("dropping");
      if (!event.dataTransfer?.types.includes("Files")) return;
      event.preventDefault();
      const files = imagesIn(event.dataTransfer);
      if (!files.length) toast("Only pictures can be attached.");
      this.attach(files);
    });
  }

  key(event) {
    if (event.isComposing) return;
    const touch = matchMedia("(pointer: coarse)").matches;
    if (event.key === "Enter" && !event.shiftKey && !event.altKey && !touch) {
      event.preventDefault();
      this.submit();
    } else if (event.key === "ArrowUp" && this.field.value === "" && this.app.editLast()) {
      event.preventDefault();
    }
  }

  submit() {
    if (this.app.busy) {
      this.app.stop();
      return;
    }
    const text = this.field.value.trim();
    if (!text && !this.images.length) return;
    const images = this.images.splice(0);
    this.field.value = "";
    this.drawImages();
    this.grow();
    this.app.send(text, images);
  }

  changed() {
    this.grow();
    this.state();
    this.count();
  }

  /** As high as its text, where the browser does not do that by itself. */
  grow() {
    if (CSS.supports("field-sizing", "content")) return;
    this.field.style.height = "auto";
    this.field.style.height = `${Math.min(this.field.scrollHeight, innerHeight * 0.4)}px`;
  }

  async attach(files) {
    for (const file of files) {
      if (this.images.length >= MOST_IMAGES) {
        toast(`${MOST_IMAGES} pictures are the most of one message.`);
        break;
      }
      try {
        this.images.push(await readImage(file));
      } catch (error) {
        toast(error.message);
      }
    }
    this.drawImages();
    this.state();
  }

  drawImages() {
    const place = by("attached");
    place.hidden = !this.images.length;
    place.replaceChildren(...this.images.map((image, i) =>
      h("li", {}, h("img", { src: image.url, alt: image.name }), iconButton("close", `Remove ${image.name}`, () => {
        this.images.splice(i, 1);
        this.drawImages();
        this.state();
        this.field.focus();
      }))));
  }

  /** Send, or stop while a reply is written. */
  state() {
    const { busy } = this.app;
    const send = by("send");
    const label = busy ? "Stop the reply" : "Send";
    if (send.title !== label) send.replaceChildren(icon(busy ? "stop" : "send"));
    send.title = label;
    send.setAttribute("aria-label", label);
    send.disabled = !busy && !this.field.value.trim() && !this.images.length;
  }

  /** Count the conversation with what is written, a moment after the last key. */
  count() {
    clearTimeout(this.timer);
    this.counting?.abort();
    this.timer = setTimeout(async () => {
      this.counting = new AbortController();
      const used = await this.app.countContext(this.field.value.trim(), this.counting.signal).catch(() => undefined);
      if (used !== undefined) this.meter(used);
    }, COUNT_AFTER_MS);
  }

  /** `used` tokens of the model's context; null when that is not known. */
  meter(used) {
    const { context } = this.app;
    const share = used !== null && context ? Math.min(1, used / context) : 0;
    const text = context === null ? "" : used === null ? `${count(context)} tokens of context` : `${count(used)} of ${count(context)} tokens · ${count(Math.max(0, context - used))} left`;
    by("meter-text").textContent = text;
    const bar = by("meter-bar");
    bar.hidden = used === null || !context;
    bar.firstElementChild.style.inlineSize = `${(share * 100).toFixed(1)}%`;
    bar.classList.toggle("full", share > 0.9);
  }
}
