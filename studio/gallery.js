// The pictures made so far: thumbnails, and one of them large, with what ran and what can be done with it.

import { $, announce, make, rights } from "./dom.js";

let shown = null;
const hooks = {};

/** What to do on "Use these settings" (by what was asked, or by reading it from the picture) and "Start from it". */
export function connect(given) {
  Object.assign(hooks, given);
}

/**
 * Add what came of a request: `made` as job.draw answers it, `asked` the fields and input pictures that were sent; null
 * where that is no longer known, of a job from before. Those are not news.
 */
export function add(made, asked) {
  const items = made.pictures.map(({ blob, seed }) => item(blob, seed, made.ran, asked));
  $("gallery").prepend(...items.map((one) => one.row));
  $("gallery-empty").hidden = true;
  if (!asked) return;
  show(items[0]);
  announce(`Done: ${items.length === 1 ? "a picture" : `${items.length} pictures`} of ${made.ran.prompt}`);
}

function item(blob, seed, ran, asked) {
  const url = URL.createObjectURL(blob);
  const one = { blob, seed, ran, asked, url };
  const thumb = make("img", { src: url, alt: `${ran.prompt}, seed ${seed}`, loading: "lazy" });
  one.button = make("button", { type: "button", onclick: () => show(one) }, thumb);
  one.row = make("li", {}, one.button);
  return one;
}

function show(one) {
  shown?.button.removeAttribute("aria-current");
  shown = one;
  $("viewer").hidden = !one;
  if (!one) return;
  one.button.setAttribute("aria-current", "true");
  const picture = make("img", { src: one.url, alt: `${one.ran.prompt}, seed ${one.seed}`, onload: () => picture.classList.toggle("small", picture.naturalWidth <= 128) });
  $("viewer").replaceChildren(
    make("div", { className: "picture" }, picture),
    make(
      "div",
      { className: "about" },
      make(
        "div",
        { className: "buttons" },
        make("button", { type: "button", className: "primary", onclick: () => (one.asked ? hooks.use(settings(one), one.asked.inputs) : hooks.read(new File([one.blob], `seed ${one.seed}`, { type: one.blob.type }))) }, "Use these settings"),
        make("button", { type: "button", onclick: () => hooks.start(one.blob) }, "Start from it"),
        make("a", { className: "button", href: one.url, download: `easel-${one.seed}.${one.blob.type.split("/")[1]}` }, "Save"),
        make("button", { type: "button", onclick: () => remove(one) }, "Remove"),
      ),
      make("dl", {}, facts(one).map(([name, value]) => [make("dt", {}, name), make("dd", {}, value)])),
    ),
  );
}

function remove(one) {
  const next = one.row.nextElementSibling ?? one.row.previousElementSibling;
  one.row.remove();
  URL.revokeObjectURL(one.url);
  show(null);
  $("gallery-empty").hidden = $("gallery").childElementCount > 0;
  next?.querySelector("button").click();
  (next?.querySelector("button") ?? $("generate")).focus();
}

/** What was asked for, with the defaults as they were then: enough to draw this very picture again. */
function settings({ ran, seed, asked }) {
  const decided = { model_id: ran.model_id, num_inference_steps: ran.num_inference_steps, guidance_scale: ran.guidance_scale, scheduler: schedule(ran) };
  const size = asked.inputs.image ? {} : { width: ran.width, height: ran.height };
  return { ...decided, ...size, ...asked.fields, seed, count_returned: "" };
}

const schedule = (ran) => [ran.scheduler, ran.schedule].filter(Boolean).join(" ");

function facts({ ran, seed }) {
  const loras = ran.loras.map((lora) => `${lora.name}:${lora.weight} (${lora.layers} layers)`);
  return [
    ["Prompt", ran.prompt],
    ["Negative prompt", ran.negative_prompt],
    ["Model", ran.model_id],
    ["Seed", String(seed)],
    ["Size", `${ran.width}x${ran.height}`],
    ["Steps", ran.steps_run === ran.num_inference_steps ? String(ran.steps_run) : `${ran.steps_run} of ${ran.num_inference_steps}`],
    ["Guidance", String(ran.guidance_scale)],
    ["Scheduler", schedule(ran)],
    ["Strength", ran.strength === null ? "" : String(ran.strength)],
    ["LoRAs", loras.join(", ")],
    ["Made in", `${((ran.timing.load + ran.timing.denoise + ran.timing.decode) / 1000).toFixed(1)} s on ${ran.device}, ${ran.torch_dtype}`],
    ["Degraded", ran.degraded],
    ["Flagged", ran.flagged?.includes(seed) ? "replaced by the safety checker" : ""],
    ["Rights", make("span", { className: "badges" }, rights({ ...ran, credit: ran.credit.join(", ") }))],
    ["Notes", ran.notes.join("; ")],
  ].filter(([, value]) => value);
}
