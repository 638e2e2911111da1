// The state of bank and server, as numbers and small charts. It asks only while it is on the screen.

import { call, json } from "./api.js";
import { bytes, duration, find, h, number, plural } from "./dom.js";

const SECONDS = 3;
const KEPT = 60; // points of a chart
const LEAST = 12; // so few fill its width
const SVG = "http://www.w3.org/2000/svg";
const series = new Map(); // chart → its lines, each a list of numbers; null: nothing happened
let timer = null;
let visible = false;
let last = null; // the metrics before, to make rates of counts

const percent = (share) => `${Math.round(share * 100)} %`;
const CHARTS = [
  { id: "queue", title: "Requests", lines: ["running", "waiting"], format: number },
  { id: "latency", title: "Latency", lines: ["first token", "documents"], format: duration },
  { id: "tokens", title: "Tokens per second", lines: ["generated"], format: number },
  { id: "arena-hits", title: "Hits in the arena", lines: ["share"], format: percent, most: 1 },
  { id: "pool-hits", title: "Hits in the workers' pools", lines: ["share"], format: percent, most: 1 },
  { id: "arena", title: "Arena", lines: ["used"], format: bytes },
  { id: "pool", title: "Pool of the workers", lines: ["used"], format: bytes },
  { id: "memory", title: "Memory", lines: ["server", "workers"], format: bytes },
];

export function startState() {
  find("charts").append(...CHARTS.map((chart) => h("figure", { class: "card chart", id: `chart-${chart.id}` },
    h("figcaption", {}, chart.title), h("div", { class: "values" }), h("div", { class: "plot" }), h("p", { class: "quiet note" }))));
  for (const chart of CHARTS) series.set(chart.id, chart.lines.map(() => []));
  document.addEventListener("visibilitychange", () => (visible && !document.hidden ? tick() : clearTimeout(timer)));
}

export function showState() {
  visible = true;
  tick();
}

export function hideState() {
  visible = false;
  clearTimeout(timer);
}

async function tick() {
  clearTimeout(timer);
  try {
    const [status, metrics] = await Promise.all([json("v1/regrad/status"), call("metrics").then((answer) => answer.text()).then(parse)]);
    if (!visible) return;
    measure(status, metrics);
    facts(status, metrics);
    find("state-when").textContent = `every ${SECONDS} s while this is on the screen`;
  } catch (error) {
    find("state-when").textContent = error.message;
  }
  if (visible && !document.hidden) {
    clearTimeout(timer);
    timer = setTimeout(tick, SECONDS * 1000);
  }
}

/** Sums of Prometheus' samples by name, over all labels; with the label "result" also by its value. */
function parse(text) {
  const sums = { time: performance.now() };
  for (const [, name, labels, value] of text.matchAll(/^([a-z_:]+)(\{.*\})? (\S+)$/gim)) {
    sums[name] = (sums[name] ?? 0) + Number(value);
    const result = labels?.match(/result="(\w+)"/)?.[1];
    if (result) sums[`${name}.${result}`] = (sums[`${name}.${result}`] ?? 0) + Number(value);
  }
  return sums;
}

const total = (items, name) => items.reduce((sum, item) => sum + (item[name] ?? 0), 0);

function hits(id, found, missed) {
  const note = `${plural(found, "hit")}, ${number(missed)} missed since the start`;
  add(id, [found + missed ? found / (found + missed) : null], note);
}

