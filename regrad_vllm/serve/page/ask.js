// The questions: every chosen method answers, side by side, with its times, tokens and documents.

import { call, documentPath, documents, events, list, search, settings } from "./api.js";
import { openDocument } from "./document_dialog.js";
import { button, duration, find, h, number, plural, speak, toast } from "./dom.js";

const METHODS = [
  { id: "base", name: "Base", hint: "the model alone" },
  { id: "rag", name: "RAG", hint: "documents in the prompt" },
  { id: "regrad", name: "ReGrad", hint: "documents as gradients", mode: "blind" },
  { id: "cue", name: "ReGrad + cue", hint: "gradients and the nearest sentences", mode: "cue" },
  { id: "icl", name: "ReGrad + ICL", hint: "gradients and documents in the prompt", mode: "icl", off: true },
];
const EXAMPLE = {
  id: "ship-the-quilegren", title: "the Quilegren",
  text: "The Quilegren sails from Havana. The hull of the Quilegren is painted violet. The captain of the Quilegren is " +
    "Elric Norerria. In the hold of the Quilegren there are lanterns. The launch of the Quilegren took place in 1990.",
  question: "Who commands the Quilegren?",
};
let running = null; // stops the answers that run

export function startAsk() {
  const offered = METHODS.filter((method) => method.id !== "rag" || settings.documents !== "off");
  find("methods").append(...offered.map((method) => h("label", { class: "chip" },
    h("input", { type: "checkbox", value: method.id, checked: !method.off }), h("span", {}, method.name))));
  find("top-k").max = settings.learner.max_documents;
  find("top-k").placeholder = settings.learner.top_k;
  find("gamma").placeholder = settings.learner.gamma;
  find("ask-form").addEventListener("submit", (event) => {
    event.preventDefault();
    ask(fromForm());
  });
  find("question").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    find("ask-form").requestSubmit();
  });
  find("stop").addEventListener("click", () => running?.abort());
  addEventListener("keydown", (event) => event.key === "Escape" && !document.querySelector("dialog[open]") && running?.abort());
  find("example").addEventListener("click", addExample);
}

export async function showAsk() {
  if (settings.documents === "off") return;
  const { namespace } = settings;
  try {
    const page = await list({ limit: 1 });
    if (namespace === settings.namespace) find("welcome").hidden = page.data.length > 0;
  } catch (error) {
    toast(error.message);
  }
}

async function addExample(event) {
  const { id, question, ...document } = EXAMPLE;
  const { namespace } = settings;
  event.target.disabled = true;
  event.target.textContent = "Encoding the example…";
  try {
    await documents(documentPath(id), { method: "PUT", query: { namespace }, body: document });
    find("welcome").hidden = true;
    find("question").value = question;
    ask({ ...fromForm(), namespace });
  } catch (error) {
    toast(error.message);
  }
  event.target.disabled = false;
  event.target.textContent = "Add an example and ask about it";
}

function fromForm() {
  const value = (id) => (find(id).value === "" ? null : Number(find(id).value));
  return {
    question: find("question").value.trim(), namespace: settings.namespace,
    methods: METHODS.filter((method) => find("methods").querySelector(`[value=${method.id}]`)?.checked),
    top_k: value("top-k"), gamma: value("gamma"), max_tokens: value("max-tokens") ?? 64,
    inTurn: find("in-turn").checked,
    without: new Map(), // id → title of the documents that are left out
    before: new Map(), // method → its answer when the question was asked before
  };
}

