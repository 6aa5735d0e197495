// The LoRAs: a table for everyone; adding, uploading and removing for admins.

import { $, announce, badge, bytes, clearProblem, make, rights, showProblem } from "./dom.js";
import { aborted, asProblem, json, Problem } from "./http.js";

const EVERY_MS = 700;
const OVER = ["succeeded", "failed", "canceled"];
let admin = false;
let changed = async () => {};

/** What to do when a LoRA came or went. */
export function connect(hooks) {
  changed = hooks.changed;
}

/** Offer what GET /capabilities tells as bases, and what the key allows. */
export function offer(capabilities, isAdmin) {
  admin = isAdmin;
  document.body.classList.toggle("is-admin", admin);
  $("loras-add").hidden = !admin;
  $("loras-admin").hidden = admin;
  $("upload-base").replaceChildren(...capabilities.models.map((model) => make("option", {}, model.model_id)));
}

/** Show the table anew. */
export async function refresh() {
  try {
    const { loras, warning } = await json("/get_available_loras");
    $("lora-rows").replaceChildren(...Object.entries(loras).map(([name, lora]) => row(name, lora)));
    if (warning) showProblem($("loras-problem"), { title: "The registry's file is broken", detail: warning });
  } catch (error) {
    showProblem($("loras-problem"), asProblem(error));
  }
}

function row(name, lora) {
  const drop = admin && make("button", { type: "button", "aria-label": `Remove ${name}`, onclick: () => remove(name) }, "Remove");
  return make(
    "tr",
    {},
    make("th", { scope: "row" }, name),
    make("td", {}, lora.civitai_base_model ?? lora.base_model),
    make("td", {}, (lora["trigger words"] ?? []).join(", ")),
    make("td", { className: "badges" }, rights(lora)),
    make("td", {}, lora.available ? "✓ yes" : badge("✗ no", "warning")),
    make("td", {}, drop || ""),
  );
}

async function remove(name) {
  if (!confirm(`Remove the LoRA ${name}, and its weights if they were downloaded?`)) return;
  clearProblem($("loras-problem"));
  try {
    await json(`/admin/loras/${encodeURIComponent(name)}`, { method: "DELETE" });
    announce(`Removed ${name}`);
    $("loras-title").focus();
    await Promise.all([refresh(), changed()]);
  } catch (error) {
    showProblem($("loras-problem"), asProblem(error));
  }
}

/** Add from a source, as POST /admin/loras takes it, and follow the job. */
async function add(wanted) {
  const form = $("add");
  clearProblem($("loras-problem"), form);
  try {
    const job = await json("/admin/loras?wait=false", { method: "POST", body: wanted });
    form.reset();
    await follow(job);
  } catch (error) {
    const problem = asProblem(error);
    showProblem($("loras-problem"), problem, form)?.focus();
    offerCandidates(problem.candidates ?? [], wanted);
  }
}

/** Several are meant: let one be chosen. */
function offerCandidates(candidates, wanted) {
  const choices = candidates
    .filter((one) => one.model_id)
    .map((one) => {
      const choose = () => add({ ...wanted, source: { model_id: one.model_id } });
      return make("li", {}, make("button", { type: "button", onclick: choose }, `${one.name} (${one.model_id})`), ` by ${one.creator ?? "unknown"}, for ${one.base_model}`);
    });
  if (choices.length) $("loras-problem").append(make("ul", { className: "candidates" }, choices));
}

async function follow(job) {
  const bar = make("progress", { "aria-label": `Download of ${job.source}`, max: 1 });
  const text = make("span", {});
  const cancel = make("button", { type: "button", "aria-label": `Cancel ${job.source}`, onclick: () => json(`/admin/loras/jobs/${job.id}`, { method: "DELETE" }).catch(() => {}) }, "Cancel");
  const line = make("li", {}, make("strong", {}, job.source), bar, text, cancel);
  $("lora-jobs").prepend(line);
  announce(`Adding ${job.source}`);
  try {
    while (!OVER.includes(job.status)) {
      const { bytes: had, total_bytes: total, value, eta_s: eta } = job.progress;
      if (total) bar.value = value;
      text.textContent = had ? `${bytes(had)}${total ? ` of ${bytes(total)}` : ""}${eta ? `, ${Math.ceil(eta)} s to go` : ""}` : "looking it up";
      await new Promise((done) => setTimeout(done, EVERY_MS));
      job = await json(`/admin/loras/jobs/${job.id}`);
    }
  } finally {
    line.remove();
  }
  if (job.status === "failed") throw new Problem(job.error);
  await over(job.status === "canceled" ? `Cancelled ${job.source}` : job.result.message);
}

async function upload(event) {
  event.preventDefault();
  const form = $("upload");
  clearProblem($("loras-problem"), form);
  const body = new FormData();
  for (const control of form.elements) {
    if (!control.name) continue;
    if (control.type === "file") control.files.length && body.append(control.name, control.files[0]);
    else if (control.value.trim()) body.append(control.name, control.value.trim());
  }
  const controller = new AbortController();
  const line = make("li", {}, make("strong", {}, "Uploading"), make("progress", { "aria-label": "Upload" }), make("button", { type: "button", onclick: () => controller.abort() }, "Cancel"));
  $("lora-jobs").prepend(line);
  try {
    const added = await json("/admin/loras/upload", { method: "POST", body, signal: controller.signal });
    form.reset();
    await over(added.message);
  } catch (error) {
    if (!aborted(error)) showProblem($("loras-problem"), asProblem(error), form)?.focus();
  } finally {
    line.remove();
  }
}

async function over(message) {
  const told = make("li", {}, message);
  $("lora-jobs").prepend(told);
  setTimeout(() => told.remove(), 15000);
  announce(message);
  await Promise.all([refresh(), changed()]);
}

$("add").addEventListener("submit", (event) => {
  event.preventDefault();
  const name = $("add-name").value.trim();
  add({ source: $("add-source").value.trim(), ...(name ? { name } : {}) });
});
$("upload").addEventListener("submit", upload);
