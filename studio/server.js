// The queue and the memory of each runner, asked for every two seconds while they are looked at.

import { $, badge, bytes, clearProblem, make, showProblem } from "./dom.js";
import { asProblem, call, json } from "./http.js";

const EVERY_MS = 2000;
let timer = 0;
let turn = 0; // of those who ask, only the latest goes on

/** Begin or stop asking. */
export function watch(on) {
  clearTimeout(timer);
  turn += 1;
  if (on) ask(turn);
}

async function ask(mine) {
  try {
    if (!document.hidden) show((await json("/buffer_status")).runners);
    clearProblem($("server-problem"));
  } catch (error) {
    showProblem($("server-problem"), asProblem(error));
  }
  if (mine === turn) timer = setTimeout(ask, EVERY_MS, mine);
}

function show(runners) {
  for (const runner of runners) {
    const id = `runner-${runner.service}`;
    const box = document.getElementById(id) ?? $("runners").appendChild(make("section", { id, "aria-labelledby": `${id}-name` }));
    const focused = box.contains(document.activeElement) ? document.activeElement.id : null;
    box.replaceChildren(make("h2", { id: `${id}-name` }, runner.service), ...(runner.problem ? [badge("✗ down", "warning"), make("p", {}, runner.problem.detail)] : told(runner)));
    if (focused) document.getElementById(focused)?.focus();
  }
}

function told(runner) {
  const { queue } = runner;
  const state = runner.draining ? badge("shutting down", "warning") : runner.ready ? badge("✓ ready", "good") : badge("warming up");
  const inMemory = runner.models.filter((model) => model.state !== "cold");
  const cold = runner.models.length - inMemory.length;
  return [
    make("p", { className: "badges" }, state, badge(runner.device)),
    make("p", {}, `${queue.running} running, ${queue.waiting} of at most ${queue.limit} waiting${queue.mean_service_s ? `, ${queue.mean_service_s.toFixed(1)} s each` : ""}`),
    queue.progress ? make("p", {}, `${queue.progress.model_id}: step ${queue.progress.steps_done}${queue.progress.steps ? ` of ${queue.progress.steps}` : ""} `, make("progress", { "aria-label": "Steps", max: queue.progress.steps ?? 1, value: queue.progress.steps ? queue.progress.steps_done : 0 })) : null,
    make(
      "p",
      {},
      `Memory: ${bytes(runner.resident_bytes)} of ${bytes(runner.memory_budget_bytes)} `,
      make("meter", { "aria-label": `Memory of ${runner.service}`, min: 0, max: runner.memory_budget_bytes, value: runner.resident_bytes }),
    ),
    inMemory.length ? table(inMemory) : null,
    make("p", { className: "hint" }, inMemory.length ? `${cold} more not in memory.` : `None of its ${cold} models is in memory.`),
  ].filter(Boolean);
}

function table(models) {
  const head = ["Model", "State", "Memory", "Precision", "LoRAs", "Unloads in", ""].map((text) => make("th", { scope: "col" }, text || make("span", { className: "hidden" }, "Actions")));
  return make("div", { className: "scroll" }, make("table", {}, make("thead", {}, make("tr", {}, head)), make("tbody", {}, models.map(row))));
}

function row(model) {
  const unloads = model.unload_in_s === null ? "" : `${Math.ceil(model.unload_in_s)} s`;
  const unload = make("button", { type: "button", id: `unload-${model.model_id}`, "aria-label": `Unload ${model.model_id}`, onclick: () => unloading(model.model_id) }, "Unload");
  unload.classList.add("admin");
  const cells = [model.state + (model.error ? `: ${model.error}` : ""), bytes(model.resident_bytes), model.torch_dtype ?? "", model.loras.map((lora) => lora.name).join(", "), unloads];
  return make("tr", {}, make("th", { scope: "row" }, model.model_id), cells.map((text) => make("td", {}, text)), make("td", {}, unload));
}

async function unloading(id) {
  try {
    await call(`/admin/unload?model_id=${encodeURIComponent(id)}`, { method: "POST" });
  } catch (error) {
    watch(false);
    showProblem($("server-problem"), asProblem(error));
    timer = setTimeout(watch, 5 * EVERY_MS, true);
    return;
  }
  watch(true);
}