/** Asks every method of the question, and shows the answers above those before. */
async function ask(question) {
  if (!question.question || !question.methods.length) {
    toast(question.question ? "Choose at least one method." : "Write a question first.");
    return;
  }
  running?.abort();
  const stop = running = new AbortController();
  find("stop").hidden = false;
  const columns = question.methods.map((method) => column(method, question));
  const answers = new Map();
  const again = (changes) => ask({ ...question, before: new Map(answers), ...changes });
  const shownTurn = turn(question, columns, again);
  find("turns").prepend(shownTurn);
  shownTurn.scrollIntoView({ block: "nearest" });
  let asked; // for the first method that needs them, so that its time contains the search
  const hits = () => asked ??= found(question, stop.signal);
  const run = async (shown) => {
    const answer = await shown.run(hits, stop.signal, (used) => openUsed(used, question, again));
    if (answer !== null) answers.set(shown.method.id, answer);
  };
  if (!question.inTurn && settings.documents !== "off") hits().catch(() => {}); // each method that needs them tells it
  if (question.inTurn) for (const shown of columns) await run(shown);
  else await Promise.all(columns.map(run));
  if (running === stop) {
    running = null;
    find("stop").hidden = true;
    speak(columns.map((shown) => `${shown.method.name}: ${answers.get(shown.method.id) || "no answer"}`).join(". "));
  }
}

/** The hits that the question may use: k of them, without those that are left out. */
async function found(question, signal) {
  const { top_k, max_documents } = settings.learner;
  const wanted = question.top_k ?? top_k;
  const asked = Math.min(max_documents, wanted + question.without.size);
  const hits = await search({ query: question.question, top_k: asked }, question.namespace, signal);
  return hits.filter((hit) => !question.without.has(hit.id)).slice(0, wanted);
}

function turn(question, columns, again) {
  const notes = [
    question.top_k && `k = ${question.top_k}`, question.gamma !== null && `γ = ${question.gamma}`,
    question.namespace !== settings.ownNamespace && `namespace ${question.namespace}`,
  ].filter(Boolean);
  return h("article", { class: "turn" },
    h("header", {},
      h("h2", {}, question.question),
      [...question.without].map(([, title]) => h("span", { class: "tag" }, `without ${title}`)),
      question.removed && h("span", { class: "tag" }, `${question.removed} deleted`),
      notes.length > 0 && h("span", { class: "quiet" }, notes.join(" · ")),
      button("Ask again", () => again({ removed: null }), "plain")),
    h("div", { class: "columns" }, columns.map((shown) => shown.element)));
}

function openUsed(used, question, again) {
  const title = used.title || used.id;
  openDocument(used.id, question.namespace, {
    used,
    leaveOut: () => again({ without: new Map([...question.without, [used.id, title]]), removed: null }),
    deleted: () => again({ removed: title }),
  });
}

/** One method's place in the row of answers. */
function column(method, question) {
  const answer = h("p", { class: "answer waiting" });
  const figures = h("dl", { class: "figures" });
  const used = h("div", { class: "used" });
  const earlier = question.before.get(method.id);
  const changed = h("span", { class: "tag", hidden: true });
  const element = h("div", { class: `column ${method.id}`, role: "group", "aria-label": method.name, "aria-busy": "true" },
    h("header", {}, h("h3", {}, method.name), changed, h("span", { class: "quiet" }, method.hint)),
    h("div", {}, answer,
      earlier !== undefined && h("p", { class: "before" }, h("span", { class: "quiet" }, "Before: "), earlier || "no answer")),
    figures, used);

  /** The answer. null if it failed or was stopped. */
  async function run(hits, signal, open) {
    const seen = { text: "", start: performance.now() };
    const show = (name, value, unit) => figures.append(h("div", {}, h("dt", {}, name), h("dd", {}, value, unit && h("small", {}, unit))));
    try {
      const { body, listed } = await request(method, question, hits);
      listDocuments(used, listed, open);
      const response = await call("v1/chat/completions", { method: "POST", body, signal });
      for await (const event of events(response)) {
        if (event.error) throw new Error(event.error.message);
        if (event.regrad) hits().catch(() => []).then((known) => listUsed(used, event.regrad, known, open));
        const piece = event.choices?.[0]?.delta?.content;
        if (piece && !seen.text) {
          seen.first = performance.now();
          answer.classList.remove("waiting");
          show("First token", ...split(duration(seen.first - seen.start)));
        }
        if (piece) answer.textContent = seen.text += piece;
        if (event.usage) seen.usage = event.usage;
      }
      if (seen.usage) {
        show("Prompt", number(seen.usage.prompt_tokens), seen.usage.prompt_tokens === 1 ? "token" : "tokens");
        show("Answer", number(seen.usage.completion_tokens), `in ${duration(performance.now() - seen.start)}`);
      }
      if (!seen.text.trim()) answer.replaceChildren(h("em", {}, "No text came back."));
    } catch (error) {
      const stopped = error.name === "AbortError";
      seen.failed = true;
      answer.append(h("span", { class: stopped ? "quiet" : "error" }, stopped ? " stopped" : error.message));
    }
    answer.classList.remove("waiting");
    element.setAttribute("aria-busy", "false");
    if (seen.failed) return null;
    if (earlier !== undefined) {
      const same = earlier === seen.text.trim();
      changed.hidden = false;
      changed.textContent = same ? "same answer" : "changed";
      changed.classList.toggle("strong", !same);
      element.querySelector(".before").hidden = same;
    }
    return seen.text.trim();
  }

  return { method, element, run };
}

