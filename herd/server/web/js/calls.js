// Tool calls of a reply and their results: typed by the user, or asked of an endpoint on this computer.

import { drawCode } from "./markdown.js";
import { h, icon } from "./dom.js";
import { isLocal } from "./settings.js";

const LONGEST_RESULT = 64 * 1024;
const CALL_SECONDS = 30;

/** The calls of `node`. `results` are the tool nodes behind it; `answer(texts)` sends one result for each call. */
export function drawCalls(node, results, { endpoint, busy, answer }) {
  const fields = [];
  const editing = results.length < node.calls.length && !busy && !node.state;
  const cards = node.calls.map((call, i) => {
    const result = results.find((one) => one.call === call.id);
    const card = h("div.call", {}, h("div.call-head", {}, icon("tool"), h("code", {}, call.name)), drawCode(pretty(call.arguments), "json"));
    if (result) card.append(h("div.result", {}, h("span.label", {}, "Result"), h("pre", { tabindex: "0", role: "region", "aria-label": `Result of ${call.name}` }, result.content)));
    else if (editing) {
      const field = h("textarea.mono", { rows: "2", "aria-label": `Result of ${call.name}, call ${i + 1}`, placeholder: "What the tool answers", spellcheck: "false" });
      fields.push(field);
      card.append(h("div.result", {}, h("span.label", {}, "Result"), field));
    }
    return card;
  });
  const group = h("div.calls", {}, cards);
  if (editing) group.append(form(node, fields, endpoint, answer));
  return group;
}

function form(node, fields, endpoint, answer) {
  const problem = h("p.problem.wrong", { role: "alert" });
  const send = h("button.primary", { type: "button", onclick: () => answer(fields.map((field) => field.value)) }, fields.length > 1 ? "Send the results" : "Send the result");
  const actions = h("div.actions", {}, send);
  if (endpoint) {
    const call = h("button", { type: "button" }, "Ask the endpoint");
    call.addEventListener("click", async () => {
      call.disabled = true;
      problem.textContent = "";
      try {
        const texts = await Promise.all(node.calls.map((one) => askEndpoint(endpoint, one)));
        texts.forEach((text, i) => (fields[i].value = text));
        send.focus();
      } catch (error) {
        problem.textContent = error.message;
      }
      call.disabled = false;
    });
    actions.prepend(call);
  }
  for (const field of fields) {
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) send.click();
    });
  }
  return h("div", {}, problem, actions);
}

/** What an endpoint answers to a call. Throws Error saying why there is nothing. */
export async function askEndpoint(endpoint, call) {
  if (!isLocal(endpoint)) throw new Error("The tool endpoint must be on this computer (http://127.0.0.1 or http://localhost) or on this server.");
  let given;
  try {
    given = JSON.parse(call.arguments || "{}");
  } catch {
    throw new Error(`The arguments of ${call.name} are no JSON: the endpoint was not asked.`);
  }
  let response;
  try {
    // no cookies, no key of ours: the endpoint is somebody else's
    response = await fetch(endpoint, {
      method: "POST", credentials: "omit", redirect: "error", headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ name: call.name, arguments: given }), signal: AbortSignal.timeout(CALL_SECONDS * 1000),
    });
  } catch (error) {
    throw new Error(error.name === "TimeoutError" ? `The endpoint took more than ${CALL_SECONDS} s.` : "The endpoint cannot be reached, or does not allow this page (CORS).");
  }
  const text = await response.text();
  if (!response.ok) throw new Error(`The endpoint answered ${response.status}: ${text.slice(0, 200)}`);
  return text.length > LONGEST_RESULT ? `${text.slice(0, LONGEST_RESULT)}\n[${text.length - LONGEST_RESULT} more characters were left out]` : text;
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text; // still being written
  }
}