function measure({ arena, workers, server }, metrics) {
  const since = (name) => (last ? Math.max(0, (metrics[name] ?? 0) - (last[name] ?? 0)) : 0); // below 0: the server began anew
  const mean = (name) => (since(`${name}_count`) > 0 ? since(`${name}_sum`) / since(`${name}_count`) : null);
  const steps = ["retrieve", "fetch", "resident"].map((step) => mean(`regrad_${step}_ms`)).filter((ms) => ms !== null);
  const first = mean("vllm:time_to_first_token_seconds");
  const pool = (name) => total(workers, `pool_${name}`);
  add("queue", [metrics["vllm:num_requests_running"] ?? 0, metrics["vllm:num_requests_waiting"] ?? 0], "at this moment");
  add("latency", [first === null ? null : first * 1000, steps.length ? steps.reduce((a, b) => a + b) : null], "means of the last requests");
  add("tokens", [last ? since("vllm:generation_tokens_total") / ((metrics.time - last.time) / 1000) : null],
    `${number(metrics["vllm:generation_tokens_total"] ?? 0)} since the start`);
  hits("arena-hits", arena.num_hits, arena.num_misses);
  hits("pool-hits", pool("num_hits"), pool("num_misses"));
  const kept = (most, count, held, evicted) =>
    `of ${bytes(most)} · ${count}, ${number(held)} held, ${number(evicted)} evicted`;
  add("arena", [arena.used_bytes],
    kept(arena.max_bytes, plural(arena.num_records, "gradient"), arena.num_held, arena.num_evictions));
  add("pool", [pool("used_bytes")],
    kept(pool("max_bytes"), plural(pool("num_documents"), "document"), pool("num_held"), pool("num_evictions")));
  add("memory", [server.resident_bytes ?? null, total(workers, "resident_bytes") || null], plural(workers.length, "worker"));
  last = metrics;
}

function add(id, values, note) {
  const chart = CHARTS.find((each) => each.id === id);
  const all = series.get(id);
  values.forEach((value, index) => { all[index].push(value); if (all[index].length > KEPT) all[index].shift(); });
  const latest = all.map((points) => points.findLast((value) => value !== null));
  const shown = latest.map((value) => (value === undefined ? "–" : chart.format(value)));
  const element = find(`chart-${id}`);
  element.querySelector(".values").replaceChildren(...shown.map((value, index) => h("p", { class: `line-${index}` },
    h("strong", {}, value), all.length > 1 && h("span", { class: "quiet" }, chart.lines[index]))));
  element.querySelector(".note").textContent = note;
  const said = chart.lines.map((line, index) => `${line} ${shown[index]}`).join(", ");
  element.querySelector(".plot").replaceChildren(plot(all, chart.most, `${chart.title}: ${said}`));
}

/** The lines of a chart, each in a style of its own. A point without a value is a gap. */
function plot(all, most, label) {
  const svg = (tag, attributes) => {
    const element = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  };
  const top = (most ?? Math.max(...all.flat().map((value) => value ?? 0), 0)) || 1;
  const picture = svg("svg", { viewBox: "0 0 100 32", preserveAspectRatio: "none", role: "img", "aria-label": label });
  all.forEach((points, index) => {
    let path = "", drawing = false, lastX = 0, firstX = 0;
    points.forEach((value, place) => {
      if (value === null) { drawing = most !== undefined && drawing; return; }
      const x = 100 - ((points.length - 1 - place) * 100) / (Math.max(points.length, LEAST) - 1);
      if (!path) firstX = x;
      lastX = x;
      path += `${drawing ? "L" : "M"}${x.toFixed(2)} ${(31 - (value / top) * 29).toFixed(2)}`;
      if (!drawing && (points[place + 1] ?? null) === null) path += "h0.01"; // a point alone is a dot
      drawing = true;
    });
    const isWhole = path && !path.slice(1).includes("M");
    if (index === 0 && isWhole) picture.append(svg("path", { d: `${path}L${lastX} 32L${firstX} 32Z`, class: "area" }));
    picture.append(svg("path", { d: path || "M0 31", class: `line line-${index}` }));
  });
  return picture;
}

function facts({ bank, learner, workers, models, vllm_version, lora_dtype }, metrics) {
  const rows = [
    ["Bank", bank.available ? bank.address : `${bank.address} does not answer: ${bank.reason}`],
    bank.available && ["Documents", number(bank.num_documents)],
    bank.available && ["Gradients, past versions included", number(bank.num_gradients)],
    bank.available && ["Sequence of the last change", number(bank.sequence)],
    bank.available && ["Codec", bank.codec],
    ["Models with ReGrad", models.join(", ")],
    ["Learner", `${learner.fingerprint.slice(0, 12)}, rank ${learner.rank}, k = ${learner.top_k}, γ = ${learner.gamma}`],
    ["Late or lost documents", `${number(total(workers, "num_late"))} late, ${number(total(workers, "num_lost"))} lost`],
    ["Requests with ReGrad", number(metrics.regrad_requests_total ?? 0)],
    ["vLLM", `${vllm_version}, ${lora_dtype}`],
  ];
  find("facts").replaceChildren(...rows.filter(Boolean).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
}
