// Drawing: from a form to pictures, with whatever can be told meanwhile.

import { json } from "./http.js";

const ROUTES = { generate: "/post_config", prompt2img: "/prompt2img" };

/**
 * Draw what `form` asks for; the signal cancels it.
 * Answers {pictures: [{blob, seed}], ran}.
 */
export async function draw(task, form, signal) {
  const answer = await json(ROUTES[task], { method: "POST", body: form, headers: { Accept: "application/json" }, signal });
  const pictures = answer.images.map((image, i) => ({ blob: blob(image, answer.media_type), seed: answer.seeds[i] }));
  return { pictures, ran: answer.ran };
}

/** Base64 as a file. */
export function blob(base64, type) {
  return new Blob([Uint8Array.from(atob(base64), (character) => character.charCodeAt(0))], { type });
}
