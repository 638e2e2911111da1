// The documents of a namespace: search and list.

import { list, search, settings } from "./api.js";
import { startAdding } from "./add.js";
import { openDocument } from "./document_dialog.js";
import { bytes, find, h, number, plural, toast } from "./dom.js";

const PAGE = 50;
let shown = 0; // the number of the list that was asked for last; an older answer is dropped

export function startDocuments() {
  let waiting;
  find("search").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(showDocuments, 250); });
  find("search-by").addEventListener("change", () => showDocuments());
  find("search-form").addEventListener("submit", (event) => { event.preventDefault(); showDocuments(); });
  if (settings.documents === "write") startAdding(showDocuments);
}

/** Lists the documents, or the hits of the search. */
export async function showDocuments() {
  const own = ++shown;
  const text = find("search").value.trim();
  const by = find("search-by").value;
  find("more").hidden = true;
  try {
    if (text && by !== "prefix") {
      const hits = await search({ query: text, top_k: settings.learner.max_documents, retrieval: by }, settings.namespace);
      if (own !== shown) return;
      find("list").replaceChildren(...hits.map(row));
      find("documents-count").textContent = `${plural(hits.length, "hit")}, best first`;
    } else {
      find("list").setAttribute("aria-busy", "true");
      await page(own, "", by === "prefix" ? text : "");
    }
    if (own === shown && !find("list").children.length) {
      const empty = text ? "Nothing found." : `No documents in the namespace ${settings.namespace} yet.`;
      find("list").append(h("li", { class: "empty quiet" }, empty));
    }
  } catch (error) {
    toast(error.message);
  }
  find("list").setAttribute("aria-busy", "false");
}

async function page(own, after, prefix) {
  const { data, has_more, last_id } = await list({ limit: PAGE, after, prefix });
  if (own !== shown) return;
  if (after) find("list").append(...data.map(row));
  else find("list").replaceChildren(...data.map(row));
  const count = find("list").children.length;
  find("documents-count").textContent = has_more ? `the first ${number(count)}` : plural(count, "document");
  find("more").hidden = !has_more;
  find("more").onclick = () => {
    find("more").hidden = true;
    page(own, last_id, prefix).catch((error) => { find("more").hidden = own !== shown; toast(error.message); });
  };
}

function row(document) {
  const { namespace } = settings;
  const open = () => openDocument(document.id, namespace, { deleted: showDocuments, changed: showDocuments });
  return h("li", {}, h("button", { type: "button", onclick: open },
    h("span", { class: "name" }, document.title || document.id),
    h("span", { class: "quiet id" }, document.id),
    document.text && h("span", { class: "quiet excerpt" }, document.text),
    h("span", { class: "score" }, document.score === undefined ? size(document) : `score ${document.score.toFixed(2)}`)));
}

const size = (document) => [document.num_text_bytes && bytes(document.num_text_bytes), `v${document.version}`].filter(Boolean).join(" · ");
