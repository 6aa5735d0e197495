// Building and changing the page. Text goes in as text, never as HTML, whatever it is and whoever wrote it.

/** The element of an id. */
export const $ = (id) => document.getElementById(id);

/**
 * A new element. Properties are set as properties (`className`, `onclick`), names with a hyphen and `role`
 * as attributes; children are elements or text, in lists or not, and what is null or false is left out.
 */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined) continue;
    if (name.includes("-") || name === "role" || name === "for" || name === "scope") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Tell it to who listens rather than looks. */
export function announce(text) {
  $("live").textContent = text;
}

/** A labelled mark that does not speak by its colour alone. */
export function badge(text, kind = "") {
  return make("span", { className: `badge ${kind}` }, text);
}

/** Badges that say what a licence allows: of a model or a LoRA. */
export function rights({ licence, commercial_use: commercial, credit }) {
  return [
    licence ? badge(licence) : null,
    commercial ? badge("✓ commercial use", "good") : badge("✗ no commercial use", "warning"),
    credit ? badge(`credit: ${credit}`) : null,
  ];
}

/** Show a problem in `box`, and mark the fields that it names within `form`; answers the first of them. */
export function showProblem(box, problem, form = null) {
  clearProblem(box, form);
  const unmarked = [];
  let first = null;
  for (const error of problem.errors ?? []) {
    const place = form && placeOf(form, error.field);
    const text = `${error.message}${error.allowed ? `. Allowed: ${allowed(error.allowed)}` : ""}`;
    if (!place) {
      unmarked.push(make("li", {}, make("strong", {}, error.field), `: ${text}`));
      continue;
    }
    mark(place, text);
    first ??= place;
  }
  box.replaceChildren(
    make("strong", {}, problem.title),
    make("p", {}, problem.detail),
    unmarked.length ? make("ul", {}, ...unmarked) : "",
    problem.retry_after ? make("p", {}, `Try again in ${problem.retry_after} s.`) : "",
  );
  box.hidden = false;
  return first;
}

export function clearProblem(box, form = null) {
  box.hidden = true;
  box.replaceChildren();
  for (const text of form?.querySelectorAll(".field-error") ?? []) text.remove();
  for (const place of form?.querySelectorAll("[aria-invalid]") ?? []) {
    place.removeAttribute("aria-invalid");
    const others = (place.getAttribute("aria-describedby") ?? "").split(" ").filter((id) => id && !id.startsWith("error-"));
    others.length ? place.setAttribute("aria-describedby", others.join(" ")) : place.removeAttribute("aria-describedby");
  }
}

/** Mark a control or a group of them as wrong, with the reason beside it. */
function mark(place, text) {
  const id = `error-${place.id || place.name}`;
  const known = document.getElementById(id);
  if (known) {
    known.append(` ${text}`);
    return;
  }
  place.closest("details")?.setAttribute("open", "");
  place.setAttribute("aria-invalid", "true");
  place.setAttribute("aria-describedby", `${place.getAttribute("aria-describedby") ?? ""} ${id}`.trim());
  const message = make("p", { id, className: "error field-error" }, text);
  place.matches("input, select, textarea") ? place.after(message) : place.append(message);
}

function placeOf(form, field) {
  const name = CSS.escape(field.split(".")[0]);
  const places = [...form.querySelectorAll(`[name="${name}"], [data-field="${name}"]`)];
  return places.find((place) => !place.disabled && place.checkVisibility()) ?? null;
}

function allowed(choices) {
  const list = Array.isArray(choices) ? choices : [choices];
  return list.length > 12 ? `${list.slice(0, 12).join(", ")}, ... (${list.length} in all)` : list.join(", ");
}

/** Files dropped on `zone`, or chosen by `input`, are given to `take`. */
export function dropZone(zone, input, take) {
  const over = (on) => zone.classList.toggle("over", on);
  zone.addEventListener("dragover", (event) => {
    event.preventDefault();
    over(true);
  });
  zone.addEventListener("dragleave", () => over(false));
  zone.addEventListener("drop", (event) => {
    event.preventDefault();
    over(false);
    if (event.dataTransfer.files.length) take([...event.dataTransfer.files]);
  });
  input.addEventListener("change", () => {
    if (input.files.length) take([...input.files]);
    input.value = "";
  });
}

export function bytes(count) {
  if (count < 1024 * 1024) return `${Math.round(count / 1024)} KiB`;
  return count < 1024 ** 3 ? `${(count / 1024 ** 2).toFixed(0)} MiB` : `${(count / 1024 ** 3).toFixed(1)} GiB`;
}
