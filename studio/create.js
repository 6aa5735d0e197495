// The form: what can be asked of each model, what is asked, and what is in the making.

import { $, announce, clearProblem, make, rights, showProblem } from "./dom.js";
import * as gallery from "./gallery.js";
import { aborted, asProblem, Problem } from "./http.js";
import { draw, recent, resume } from "./job.js";
import * as loras from "./loras.js";
import * as source from "./mask.js";
import { read } from "./replay.js";

const form = $("create");
let models = new Map(); // id -> {model, task}
let extras = {}; // parameters of a reused picture that the form has no control for

/** Offer what GET /capabilities tells. */
export function offer(capabilities) {
  const groups = [
    ["Stable Diffusion", capabilities, "generate"],
    ["UniDiffuser", capabilities.unidiffuser, "prompt2img"],
  ].filter(([, runner]) => runner.device !== null);
  models = new Map(groups.flatMap(([, runner, task]) => runner.models.map((model) => [model.model_id, { model, task }])));
  const chosen = $("model_id").value;
  $("model_id").replaceChildren(
    ...groups.map(([label, runner]) => make("optgroup", { label }, runner.models.map(({ model_id: id }) => make("option", { value: id, defaultSelected: id === capabilities.default }, id)))),
  );
  if (models.has(chosen)) $("model_id").value = chosen;
  adapt();
}

/** Fit the form to the model that is chosen. */
function adapt() {
  const { model, task } = models.get($("model_id").value) ?? {};
  if (!model) return;
  $("model-badges").replaceChildren(...rights(model).filter(Boolean));
  for (const name of ["num_inference_steps", "guidance_scale", "count_returned"]) limit(name, model[name]);
  for (const name of ["width", "height"]) limit(name, model.size, model.size.multiple_of);
  $("negative_prompt").disabled = !model.negative_prompt;
  $("source").hidden = task !== "generate";
  if (task !== "generate") source.take(null);
  loras.show(model.loras);
  offerSchedulers();
}

function limit(name, { default: usual, min, max }, step = null) {
  Object.assign($(name), { placeholder: usual, min, max });
  if (step) $(name).step = step;
}

function offerSchedulers() {
  const { model } = models.get($("model_id").value) ?? {};
  const names = (source.picture() && model?.img2img?.schedulers) || model?.schedulers || [];
  const chosen = $("scheduler").value;
  $("scheduler").replaceChildren(make("option", { value: "" }, "the model's own"), ...names.map((name) => make("option", {}, name)));
  $("scheduler").value = names.includes(chosen) ? chosen : "";
}

/** Fill the form with the parameters of a request, by name, its input pictures, and what is to be known of it. */
export async function use(settings, inputs = {}, notes = []) {
  form.reset();
  await source.take(inputs.image ?? null);
  if (inputs.mask) await source.takeMask(inputs.mask);
  const rest = { ...settings };
  loras.choose(rest.lora ?? "");
  delete rest.lora;
  if (models.has(rest.model_id)) $("model_id").value = rest.model_id;
  adapt();
  for (const [name, value] of Object.entries(rest)) {
    const control = form.elements[name];
    if (!control) continue;
    if (control.type === "checkbox") control.checked = String(value) === control.value;
    else control.value = value;
    delete rest[name];
  }
  $("strength").dispatchEvent(new Event("input"));
  extras = Object.fromEntries(Object.entries(rest).filter(([, value]) => value !== null && value !== ""));
  showExtras();
  showNotes(notes);
  announce(["The settings are in the form.", ...notes].join(" "));
  $("prompt").focus();
}

function showNotes(notes) {
  $("notes").replaceChildren(...notes.map((note) => make("li", {}, note)));
  $("notes").hidden = !notes.length;
}

function showExtras() {
  const rows = Object.entries(extras).map(([name, value]) => {
    const drop = () => {
      delete extras[name];
      showExtras();
      $("generate").focus();
    };
    return make("li", {}, `${name}: ${value} `, make("button", { type: "button", onclick: drop, "aria-label": `Leave out ${name}` }, "Leave out"));
  });
  $("extras").replaceChildren(...rows);
  $("extras").hidden = !rows.length;
}

