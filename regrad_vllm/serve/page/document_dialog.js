// One document: its text, where it came from, its history; to edit, to delete, to leave out.

import { documentPath, documents, search, settings } from "./api.js";
import { button, closer, confirmed, find, h, toast } from "./dom.js";

const CHANGED = "The document changed meanwhile, so nothing is stored. Copy your text, and open the document again.";
const SOURCES = { "regrad.source": "Source", "regrad.file": "File" };
let opening = new AbortController(); // ends with the document that is shown, or is about to be

/**
 * Opens a document of ``namespace``. ``used``: what an answer used of it (score, weight, cue). ``leaveOut``, ``deleted`` and ``changed``
 * are called after the user has done that.
 */
export async function openDocument(id, namespace, { used, leaveOut, deleted, changed } = {}) {
  const dialog = find("document");
  opening.abort();
  const own = opening = new AbortController();
  const { signal } = own;
  let stored;
  try {
    stored = await documents(documentPath(id), { query: { namespace }, signal });
  } catch (error) {
    if (error.name !== "AbortError") toast(error.status === 404 && !error.isRoute ? `${id} is no longer in the bank.` : error.message);
    return;
  }
  const finish = (then) => { if (!signal.aborted) dialog.close(); then?.(); };
  const body = h("div", { class: "body" });
  const leave = (event) => {
    event.preventDefault();
    event.stopPropagation();
    if (!body.querySelector("form")?.isChanged() || confirm("Your changes are not stored yet. Close all the same?")) dialog.close();
  };
  const view = () => body.replaceChildren(text(stored, used), facts(stored, used), actions());

  const mayWrite = settings.documents === "write";
  const actions = () => h("div", { class: "actions" },
    mayWrite && button("Edit", () => body.replaceChildren(editor(stored, signal, view, () => finish(changed))), "plain"),
    button("History", (event) => history(stored, signal, event.target), "plain"),
    h("span", { class: "space" }),
    mayWrite && confirmed(leaveOut ? "Delete and ask again" : "Delete", "Really delete it?", () => remove(stored, () => finish(deleted), changed)),
    leaveOut && button("Leave out and ask again", () => finish(leaveOut), "primary"));

  dialog.replaceChildren(
    h("header", {}, h("h2", { id: "document-title" }, stored.title || stored.id),
      closer("Close", leave)),
    body);
  dialog.onclose = () => own.abort();
  dialog.oncancel = leave; // a browser lets it keep the dialog open only once
  dialog.onkeydown = (event) => event.key === "Escape" && !event.isComposing && leave(event);
  view();
  if (!dialog.open) dialog.showModal();
}

/** The text, with the sentences marked that a prompt got of it. Their places count characters, not UTF-16 units. */
function text(stored, used) {
  const characters = [...stored.text];
  const parts = [];
  let end = 0;
  const cue = used?.version === stored.version ? used.cue ?? [] : [];
  for (const sentence of [...cue].sort((a, b) => a.start - b.start)) {
    parts.push(characters.slice(end, sentence.start).join(""), h("mark", {}, characters.slice(sentence.start, sentence.end).join("")));
    end = sentence.end;
  }
  return h("div", { class: "text", tabindex: "0", role: "region", "aria-label": "Text" }, parts, characters.slice(end).join(""));
}

function facts(stored, used) {
  const rows = [
    ["Id", stored.id],
    used && ["In the answer", `score ${used.score.toFixed(3)}${used.weight === undefined ? "" : `, weight ${used.weight.toFixed(3)}`}`],
    ...Object.entries(stored.metadata ?? {}).map(([key, value]) => [SOURCES[key] ?? key, value]),
    ["Version", (used?.version ?? stored.version) === stored.version ? stored.version : `${stored.version}, the answer used ${used.version}`],
    stored.updated_at && ["Stored", when(stored.updated_at)],
    stored.num_tokens && ["Tokens", stored.truncated ? `${stored.num_tokens}, the rest was cut` : stored.num_tokens],
  ];
  return h("dl", { class: "facts" }, rows.filter(Boolean).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, String(value)))));
}

const when = (value) => new Date(typeof value === "number" ? value * 1000 : value).toLocaleString("en-GB");

