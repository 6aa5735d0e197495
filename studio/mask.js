// The picture to start from, and a mask painted over it: by pointer or by keyboard, or taken from a file.

import { $, announce, dropZone } from "./dom.js";

const LONGEST = 2048; // the mask's longer side at most; the server fits it to the picture
const KEYS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const HISTORY = 20;
const canvas = $("mask");
const context = canvas.getContext("2d", { willReadFrequently: true });
let file = null;
let painted = false;
let history = [];
let last = null; // where the pointer was
let cursor = null; // where the keyboard's brush is, on the canvas

/** Take a picture, or null for none; tells it by the event easel-picture. */
export async function take(blob) {
  file = blob;
  const picture = $("source-picture");
  URL.revokeObjectURL(picture.src);
  picture.removeAttribute("src");
  $("source-tools").hidden = !file;
  $("source-drop").hidden = Boolean(file);
  for (const control of [$("strength"), document.querySelector("[name=inpaint_full_res]")]) control.disabled = !file;
  note("");
  clear();
  document.dispatchEvent(new Event("easel-picture"));
  if (!file) return;
  picture.src = URL.createObjectURL(file);
  try {
    await picture.decode();
    const scale = Math.min(1, LONGEST / Math.max(picture.naturalWidth, picture.naturalHeight));
    canvas.width = Math.max(1, Math.round(picture.naturalWidth * scale));
    canvas.height = Math.max(1, Math.round(picture.naturalHeight * scale));
    note(`${picture.naturalWidth}x${picture.naturalHeight}`);
  } catch {
    note("The browser cannot show this picture; it is sent as it is, without a mask.");
  }
  $("paint").hidden = $("mask-tools").hidden = !picture.naturalWidth;
  clear();
}

export const picture = () => file;

/** The mask as a PNG, white where to repaint; null where nothing is painted. */
export async function mask() {
  if (!file || !painted) return null;
  const out = new OffscreenCanvas(canvas.width, canvas.height);
  const drawing = out.getContext("2d");
  drawing.drawImage(canvas, 0, 0);
  drawing.globalCompositeOperation = "source-in";
  drawing.fillStyle = "white";
  drawing.fillRect(0, 0, out.width, out.height);
  drawing.globalCompositeOperation = "destination-over";
  drawing.fillStyle = "black";
  drawing.fillRect(0, 0, out.width, out.height);
  return out.convertToBlob({ type: "image/png" });
}

/** Take a mask as a file has it: white (half or more) is repainted. */
export async function takeMask(blob) {
  const image = await createImageBitmap(blob);
  remember();
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
  for (let i = 0; i < pixels.data.length; i += 4) {
    const light = (pixels.data[i] * 299 + pixels.data[i + 1] * 587 + pixels.data[i + 2] * 114) / 1000;
    pixels.data.set(light >= 128 ? [230, 0, 140, 255] : [0, 0, 0, 0], i);
  }
  context.putImageData(pixels, 0, 0);
  painted = true;
}

function clear() {
  context.clearRect(0, 0, canvas.width, canvas.height);
  [painted, history, last, cursor] = [false, [], null, null];
}

function remember() {
  history.push([context.getImageData(0, 0, canvas.width, canvas.height), painted]);
  if (history.length > HISTORY) history.shift();
}

function undo() {
  const before = history.pop();
  if (!before) return;
  context.putImageData(before[0], 0, 0);
  painted = before[1];
}

/** A stroke of the brush, in the canvas's pixels. */
function stroke(from, to) {
  context.globalCompositeOperation = $("erase").checked ? "destination-out" : "source-over";
  context.strokeStyle = "rgb(230 0 140)";
  context.lineWidth = brush();
  context.lineCap = context.lineJoin = "round";
  context.beginPath();
  context.moveTo(...from);
  context.lineTo(to[0], to[1] + 0.01); // a point is a line too
  context.stroke();
  context.globalCompositeOperation = "source-over";
  painted = true;
}

/** The brush's width: so many hundredths of the picture's longer side. */
const brush = () => ($("brush").value / 100) * Math.max(canvas.width, canvas.height);

function at(event) {
  const box = canvas.getBoundingClientRect();
  return [((event.clientX - box.left) * canvas.width) / box.width, ((event.clientY - box.top) * canvas.height) / box.height];
}

canvas.addEventListener("pointerdown", (event) => {
  if (event.button) return;
  canvas.setPointerCapture(event.pointerId);
  remember();
  last = at(event);
  stroke(last, last);
});
canvas.addEventListener("pointermove", (event) => {
  if (!last) return;
  const here = at(event);
  stroke(last, here);
  last = here;
});
for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => (last = null));

canvas.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  cursor ??= [canvas.width / 2, canvas.height / 2];
  if (KEYS[event.key]) {
    const step = brush() / 2;
    cursor = [bound(cursor[0] + KEYS[event.key][0] * step, canvas.width), bound(cursor[1] + KEYS[event.key][1] * step, canvas.height)];
    announce(`Brush at ${Math.round((100 * cursor[0]) / canvas.width)}% across, ${Math.round((100 * cursor[1]) / canvas.height)}% down`);
  } else if (event.key === " ") {
    remember();
    stroke(cursor, cursor);
    announce($("erase").checked ? "Erased" : "Painted");
  } else if (event.key.toLowerCase() === "e") {
    $("erase").checked = !$("erase").checked;
    announce($("erase").checked ? "Erasing" : "Painting");
  } else if (event.key.toLowerCase() === "z") {
    undo();
    announce("Undone");
  } else return;
  event.preventDefault();
  showCursor();
});
canvas.addEventListener("blur", () => $("cursor")?.remove());

/** A ring where the keyboard's brush is. */
function showCursor() {
  let ring = $("cursor");
  if (!ring) {
    ring = document.createElement("span");
    ring.id = "cursor";
    $("paint").append(ring);
  }
  ring.style.left = `${(100 * cursor[0]) / canvas.width}%`;
  ring.style.top = `${(100 * cursor[1]) / canvas.height}%`;
  ring.style.width = `${(100 * brush()) / canvas.width}%`;
}

const bound = (value, most) => Math.min(Math.max(value, 0), most);

function note(text) {
  $("source-note").textContent = text;
  $("source-note").hidden = !text;
}

dropZone($("source-drop"), $("image"), ([first]) => take(first));
$("source-remove").addEventListener("click", () => {
  take(null);
  $("image").focus();
});
$("mask-undo").addEventListener("click", undo);
$("mask-clear").addEventListener("click", () => {
  remember();
  context.clearRect(0, 0, canvas.width, canvas.height);
  painted = false;
});
$("mask-file").addEventListener("change", async ({ target }) => {
  try {
    if (target.files.length) await takeMask(target.files[0]);
  } catch {
    note("The browser cannot read this mask.");
  }
  target.value = "";
});
$("strength").addEventListener("input", () => ($("strength-shown").value = Number($("strength").value).toFixed(2)));
