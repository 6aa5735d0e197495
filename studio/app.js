// The page as a whole: the key, the four parts, and what they tell each other.

import * as admin from "./admin.js";
import * as caption from "./caption.js";
import * as create from "./create.js";
import { $, announce, showProblem } from "./dom.js";
import { asProblem, json, key, Problem } from "./http.js";
import * as loras from "./loras.js";
import * as replay from "./replay.js";
import * as server from "./server.js";

const PARTS = ["create", "caption", "server", "loras"];

/** Ask what there is, and show it. */
async function begin() {
  const [capabilities] = await Promise.all([json("/capabilities"), loras.load()]);
  const isAdmin = await json("/admin/loras/jobs").then(() => true, (problem) => {
    if (problem.status === 403) return false;
    throw problem;
  });
  create.offer(capabilities);
  caption.offer(capabilities);
  admin.offer(capabilities, isAdmin);
  $("key-change").hidden = !key.get();
  show();
  create.restore().catch((error) => showProblem($("create-problem"), asProblem(error)));
}

/** Show the part that the address names. */
function show(moved = false) {
  const name = PARTS.includes(location.hash.slice(1)) ? location.hash.slice(1) : PARTS[0];
  for (const part of PARTS) {
    $(`view-${part}`).hidden = part !== name;
    const link = document.querySelector(`nav a[href="#${part}"]`);
    part === name ? link.setAttribute("aria-current", "page") : link.removeAttribute("aria-current");
  }
  server.watch(name === "server");
  if (name === "loras") admin.refresh();
  if (moved) $(`${name}-title`).focus();
}

function askKey(message = "") {
  $("key-error").textContent = message;
  if (!$("key-dialog").open) $("key-dialog").showModal();
  $("key").focus();
}

$("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  key.set($("key").value.trim());
  try {
    await begin();
    $("key").value = "";
    $("key-dialog").close();
    announce("The key is valid.");
  } catch (error) {
    askKey(error instanceof Problem && error.status === 401 ? "This key is not valid." : asProblem(error).detail);
  }
});
$("key-dialog").addEventListener("cancel", (event) => {
  if (!key.get()) event.preventDefault(); // without a key there is nothing to see
});
$("key-change").addEventListener("click", () => {
  key.forget();
  location.reload();
});
window.addEventListener("easel-unauthorized", () => {
  if (!$("key-dialog").open) askKey(key.get() ? "This key is no longer valid." : "");
});
window.addEventListener("hashchange", () => show(true));

replay.connect({ use: create.use });
caption.connect({
  use(text) {
    $("prompt").value = text;
    location.hash = "create";
    $("prompt").focus();
  },
});
admin.connect({
  async changed() {
    await loras.load();
    create.offer(await json("/capabilities"));
  },
});

begin().catch((error) => {
  if (error.status === 401) return;
  show();
  showProblem($("create-problem"), asProblem(error));
});
