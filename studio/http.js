// Calling the server: the key, and errors as problems (RFC 9457). The key is kept for this tab alone.

const BASE = new URL("..", import.meta.url);
const KEY = "easel-key";

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

/** What stood in the way: title, detail, status, errors of fields, candidates, retry_after. */
export class Problem extends Error {
  constructor(details) {
    super(details.detail);
    Object.assign(this, { title: "Failed", status: 0, errors: [] }, details);
  }
}

export const aborted = (error) => error.name === "AbortError";

/** What stood in the way, whatever was thrown. */
export function asProblem(error) {
  return error instanceof Problem ? error : new Problem({ title: "This page failed", detail: String(error) });
}

/**
 * A path of this server; a plain object as body goes as JSON.
 * Throws a Problem for every answer that is an error, and for none; who has no valid key is asked for one.
 */
export async function call(path, { method = "GET", body, headers = {}, signal } = {}) {
  const sent = { ...headers };
  if (key.get()) sent["X-API-Key"] = key.get();
  if (body && !(body instanceof FormData)) {
    sent["Content-Type"] = "application/json";
    body = JSON.stringify(body);
  }
  let response;
  try {
    response = await fetch(new URL(path.replace(/^\//, ""), BASE), { method, body, headers: sent, signal, cache: "no-store" });
  } catch (error) {
    if (aborted(error)) throw error;
    throw new Problem({ title: "No answer", detail: "The server cannot be reached. Is it still running?" });
  }
  if (response.ok) return response;
  const details = await response.json().catch(() => ({ title: response.statusText, detail: `The server answered ${response.status}.` }));
  if (response.status === 401) window.dispatchEvent(new Event("easel-unauthorized"));
  throw new Problem({ ...details, status: response.status });
}

export const json = async (path, options) => (await call(path, options)).json();

/** Base64 as a file. */
export function blob(base64, type) {
  return new Blob([Uint8Array.from(atob(base64), (character) => character.charCodeAt(0))], { type });
}
