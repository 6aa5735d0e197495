// Drawing: a job is left with the server, followed by its events, and its pictures fetched.

import { aborted, blob, call, json, Problem } from "./http.js";

const OVER = ["succeeded", "failed", "canceled", "expired"];
const DRAWN = ["generate", "txt2img", "img2img", "inpaint", "outpaint", "prompt2img", "image"];
const RECENT = 12;
const AGAIN_MS = 1000;
const TRIES = 60; // in a row that bring nothing; a server that restarts goes on with its jobs

/**
 * Draw what `form` asks for. `told.state` gets each snapshot of the job, `told.preview` each unfinished picture;
 * the signal cancels the job. Answers {pictures: [{blob, seed}], ran}.
 */
export async function draw(task, form, signal, told) {
  form.append("task", task);
  return resume(await json("/jobs", { method: "POST", body: form, headers: { Accept: "application/json" }, signal }), signal, told);
}

/** What comes of a job that is with the server; as `draw`. */
export async function resume(job, signal, told) {
  const answer = await outcome(job, signal, told);
  const pictures = answer.images.map((image, i) => ({ blob: blob(image, answer.media_type), seed: answer.seeds[i] }));
  return { pictures, ran: answer.ran };
}

async function outcome(job, signal, told) {
  try {
    const last = await follow(job, signal, told);
    if (last.status === "succeeded") return await json(last.urls.result, { headers: { Accept: "application/json" }, signal });
    if (last.status === "canceled") throw new DOMException("canceled elsewhere", "AbortError");
    throw new Problem(last.error ?? { title: "No result", detail: `The job is ${last.status}.` });
  } catch (error) {
    if (aborted(error)) await call(job.urls.cancel, { method: "DELETE" }).catch(() => {});
    throw error;
  }
}

/** The key's last jobs that make pictures, the oldest first. */
export async function recent() {
  const { jobs } = await json(`/jobs?mine=true&limit=${RECENT}`);
  return jobs.filter((job) => DRAWN.includes(job.task)).reverse();
}

/** The job once it is over. A stream that breaks is taken up where it broke; what GET says of the job is the truth. */
async function follow(job, signal, told) {
  let last = "";
  let tries = 0;
  for (;;) {
    told.state(job);
    if (OVER.includes(job.status)) return job;
    try {
      const headers = { Accept: "text/event-stream", ...(last && { "Last-Event-ID": last }) };
      const { body } = await call(job.urls.events, { headers, signal });
      for await (const event of events(body)) {
        [last, tries] = [event.id || last, 0];
        if (event.name === "preview") told.preview(blob(event.data.b64_json, event.data.media_type));
        else told.state((job = event.data));
      }
      if (!OVER.includes(job.status)) job = await json(job.urls.self, { signal });
    } catch (error) {
      const lasting = error.status >= 400 && error.status < 500 && error.status !== 429;
      if (aborted(error) || lasting || ++tries > TRIES) throw error;
    }
    if (!OVER.includes(job.status)) await new Promise((done) => setTimeout(done, AGAIN_MS));
    signal.throwIfAborted();
  }
}

/** The server-sent events of a body: {name, id, data}. EventSource cannot send a key. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const blocks = (rest + value).replaceAll("\r\n", "\n").split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const fields = { event: "", id: "", data: "" };
        for (const line of block.split("\n")) {
          const [, name, text] = line.match(/^(\w+): ?(.*)$/) ?? [];
          if (name in fields) fields[name] += text;
        }
        if (fields.data) yield { name: fields.event, id: fields.id, data: JSON.parse(fields.data) };
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
