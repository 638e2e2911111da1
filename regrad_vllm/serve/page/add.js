// Documents that are added: from files and pasted texts, cut into passages, sent, in place of what they brought before.

import { call, documentPath, documents, lines, list, settings } from "./api.js";
import { button, find, h, number, plural, speak, toast } from "./dom.js";

const BATCH = 32; // documents in one call, so that a stopped upload stops soon
const PASSAGE = 800; // characters, about 200 tokens: longer texts are cut, because a gradient is of a short text
const PIECE = `[^]{1,${PASSAGE}}`;
const CUT = new RegExp(`${PIECE}(?:(?<=[.!?])(?=\\s|$)|(?<=[。！？]))|${PIECE}(?=\\s|$)|${PIECE}`, "gu"); // at a sentence, a word, or anywhere
const SOURCE = "regrad.source";
const PASTED = "pasted into the page";
let added; // called after an upload

export function startAdding(then) {
  added = then;
  find("add-form").addEventListener("submit", addText);
  find("files").addEventListener("change", (event) => { addFiles([...event.target.files]); event.target.value = ""; });
  find("to-add").addEventListener("click", () => { find("add-form").scrollIntoView(); find("add-text").focus(); });
  const part = find("documents");
  part.addEventListener("dragover", (event) => { event.preventDefault(); find("drop").classList.add("over"); });
  part.addEventListener("dragleave", () => find("drop").classList.remove("over"));
  part.addEventListener("drop", (event) => {
    event.preventDefault();
    find("drop").classList.remove("over");
    addFiles([...event.dataTransfer.files]);
  });
}

async function addText(event) {
  event.preventDefault();
  const text = find("add-text").value.trim();
  if (!text) { toast("Paste a text first."); return; }
  const title = find("add-title-field").value.trim();
  const chosen = find("add-id").value.trim();
  const id = chosen || slug(title || text);
  const { namespace } = settings;
  try {
    const [first] = chosen ? [] : (await list({ prefix: id, limit: 1 })).data;
    if (first?.id.split("#")[0] === id) throw new Error(`A document has the id ${id}. Name another id, or the same to replace it.`);
    const given = cut(text, id, title, { [SOURCE]: PASTED });
    await refuseOthers(given, PASTED, namespace);
    upload(given, { name: title || id, base: id, source: PASTED, namespace });
    event.target.reset();
  } catch (error) {
    toast(error.message);
  }
}

/** The passages of a text as documents. */
const cut = (text, id, title, metadata) =>
  passages(text).map((passage, index, all) => ({ id: all.length > 1 ? `${id}#${index + 1}` : id, title, text: passage, metadata }));

const slug = (text) =>
  text.toLowerCase().normalize("NFKD").replace(/[^a-z0-9]+/g, "-").slice(0, 48).replace(/^-|-$/g, "") || `text-${Date.now()}`;

async function addFiles(files) {
  const { namespace } = settings;
  for (const file of files) {
    try {
      const given = read(file.name, decoded(await file.arrayBuffer()));
      if (!given.length) throw new Error("the file has no text.");
      await refuseOthers(given, file.name, namespace);
      await upload(given, { name: file.name, base: file.name, source: file.name, namespace });
    } catch (error) {
      toast(`${file.name}: ${error.message}`);
    }
  }
}

function decoded(data) {
  try { return new TextDecoder("utf-8", { fatal: true }).decode(data); } catch {
    throw new Error("only texts in UTF-8 can be added. Save the file as UTF-8 first.");
  }
}

/** The documents of a file: one a line of .jsonl, as `regrad ingest` reads it, else the passages of its text. */
function read(name, text) {
  if (text.includes("\u0000")) throw new Error("only texts can be added, this is binary data.");
  const source = { [SOURCE]: name }, file = { "regrad.file": name };
  if (!name.toLowerCase().endsWith(".jsonl")) return cut(text, name, name.replace(/\.\w+$/, ""), { ...source, ...file });
  return text.split("\n").map((line, index) => [line, index + 1]).filter(([line]) => line.trim()).map(([line, place]) => {
    const fail = (rule) => { throw new Error(`line ${place} ${rule}`); };
    let given;
    try { given = JSON.parse(line, exact); } catch (error) { fail(error instanceof RangeError ? error.message : "must be a JSON object."); }
    const { id, title, text: content, metadata, ...rest } = given ?? {};
    if (typeof content !== "string") fail('must have "text", which is a string.');
    const plain = (key, value) => asText(value) ?? fail(`must have a text, a number or a list of these in "${key}".`);
    const named = Object.entries({ ...metadata, ...rest }).filter(([, value]) => value !== null);
    const own = Object.fromEntries(named.map(([key, value]) => [key, plain(key, value)]));
    return {
      id: plain("id", id ?? `${name}#${place}`), title: plain("title", title ?? ""), text: content,
      metadata: { ...own, ...(id == null && file), ...source },
    };
  });
}

/** The value of a key. RangeError for a number that would not be written back as it stands. Older browsers give no context. */
function exact(key, value, context) {
  const isLarge = Number.isInteger(value) && !Number.isSafeInteger(value);
  const written = context?.source ?? String(value);
  if (typeof value !== "number" || (!isLarge && written === String(value))) return value;
  throw new RangeError(`has the number ${written} in "${key}", which would be changed. Write it as a string.`);
}

