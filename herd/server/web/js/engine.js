// The engine page: asks once a second while it is seen, and draws the answer.

import { Api, Failure } from "./api.js";
import { blockChart, lineChart, roundUp } from "./chart.js";
import { askForKey } from "./dialogs.js";
import { announce, by, h } from "./dom.js";
import { bytes, count, counted, parameters, rate, time } from "./format.js";
import { themeButton } from "./theme.js";

const EVERY_MS = 1000;
const KEPT = 120; // points of a chart: two minutes

const api = new Api((failure) => askForKey(api, failure));
const history = new Map();
let paused = false;

async function look() {
  try {
    const told = await api.engine();
    by("problem").hidden = true;
    draw(told);
  } catch (error) {
    const text = error instanceof Failure ? `${error.message} ${error.hint}`.trim() : `This page failed: ${error.message}`;
    by("problem").hidden = false;
    if (by("problem").textContent !== text) by("problem").textContent = text;
  }
}

async function run() {
  for (;;) {
    if (!paused && document.visibilityState === "visible") await look();
    await new Promise((resolve) => setTimeout(resolve, EVERY_MS));
  }
}

function draw(told) {
  by("about").textContent = [`herd ${told.version}`, `up for ${time(told.uptime)}`, counted(told.models.length, "model"), told.draining ? "shutting down" : null].filter(Boolean).join(" · ");
  const place = by("models");
  const before = new Map([...place.children].map((element) => [element.dataset.model, element]));
  const cards = told.models.map((model) => {
    remember(model);
    return card(model);
  });
  if (!cards.length) cards.push(h("p.none", {}, "No model has been asked for yet."));
  // only what has changed is drawn again, so that what somebody has selected stays
  const same = cards.length === before.size && cards.every((one) => before.get(one.dataset.model)?.isEqualNode(one));
  if (!same) place.replaceChildren(...cards);
}

function remember({ name, stats }) {
  if (!stats) {
    history.delete(name);
    return;
  }
  const kept = history.get(name) ?? { speed: [], running: [], waiting: [], last: null };
  const now = performance.now() / 1000;
  if (kept.last) {
    const made = stats.generated_tokens - kept.last.made;
    kept.speed.push(Math.max(0, made) / (now - kept.last.at));
  }
  kept.last = { made: stats.generated_tokens, at: now };
  kept.running.push(stats.running);
  kept.waiting.push(stats.waiting);
  for (const list of [kept.speed, kept.running, kept.waiting]) if (list.length > KEPT) list.shift();
  history.set(name, kept);
}

function card(model) {
  const { name, state, stats } = model;
  const known = model.parameters !== null && model.parameters !== undefined;
  const facts = !known ? [] : [model.parameters && `${parameters(model.parameters)} parameters`, model.kind, model.context && `context ${count(model.context)}`, model.format && `prompts of ${model.format}`, model.adapters.length ? `adapters ${model.adapters.join(", ")}` : null, model.aliases.length ? `also ${model.aliases.join(", ")}` : null];
  const element = h("article.model", { "data-model": name },
    h("div.model-head", {}, h("h2", {}, name), h(`span.state.${state}`, {}, state), h("p.hint", {}, model.error ?? (facts.filter(Boolean).join(" · ") || (state === "unloaded" ? "loaded with its first request" : "")))));
  if (model.progress) {
    const share = Math.round((model.progress.share ?? 0) * 100);
    const bar = h("span");
    bar.style.inlineSize = `${share}%`;
    element.append(h("p.hint", {}, `${model.progress.phase} ${share}%`), h("div.progress", { role: "progressbar", "aria-valuenow": String(share), "aria-label": `Loading ${name}` }, bar));
  }
  if (model.memory === null && !stats) return element;
  const figure = (label, value, small) => h("div", {}, h("dt", {}, label), h("dd", {}, value, small ? h("small", {}, small) : null));
  const figures = h("dl.figures", {}, figure("Memory", bytes(model.memory), "of its process, measured"));
  element.append(figures);
  if (!stats) return element;
  const oldest = model.requests[0];
  figures.prepend(
    figure("Running", count(stats.running), model.seqs ? `of ${count(model.seqs)} at once` : null),
    figure("Waiting", count(stats.waiting), oldest === undefined ? "no request" : `the oldest request is ${time(oldest)} old`),
    figure("Speed", rate(stats.tokens_per_second), "tokens a second, of the last steps"),
    figure("Prefix hits", stats.prompt_tokens ? `${Math.round((100 * stats.cached_tokens) / stats.prompt_tokens)}%` : "–", `${count(stats.cached_tokens)} of ${count(stats.prompt_tokens)} prompt tokens`),
  );
  figures.append(figure("Requests", count(stats.requests), `${counted(stats.errors, "error")}, ${counted(stats.preemptions, "preemption")}`));
  figures.append(figure("Generated", count(stats.generated_tokens), `tokens in ${counted(stats.steps, "step")}`));
  element.append(charts(name, stats));
  return element;
}

function charts(name, stats) {
  const kept = history.get(name);
  const top = roundUp(Math.max(...kept.speed, 1));
  const speed = h("div.chart", {}, h("h3", {}, "Tokens a second", h("span", {}, `${rate(kept.speed.at(-1) ?? 0)} now, scale to ${count(top)}`)),
    lineChart([kept.speed], { top, most: KEPT, label: `Tokens a second of ${name} over the last two minutes` }));
  const most = roundUp(Math.max(...kept.running, ...kept.waiting, 1));
  const load = h("div.chart", {}, h("h3", {}, "Requests", h("span", {}, `scale to ${count(most)}`)),
    lineChart([kept.running, kept.waiting], { top: most, most: KEPT, label: `Running and waiting requests of ${name} over the last two minutes` }),
    h("p.key", {}, h("span", {}, h("i.used"), "running"), h("span", {}, h("i.waits"), "waiting")));
  const total = stats.blocks_total;
  const used = stats.blocks_used;
  const cached = stats.blocks_cached;
  const free = Math.max(0, total - used - cached);
  const said = `${count(used)} used, ${count(cached)} remembered, ${count(free)} free of ${count(total)} KV blocks`;
  const { svg, per } = blockChart({ used, cached, total }, said);
  const blocks = h("div.chart.blocks", {}, h("h3", {}, "KV blocks", h("span", {}, per > 1 ? `a square is ${rate(per)} blocks` : `${count(total)}`)), svg,
    h("p.key", {}, h("span", {}, h("i.used"), `${count(used)} used`), h("span", {}, h("i.cached"), `${count(cached)} remembered`), h("span", {}, h("i.free"), `${count(free)} free`)));
  return h("div.charts", {}, speed, load, blocks);
}

themeButton(by("theme"));
by("pause").addEventListener("click", ({ currentTarget }) => {
  paused = !paused;
  currentTarget.textContent = paused ? "Go on" : "Pause";
  currentTarget.setAttribute("aria-pressed", String(paused));
  announce(paused ? "The numbers stand still." : "The numbers move again.");
});
run();