const split = (text) => text.split(" ");

/** The request of a method, and the documents that the page itself puts into its prompt. */
async function request(method, question, hits) {
  const { prompts } = settings.learner;
  const system = prompts.system ? [{ role: "system", content: prompts.system }] : [];
  const body = (content, regrad, messages = []) => ({
    model: settings.base, messages: [...messages, { role: "user", content }], regrad, temperature: 0,
    max_tokens: question.max_tokens, stream: true, stream_options: { include_usage: true },
  });
  if (method.id === "base") return { body: body(question.question, { enabled: false }, system), listed: null };
  if (method.id === "rag") {
    const listed = await hits();
    const texts = listed.map(({ title, text }) => fill(title ? prompts.document : prompts.document_untitled, { title, text }));
    const content = listed.length ? fill(prompts.icl, { documents: texts.join("\n\n"), question: question.question }) : question.question;
    return { body: body(content, { enabled: false }, system), listed: listed.map(({ weight, ...hit }) => hit) };
  }
  const regrad = { mode: method.mode, namespace: question.namespace };
  if (question.gamma !== null) regrad.gamma = question.gamma;
  if (question.without.size) {
    regrad.document_ids = (await hits()).map((hit) => hit.id);
    if (!regrad.document_ids.length) return { body: body(question.question, { enabled: false }, system), listed: [] };
  } else if (question.top_k) regrad.top_k = question.top_k;
  return { body: body(question.question, regrad), listed: null };
}

/** Fills in every {name} in one pass, so that braces in a value stay unchanged. */
const fill = (template, values) => template.replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);

function listUsed(place, regrad, hits, open) {
  const known = new Map(hits.map((hit) => [hit.id, hit]));
  listDocuments(place, regrad.documents.map((used) => {
    const hit = known.get(used.id);
    const score = regrad.query === null && hit ? hit.score : used.score; // named documents have none of their own
    return { ...used, title: hit?.title, score, cue: regrad.cue.filter((sentence) => sentence.document === used.id) };
  }), open);
  if (regrad.reason) place.append(h("p", { class: "quiet" }, regrad.reason));
}

/** Buttons that open the documents. None: the method uses no documents. */
function listDocuments(place, listed, open) {
  if (!listed) return;
  place.replaceChildren(
    h("h4", {}, listed.length ? plural(listed.length, "document") : "No document"),
    ...listed.map((used) => h("button", { type: "button", class: "used-document", onclick: () => open(used) },
      h("span", { class: "name" }, used.title || used.id),
      h("span", { class: "score" }, `score ${used.score.toFixed(2)}`, used.weight !== undefined && ` · weight ${used.weight.toFixed(2)}`),
      used.weight !== undefined && weightBar(used.weight))));
}

function weightBar(weight) {
  const bar = h("span", { class: "weight", "aria-hidden": "true" });
  bar.style.setProperty("--weight", weight); // by script, since the page's policy allows no style attributes
  return bar;
}
