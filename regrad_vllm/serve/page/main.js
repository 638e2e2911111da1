// Starts the page: its parts, its colours, its namespace, its key.

import { askKey, forgetKey, json, settings } from "./api.js";
import { showAsk, startAsk } from "./ask.js";
import { find } from "./dom.js";
import { showDocuments, startDocuments } from "./documents.js";
import { hideState, showState, startState } from "./state.js";

const PARTS = { ask: showAsk, documents: showDocuments, state: showState };
const dark = matchMedia("(prefers-color-scheme: dark)");

function colours() {
  const chosen = localStorage.getItem("regrad.theme") ?? (dark.matches ? "dark" : "light");
  document.documentElement.dataset.theme = chosen;
  find("theme").setAttribute("aria-pressed", String(chosen === "dark"));
}

function route() {
  const part = location.hash.slice(1) in PARTS ? location.hash.slice(1) : "ask";
  for (const name of Object.keys(PARTS)) {
    find(name).hidden = name !== part;
    const link = document.querySelector(`nav a[href="#${name}"]`);
    if (name === part) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${find(part).querySelector("h1").textContent} · ReGrad`;
  scrollTo(0, 0);
  if (part !== "state") hideState();
  PARTS[part]();
}

function problem(error) {
  find("problem").hidden = !error;
  find("problem").textContent = error?.message ?? "";
}

/** Reads the models' names and the defaults, and again every few seconds until server and bank answer. */
async function connect() {
  try {
    const [models, status] = await Promise.all([json("v1/models"), json("v1/regrad/status")]);
    const first = !settings.base;
    settings.base = models.data.find((card) => status.models.includes(`${card.id}-regrad`)).id;
    settings.learner = status.learner;
    settings.documents = document.documentElement.dataset.documents = status.documents;
    settings.ownNamespace = status.namespace;
    settings.namespace ||= status.namespace;
    find("namespace").value ||= settings.namespace;
    find("model").textContent = settings.base;
    problem(status.bank.available ? null : { message: `The bank does not answer: ${status.bank.reason}` });
    if (first) for (const start of [startAsk, startDocuments, startState]) start();
    if (first || status.bank.available) route();
    if (!status.bank.available) setTimeout(connect, 3000);
  } catch (error) {
    problem(error);
    if (error.status !== 401) setTimeout(connect, 3000);
  }
}

colours();
dark.addEventListener("change", colours);
find("theme").addEventListener("click", () => {
  localStorage.setItem("regrad.theme", document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  colours();
});
find("namespace").addEventListener("change", (event) => {
  if (!event.target.reportValidity()) return;
  localStorage.setItem("regrad.namespace", event.target.value);
  settings.namespace = event.target.value ||= settings.ownNamespace ?? "";
  if (settings.base) route();
});
find("key").addEventListener("click", async () => {
  forgetKey();
  if (await askKey()) connect();
});
find("key-cancel").addEventListener("click", () => find("key-dialog").close("cancel"));
addEventListener("hashchange", () => settings.base && route());
find(location.hash.slice(1) in PARTS ? location.hash.slice(1) : "ask").hidden = false;
connect();
