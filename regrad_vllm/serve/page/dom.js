// Small helpers. Text from documents and models goes in as text nodes, never as HTML.

export const find = (id) => document.getElementById(id);

/** An element with attributes, properties (on…: a listener) and children. null and false leave a child out. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element && typeof value !== "string") element[name] = value;
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export const button = (label, onclick, kind = "") => h("button", { type: "button", class: kind, onclick }, label);

export const closer = (label, onclick) => h("button", { type: "button", class: "icon close", "aria-label": label, onclick });

const toasts = find("toasts");
addEventListener("close", () => document.body.append(toasts), true);

/** A short message at the edge, above an open dialog. ``action``: a button, what it runs, and whether it stays there. */
export function toast(message, action) {
  const line = h("p", {}, h("span", {}, message));
  const close = () => line.remove();
  if (action) line.append(button(action.label, () => { close(); action.run(); }));
  line.append(closer("Close the message", close));
  (document.querySelector("dialog[open]") ?? document.body).append(toasts);
  toasts.append(line);
  if (!action?.stays) setTimeout(close, action ? 20_000 : 7_000);
}

/** Has screen readers say a text. */
export const speak = (text) => { find("spoken").textContent = text; };

/** A button that acts at the second press. */
export function confirmed(label, question, act) {
  const made = button(label, () => {
    if (made.dataset.armed) { act(); return; }
    made.dataset.armed = "yes";
    made.textContent = question;
    setTimeout(() => { delete made.dataset.armed; made.textContent = label; }, 4000);
  }, "danger");
  return made;
}

const UNITS = ["bytes", "KiB", "MiB", "GiB", "TiB"];

export function bytes(count) {
  let power = 0;
  while (count >= 1024 && power < UNITS.length - 1) { count /= 1024; power += 1; }
  return `${count.toFixed(power && count < 100 ? 1 : 0)} ${UNITS[power]}`;
}

export const number = (value) => value.toLocaleString("en", { maximumFractionDigits: value < 10 ? 1 : 0 });

export function duration(ms) {
  return ms < 1000 ? `${ms.toFixed(ms < 10 ? 1 : 0)} ms` : `${(ms / 1000).toFixed(ms < 10_000 ? 2 : 1)} s`;
}

export const plural = (count, word) => `${number(count)} ${word}${count === 1 ? "" : "s"}`;
