// The settings of a picture from anywhere, read by the server from the picture's metadata.

import { $, clearProblem, dropZone, showProblem } from "./dom.js";
import { asProblem, json } from "./http.js";

const SOURCES = { easel: "Easel's", a1111: "A1111's" };
let use = async () => {};

/** What to do with the parameters of a request, and with what is to be known of them. */
export function connect(hooks) {
  use = hooks.use;
}

/** Read a picture's settings into the form. */
export async function read(file) {
  clearProblem($("replay-problem"));
  const body = new FormData();
  body.append("image", file);
  try {
    const { request, source, notes } = await json("/replay", { method: "POST", body });
    await use(request, {}, [`From ${file.name}, by ${SOURCES[source] ?? source} metadata.`, ...notes]);
  } catch (error) {
    showProblem($("replay-problem"), asProblem(error));
  }
}

dropZone($("replay-drop"), $("replay-file"), ([file]) => read(file));
