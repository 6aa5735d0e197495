// Captions of pictures, dropped or chosen.

import { $, announce, clearProblem, dropZone, make, showProblem } from "./dom.js";
import { asProblem, json } from "./http.js";

let use = () => {};

/** What to do with a caption that is to be a prompt. */
export function connect(hooks) {
  use = hooks.use;
}

/** Offer what GET /capabilities tells of UniDiffuser. */
export function offer({ unidiffuser }) {
  const chosen = $("caption-model").value;
  $("caption-model").replaceChildren(...unidiffuser.models.map(({ model_id: id }) => make("option", { value: id, defaultSelected: id === unidiffuser.default }, id)));
  if (chosen) $("caption-model").value = chosen;
  $("caption-count").max = unidiffuser.models[0]?.count_returned.max ?? 16;
}

/** Each picture is a request of its own, so that one that cannot be read does not stop the others. */
async function take(files) {
  clearProblem($("caption-problem"), $("caption"));
  await Promise.all(files.map(one));
}

async function one(file) {
  const texts = make("div", { className: "about" }, make("progress", { "aria-label": `Captioning ${file.name}` }));
  const url = URL.createObjectURL(file);
  const row = make("li", {}, make("img", { src: url, alt: file.name }), texts);
  $("captions").prepend(row);
  const body = new FormData();
  body.append("image", file);
  for (const control of $("caption").elements) if (control.name && control.value) body.append(control.name, control.value);
  try {
    const { captions } = await json("/img2prompt", { method: "POST", body, headers: { Accept: "application/json" } });
    texts.replaceChildren(...captions[0].map((text) => make("p", {}, text, " ", make("button", { type: "button", onclick: () => use(text), "aria-label": `Use "${text}" as the prompt` }, "Use as prompt"))));
    announce(`${file.name}: ${captions[0].join("; ")}`);
  } catch (error) {
    row.remove();
    URL.revokeObjectURL(url);
    showProblem($("caption-problem"), asProblem(error), $("caption"))?.focus();
  }
}

dropZone($("caption-drop"), $("caption-files"), take);
$("caption").addEventListener("submit", (event) => event.preventDefault());