/** What is asked: {task, fields, inputs}. Throws a Problem for what is no number. */
async function asked() {
  const fields = { ...extras };
  for (const control of form.elements) {
    if (!control.name || control.disabled) continue;
    if (control.validity.badInput) throw new Problem({ title: "Invalid parameters", detail: `${control.name} is not a number.`, errors: [{ field: control.name, message: "is not a number" }] });
    if (control.type === "checkbox" ? control.checked : control.value.trim()) fields[control.name] = control.value;
  }
  if (loras.value()) fields.lora = loras.value();
  const inputs = { image: source.picture(), mask: await source.mask() };
  if (!inputs.mask) delete fields.inpaint_full_res;
  return { task: models.get(fields.model_id)?.task ?? "generate", fields, inputs };
}

async function submit(event) {
  event.preventDefault();
  clearProblem($("create-problem"), form);
  let card = null;
  try {
    const request = await asked();
    const body = new FormData();
    for (const [name, value] of [...Object.entries(request.fields), ...Object.entries(request.inputs)]) if (value !== null) body.append(name, value);
    card = makeCard(request.fields.prompt ?? "");
    announce("Sent");
    gallery.add(await draw(request.task, body, card.signal, card), request);
  } catch (error) {
    if (aborted(error)) announce("Cancelled");
    else showProblem($("create-problem"), asProblem(error), form)?.focus();
  } finally {
    card?.remove();
  }
}

/** Show the key's last jobs again, as after a reload: what was made, and what goes on. */
export async function restore() {
  $("gallery").setAttribute("aria-busy", "true");
  try {
    for (const job of await recent()) {
      if (job.status === "succeeded") await followed(job, null);
      else if (["queued", "running", "canceling"].includes(job.status)) followed(job, makeCard(`a job left at ${new Date(job.created_at).toLocaleTimeString()}`));
    }
  } finally {
    $("gallery").removeAttribute("aria-busy");
  }
}

async function followed(job, card) {
  const quiet = { signal: new AbortController().signal, state() {}, preview() {} };
  try {
    gallery.add(await resume(job, (card ?? quiet).signal, card ?? quiet), null);
    if (card) announce("Done");
  } catch (error) {
    if (card && aborted(error)) announce("Cancelled");
    else if (error.status !== 410) showProblem($("create-problem"), asProblem(error)); // forgotten meanwhile
  } finally {
    card?.remove();
  }
}

/** A row for what is in the making, with its own way to cancel it; takes what job.draw tells. */
function makeCard(prompt) {
  const controller = new AbortController();
  const picture = make("img", { alt: `Unfinished: ${prompt}`, hidden: true });
  const bar = make("progress", { "aria-label": `Progress of ${prompt}`, max: 1 });
  const text = make("p", { className: "hint" }, "sent");
  const cancel = make("button", { type: "button", "aria-label": `Cancel ${prompt}`, onclick: () => controller.abort() }, "Cancel");
  const row = make("li", {}, picture, make("div", { className: "about" }, make("p", { className: "cut" }, prompt), bar, text), cancel);
  $("jobs").prepend(row);
  let quarter = 0;
  return {
    signal: controller.signal,
    state({ status, queue_position: position, progress }) {
      const { value, step, steps } = progress;
      text.textContent = status === "queued" && position ? `waiting, number ${position} in the queue` : steps ? `step ${step} of ${steps}` : status;
      if (value) bar.value = value;
      if (Math.floor(4 * value) > quarter) {
        quarter = Math.floor(4 * value);
        announce(`${25 * quarter}% of ${prompt}`);
      }
    },
    preview(blob) {
      URL.revokeObjectURL(picture.src);
      picture.src = URL.createObjectURL(blob);
      picture.hidden = false;
    },
    remove() {
      const focused = row.contains(document.activeElement);
      URL.revokeObjectURL(picture.src);
      row.remove();
      if (focused) $("generate").focus();
    },
  };
}

form.addEventListener("submit", submit);
form.addEventListener("reset", () => {
  clearProblem($("create-problem"), form);
  extras = {};
  showExtras();
  showNotes([]);
  source.take(null);
  loras.choose("");
  setTimeout(() => {
    adapt();
    $("strength").dispatchEvent(new Event("input"));
  });
});
form.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});
$("model_id").addEventListener("change", adapt);
document.addEventListener("easel-picture", offerSchedulers);
gallery.connect({ use, read, start: (blob) => source.take(blob).then(() => $("strength").focus()) });
