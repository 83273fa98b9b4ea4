// The settings of a conversation: system prompt, sampling (empty fields are the model's own), tools.

import { by, h, iconButton } from "./dom.js";
import { parseTools } from "./reply.js";

const NUMBERS = [
  { name: "temperature", label: "Temperature", min: 0, max: 10, step: 0.05, help: "0 always takes the likeliest token" },
  { name: "top_p", label: "Top-p", min: 0.01, max: 1, step: 0.01, help: "the likeliest tokens that together have this probability" },
  { name: "top_k", label: "Top-k", min: 0, max: 100000, step: 1, help: "only so many tokens; 0 is all" },
  { name: "min_p", label: "Min-p", min: 0, max: 1, step: 0.01, help: "tokens at least this likely beside the likeliest" },
  { name: "max_tokens", label: "Most tokens", min: 1, max: 1000000, step: 1, help: "of one reply" },
  { name: "seed", label: "Seed", min: 0, max: Number.MAX_SAFE_INTEGER, step: 1, help: "the same seed, the same reply" },
];
const EXAMPLE = `[
  {
    "name": "get_weather",
    "description": "The weather of a place now",
    "parameters": {
      "type": "object",
      "properties": { "city": { "type": "string" } },
      "required": ["city"]
    }
  }
]`;

export class Settings {
  /** `changed()` is called when the user has changed something. */
  constructor(changed, close) {
    this.changed = changed;
    this.fields = {};
    this.system = h("textarea", { id: "system", rows: "4", placeholder: "How the model should be", onchange: () => this.read(), oninput: () => this.read() });
    this.stop = h("textarea", { id: "stop", rows: "2", spellcheck: "false", "aria-describedby": "stop-help", oninput: () => this.read() });
    this.truncate = h("input", { type: "checkbox", id: "truncate", onchange: () => this.read() });
    this.tools = h("textarea.mono", { id: "tools", rows: "8", spellcheck: "false", autocapitalize: "off", placeholder: EXAMPLE, "aria-describedby": "tools-problem", oninput: () => this.read() });
    this.problem = h("p.problem", { id: "tools-problem", role: "status" });
    this.endpoint = h("input", { id: "endpoint", type: "url", placeholder: "http://127.0.0.1:9000/call", spellcheck: "false", "aria-describedby": "endpoint-help", oninput: () => this.read() });
    this.facts = h("dl.facts");
    by("panel").replaceChildren(
      h("div.bar", {}, h("h2", {}, "Settings"), h("span.space"), iconButton("close", "Close the settings", close)),
      h("div.panel-body", {},
        h("section", {}, h("label", { for: "system" }, "System prompt"), this.system),
        h("section", {}, h("h3", {}, "Sampling"), h("div.numbers", {}, NUMBERS.map((one) => this.number(one))),
          h("label", { for: "stop" }, "Stop at"), this.stop, h("p.hint", { id: "stop-help" }, "one text a line, four at most; \\n is a line break"),
          h("label.check", {}, this.truncate, "Leave out the oldest messages when the context is full"),
          h("button.quiet", { type: "button", onclick: () => this.reset() }, "Back to the model's defaults")),
        h("section", {}, h("label", { for: "tools" }, "Tools"), this.tools, this.problem,
          h("button.quiet", { type: "button", onclick: () => this.example() }, "Put in an example"),
          h("label", { for: "endpoint" }, "Tool endpoint"), this.endpoint,
          h("p.hint", { id: "endpoint-help" }, "on this computer; gets {name, arguments} when you say so, and answers with the result")),
        h("section", {}, h("h3", {}, "Model"), this.facts)),
    );
  }

  number({ name, label, min, max, step, help }) {
    const field = h("input", { type: "number", id: `set-${name}`, min, max, step: "any", inputmode: "decimal", "data-step": step, "aria-describedby": `help-${name}`, oninput: () => this.read() });
    this.fields[name] = field;
    return h("div", {}, h("label", { for: `set-${name}` }, label), field, h("p.hint", { id: `help-${name}` }, help));
  }

  /** Show the settings of a conversation. */
  show(conversation) {
    this.conversation = conversation;
    const { settings } = conversation;
    this.system.value = conversation.system;
    for (const { name } of NUMBERS) this.fields[name].value = settings[name] ?? "";
    this.stop.value = settings.stop ?? "";
    this.truncate.checked = settings.truncate === true;
    this.tools.value = settings.tools ?? "";
    this.endpoint.value = settings.endpoint ?? "";
    this.check();
  }

  /** Show what the model does where nothing is said, and what it is. */
  defaults(defaults, facts) {
    for (const { name } of NUMBERS) {
      const value = defaults?.[name];
      this.fields[name].placeholder = name === "seed" ? "random" : value !== undefined && value !== null ? String(value) : name === "max_tokens" ? "no limit" : "default";
    }
    this.facts.replaceChildren(...facts.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
  }

  read() {
    const { conversation } = this;
    conversation.system = this.system.value;
    const settings = { ...conversation.settings };
    for (const { name, min, max, step } of NUMBERS) {
      const field = this.fields[name];
      const value = field.value === "" ? null : Number(field.value);
      const good = value === null || (value >= min && value <= max && (step !== 1 || Number.isInteger(value)));
      field.setCustomValidity(good ? "" : `from ${min} to ${max}`);
      field.setAttribute("aria-invalid", String(!good));
      if (value === null) delete settings[name];
      else if (good) settings[name] = value;
    }
    settings.stop = this.stop.value;
    settings.truncate = this.truncate.checked;
    settings.tools = this.tools.value;
    settings.endpoint = this.endpoint.value.trim();
    conversation.settings = settings;
    this.check();
    this.changed();
  }

  check() {
    let said = "";
    try {
      const tools = parseTools(this.tools.value);
      if (tools.length) said = `${tools.length === 1 ? "One tool" : `${tools.length} tools`}: ${tools.map((tool) => tool.function.name).join(", ")}`;
      this.problem.classList.remove("wrong");
    } catch (error) {
      said = error.message;
      this.problem.classList.add("wrong");
    }
    if (this.problem.textContent !== said) this.problem.textContent = said;
    this.tools.setAttribute("aria-invalid", String(this.problem.classList.contains("wrong")));
    const wrong = this.endpoint.value.trim() && !isLocal(this.endpoint.value.trim());
    this.endpoint.setAttribute("aria-invalid", String(Boolean(wrong)));
  }

  example() {
    this.tools.value = EXAMPLE;
    this.read();
    this.tools.focus();
  }

  reset() {
    for (const { name } of NUMBERS) this.fields[name].value = "";
    this.stop.value = "";
    this.truncate.checked = false;
    this.read();
  }
}

/** Whether an address is one that the page may call: this server, or this computer. */
export function isLocal(address) {
  try {
    const url = new URL(address, document.baseURI);
    return url.origin === location.origin || (url.protocol === "http:" && ["127.0.0.1", "localhost"].includes(url.hostname));
  } catch {
    return false;
  }
}