/** Numbers, truth values and lists of these and of texts as JSON has them. undefined for other values. */
function asText(value) {
  if (typeof value === "string") return value;
  if (!Array.isArray(value)) return typeof value === "object" ? undefined : JSON.stringify(value);
  if (value.some((each) => each && typeof each === "object")) return undefined;
  return `[${value.map((each) => JSON.stringify(each)).join(", ")}]`;
}

/** Paragraphs joined up to the length of a passage; a longer paragraph is cut between sentences or words. */
function passages(text) {
  const pieces = text.trim().split(/\n\s*\n/).flatMap((paragraph) =>
    paragraph.length <= PASSAGE ? [paragraph.trim()] : paragraph.match(CUT).map((piece) => piece.trim()));
  return pieces.filter(Boolean).reduce((found, piece) => {
    const joined = found.length ? `${found.at(-1)}\n\n${piece}` : piece;
    return found.length && joined.length <= PASSAGE ? [...found.slice(0, -1), joined] : [...found, piece];
  }, []);
}

/** The document of an id, without its text. undefined: there is none. */
const stored = async (id, namespace) => (await list({ namespace, prefix: id, limit: 1 })).data.find((document) => document.id === id);

const names = (found) => found.slice(0, 10).map(({ id }) => id).join(", ") + (found.length > 10 ? ` and ${number(found.length - 10)} more` : "");

/** Asks whether documents of other sources may be replaced, if there are any. Error if not. */
async function refuseOthers(given, source, namespace) {
  const others = [];
  for (let start = 0; start < given.length; start += BATCH) {
    const found = await Promise.all(given.slice(start, start + BATCH).map(({ id }) => stored(id, namespace)));
    others.push(...found.filter((document) => document && document.metadata[SOURCE] !== source));
  }
  if (others.length && !confirm(`The bank has documents of other sources with these ids: ${names(others)}. Replace them?`)) {
    throw new Error("nothing is added, because its ids are taken.");
  }
}

/** Deletes the passages that the text brought before and has no longer, and tells it. Those of other sources stay. */
async function deleteLeftovers(given, { base, source, namespace }, isWhole, tell) {
  const found = [await stored(base, namespace)];
  for (let after = ""; after !== null;) {
    const page = await list({ namespace, prefix: `${base}#`, after, limit: 1000 });
    found.push(...page.data.filter(({ id }) => /^\d+$/.test(id.slice(base.length + 1))));
    after = page.has_more ? page.last_id : null;
  }
  const ids = new Set(given.map(({ id }) => id));
  const old = found.filter((document) => document?.metadata[SOURCE] === source && !ids.has(document.id));
  if (!old.length) return;
  if (!isWhole) { tell(`Not all is stored, so earlier passages stay: ${names(old)}`); return; }
  for (const { id, version } of old) {
    await documents(documentPath(id), { method: "DELETE", query: { namespace, expected_version: version } });
  }
  tell(`Deleted, because the text no longer has them: ${names(old)}`);
}

/** Sends documents and shows how many the bank has acknowledged: each of them is encoded and stored then. */
async function upload(given, origin) {
  const { name, namespace } = origin;
  const stop = new AbortController();
  const count = { done: 0, failed: 0, cut: 0 };
  const bar = h("progress", { max: given.length, value: 0, "aria-label": `Encoding ${name}` });
  const said = h("span", { class: "quiet" }, `0 of ${number(given.length)} encoded`);
  const errors = h("ul", { class: "errors" });
  const note = h("p", { class: "quiet" });
  const stopButton = button("Stop", () => stop.abort(), "plain");
  find("uploads").prepend(h("div", { class: "upload" }, h("p", {}, h("strong", {}, name), stopButton), bar, said, note, errors));
  const tell = (message) => { if (errors.children.length < 20) errors.append(h("li", {}, message)); };
  try {
    for (let start = 0; start < given.length; start += BATCH) {
      const body = given.slice(start, start + BATCH).map((document) => JSON.stringify(document)).join("\n");
      const response = await call("v1/regrad/documents/batch", { method: "POST", query: { namespace }, body, signal: stop.signal });
      for await (const line of lines(response)) {
        const receipt = JSON.parse(line);
        if (receipt.error?.code >= 429 && !receipt.id) throw new Error(receipt.error.message); // the bank failed, not this document
        count[receipt.error ? "failed" : "done"] += 1;
        if (receipt.truncated) count.cut += 1;
        if (receipt.error) tell(`${receipt.id}: ${receipt.error.message}`);
        bar.value = count.done + count.failed;
        const refused = count.failed ? `, ${number(count.failed)} refused` : "";
        const long = count.cut ? `, ${number(count.cut)} longer than the learner reads` : "";
        said.textContent = `${number(count.done)} of ${number(given.length)} encoded${refused}${long}`;
      }
    }
    await deleteLeftovers(given, origin, count.done === given.length, (message) => { note.textContent = message; });
  } catch (error) {
    said.textContent += ", stopped";
    if (error.name !== "AbortError") errors.prepend(h("li", {}, error.message));
  }
  stopButton.remove();
  speak(`${name}: ${said.textContent}. ${note.textContent}`);
  added();
}
