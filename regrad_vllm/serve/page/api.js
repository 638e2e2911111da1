// Calls to the server: with the key if it has one, with errors that say something, and with streams.

import { find } from "./dom.js";

const ROOT = new URL("../", document.baseURI);
const KEY = "regrad.key";

export const settings = { namespace: localStorage.getItem("regrad.namespace") };

export class ApiError extends Error {
  constructor(message, status, { param = null, isRoute = false } = {}) {
    super(message);
    this.status = status;
    this.param = param; // the field that the error is about
    this.isRoute = isRoute; // the server has no such route; else a 404 is about a document or a namespace
  }
}

/** The response to a call. Asks for the key if the server wants one. ApiError. */
export async function call(path, { method = "GET", body, query = {}, signal } = {}) {
  const url = new URL(path, ROOT);
  for (const [name, value] of Object.entries(query)) if (value || value === 0) url.searchParams.set(name, value);
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.authorization = `Bearer ${key}`;
  if (body !== undefined) headers["content-type"] = typeof body === "string" ? "application/x-ndjson" : "application/json";
  let response;
  try {
    response = await fetch(url, { method, headers, signal, body: typeof body === "object" ? JSON.stringify(body) : body });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server can't be reached. Is it running?", 0);
  }
  if (response.status === 401 && (await askKey(Boolean(key), key))) return call(path, { method, body, query, signal });
  if (!response.ok) throw await refusal(response);
  return response;
}

export const json = async (path, options) => (await call(path, options)).json();

/** A call about the documents of the chosen namespace, or of the query's. */
export const documents = (path = "", options = {}) =>
  json(`v1/regrad/documents${path}`, { ...options, query: { namespace: settings.namespace, ...options.query } });

export const documentPath = (id) => `/${encodeURIComponent(id)}`;

/** What a namespace that never had a document gives: a 404 that is no error here. */
const orEmpty = (empty) => (error) => {
  if (error.status === 404 && !error.isRoute) return empty;
  throw error;
};

/** A page of documents, by id. */
export const list = (query) => documents("", { query }).catch(orEmpty({ data: [], has_more: false }));

/** The hits of a query, best first, with their texts. */
export async function search(body, namespace, signal) {
  const options = { method: "POST", query: { namespace }, body: { with_text: true, ...body }, signal };
  return (await json("v1/regrad/query", options).catch(orEmpty({ data: [] }))).data;
}

/** The lines of a response while they arrive. */
export async function* lines(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    const parts = (rest + (value ?? "")).split("\n");
    rest = done ? "" : parts.pop();
    for (const part of parts) if (part.trim()) yield part;
    if (done) return;
  }
}

/** The data of a response's server-sent events. */
export async function* events(response) {
  for await (const line of lines(response)) {
    if (!line.startsWith("data:")) continue;
    const data = line.slice(5).trim();
    if (data === "[DONE]") return;
    yield JSON.parse(data);
  }
}

async function refusal(response) {
  const text = await response.text();
  let said = text.slice(0, 300) || `The server answered ${response.status}.`, param;
  try {
    const { error, detail } = JSON.parse(text);
    if (detail === "Not Found") return new ApiError(`The server has no ${new URL(response.url).pathname}. Is it switched off?`, 404, { isRoute: true });
    param = error?.param;
    said = error?.message ?? error ?? JSON.stringify(detail);
  } catch { /* not JSON: the text itself says it */ }
  return new ApiError(said, response.status, { param });
}

let asking = null;

/** Whether there is another key to try. Calls that fail together share one dialog. */
export function askKey(refused = false, used = null) {
  if (used !== sessionStorage.getItem(KEY)) return Promise.resolve(true); // another call got one in the meantime
  asking ??= new Promise((resolve) => {
    const dialog = find("key-dialog");
    find("key").hidden = false;
    find("key-value").value = "";
    find("key-problem").hidden = !refused;
    find("key-problem").textContent = "The server refused this key.";
    dialog.returnValue = "cancel";
    dialog.showModal();
    dialog.addEventListener("close", () => {
      asking = null;
      const given = dialog.returnValue === "use";
      if (given) sessionStorage.setItem(KEY, find("key-value").value.trim());
      find("key-value").value = "";
      resolve(given);
    }, { once: true });
  });
  return asking;
}

export const forgetKey = () => sessionStorage.removeItem(KEY);
