// The LoRA picker: those that fit the model, with weights, trigger words and licence badges.

import { $, make, rights } from "./dom.js";
import { json } from "./http.js";

let known = {};
const chosen = new Map(); // name -> weight as text
const FILTER_FROM = 8;

/** Ask the server anew. */
export async function load() {
  known = (await json("/get_available_loras")).loras;
}

/** Show those that fit a model. */
export function show(names) {
  for (const name of chosen.keys()) if (!names.includes(name)) chosen.delete(name);
  $("lora-filter").hidden = names.length < FILTER_FROM;
  const list = names.filter((name) => known[name]).map(entry);
  $("lora-list").replaceChildren(...(list.length ? list : [make("li", { className: "hint" }, "None fits this model.")]));
  filter();
}

/** As the parameter `lora` has it. */
export const value = () => [...chosen].map(([name, weight]) => `${name}:${weight || 1}`).join(",");

/** From the parameter `lora`: `a:0.6,b`. */
export function choose(text) {
  chosen.clear();
  for (const part of text.split(",").map((one) => one.trim()).filter(Boolean)) {
    const [, name, weight] = part.match(/^(.*?)(?::([^:]*))?$/);
    chosen.set(name.trim(), weight?.trim() || "1");
  }
}

function entry(name) {
  const lora = known[name];
  const id = `lora-${name}`;
  const weight = make("input", { type: "number", step: "0.1", value: chosen.get(name) ?? "1", disabled: !chosen.has(name), "aria-label": `Weight of ${name}` });
  const box = make("input", { type: "checkbox", id, checked: chosen.has(name), disabled: !lora.available });
  box.addEventListener("change", () => {
    box.checked ? chosen.set(name, weight.value) : chosen.delete(name);
    weight.disabled = !box.checked;
  });
  weight.addEventListener("input", () => chosen.set(name, weight.value));
  const words = (lora["trigger words"] ?? []).map((word) =>
    make("button", { type: "button", className: "word", title: "Put it into the prompt", onclick: () => insert(word) }, word),
  );
  return make(
    "li",
    { className: "lora" },
    make("div", { className: "row" }, make("label", { for: id, className: "check" }, box, make("span", {}, name)), weight),
    words.length ? make("p", { className: "words" }, make("span", { className: "hint" }, "Trigger words: "), words) : null,
    make("p", { className: "badges" }, rights(lora), lora.available ? null : make("span", { className: "badge warning" }, "not on this machine")),
  );
}

function insert(word) {
  const prompt = $("prompt");
  const before = prompt.value.trimEnd();
  if (!before.includes(word)) prompt.value = before ? `${before}, ${word}` : word;
  prompt.focus();
}

function filter() {
  const wanted = $("lora-filter").hidden ? "" : $("lora-filter").value.trim().toLowerCase();
  for (const item of $("lora-list").querySelectorAll(".lora")) item.hidden = !item.textContent.toLowerCase().includes(wanted);
}

$("lora-filter").addEventListener("input", filter);