async function history(stored, signal, pressed) {
  pressed.disabled = true;
  find("document").querySelector(".history")?.remove();
  const place = h("section", { class: "history" }, h("h3", {}, "History"));
  find("document").querySelector(".actions").before(place);
  const entry = (version, since, ...more) => h("li", {},
    h("strong", {}, `Version ${version}`), h("span", { class: "quiet" }, ` · since sequence ${since}`), more);
  const list = h("ol", {}, entry(stored.version, stored.sequence));
  place.append(list);
  try {
    for (let sequence = stored.sequence; sequence > 1;) {
      const { hit, since, orEarlier } = await before(stored, sequence, signal);
      if (!hit) {
        place.append(h("p", { class: "quiet" }, "Just before that the bank did not have it."));
        break;
      }
      list.append(entry(hit.version, orEarlier ? `${since} or earlier` : since, h("p", { class: "old" }, hit.text)));
      sequence = since;
    }
  } catch (error) {
    if (error.name === "AbortError") return;
    pressed.disabled = isUnknownPast(error);
    if (pressed.disabled) place.append(h("p", { class: "quiet" }, `Nothing earlier is kept: ${error.message}`));
    else place.append(h("p", { class: "error" }, error.message));
  }
}

const isUnknownPast = (error) => error.status === 400 && error.param === "as_of";

/** The version before a change, and the change that made it or a later one. The bank tells a past state by its sequence alone. */
async function before({ id, namespace }, sequence, signal) {
  const at = async (as_of) => (await search({ document_ids: [id], as_of }, namespace, signal))[0];
  const hit = await at(sequence - 1);
  let least = 1, most = sequence - 1, unknown = 0; // halves the range: a version holds from its change on
  while (hit && least < most) {
    const middle = Math.floor((least + most) / 2);
    const found = await at(middle).catch((error) => { if (!isUnknownPast(error)) throw error; unknown = middle; });
    if (found?.version === hit.version) most = middle;
    else least = middle + 1;
  }
  return { hit, since: least, orEarlier: unknown > 0 && unknown === least - 1 };
}

function editor(stored, signal, cancel, saved) {
  const title = h("input", { value: stored.title ?? "", maxlength: "300" });
  const content = h("textarea", { rows: "12", required: true });
  content.value = stored.text;
  const metadata = h("textarea", { rows: "3", spellcheck: "false" });
  metadata.value = JSON.stringify(stored.metadata ?? {}, null, 1);
  const problem = h("p", { class: "problem", role: "alert", hidden: true });
  const written = () => JSON.stringify([title.value, content.value, metadata.value]);
  const unchanged = written();
  const save = async (event) => {
    event.preventDefault();
    problem.hidden = true;
    event.submitter.disabled = true;
    event.submitter.textContent = "Encoding…";
    try {
      const receipt = await documents(documentPath(stored.id), {
        method: "PUT",
        query: { namespace: stored.namespace, expected_version: stored.version },
        body: { title: title.value, text: content.value, metadata: object(metadata.value) },
      });
      const cut = receipt.truncated ? " It is longer than the learner reads." : "";
      toast(receipt.status === "unchanged" ? "Nothing changed." : `Version ${receipt.version} is in the bank.${cut}`);
      saved();
    } catch (error) {
      problem.textContent = error.status === 409 ? CHANGED : error.message;
      problem.hidden = false;
      if (signal.aborted) toast(`${stored.title || stored.id} is not stored: ${problem.textContent}`);
      event.submitter.disabled = false;
      event.submitter.textContent = "Save";
    }
  };
  const form = h("form", { class: "fields-down", onsubmit: save },
    h("label", {}, "Title", title), h("label", {}, "Text", content), h("label", {}, "Metadata, a JSON object of strings", metadata),
    problem, h("div", { class: "actions" }, button("Cancel", cancel), h("button", { class: "primary" }, "Save")));
  return Object.assign(form, { isChanged: () => written() !== unchanged });
}

function object(text) {
  try { return JSON.parse(text || "{}"); } catch { throw new Error('Metadata must be a JSON object, such as {"author": "Ada"}.'); }
}

async function remove(stored, then, changed) {
  const { namespace, title, text: content, metadata } = stored;
  try {
    await documents(documentPath(stored.id), { method: "DELETE", query: { namespace, expected_version: stored.version } });
  } catch (error) {
    toast(error.message);
    return;
  }
  then();
  const undo = {
    label: "Undo",
    run: async () => {
      try {
        const body = { title, text: content, metadata };
        await documents(documentPath(stored.id), { method: "PUT", query: { namespace, expected_version: 0 }, body });
        toast(`${title || stored.id} is back.`);
        changed?.();
      } catch (error) {
        const said = error.status === 409 ? `The bank has another ${stored.id} meanwhile. Delete that first.` : error.message;
        toast(said, { ...undo, stays: true }); // the text is here alone
      }
    },
  };
  toast(`${title || stored.id} is deleted.`, undo);
}
