// The line at the top (what runs where, whether Medusa helps, and if not why) and the notice above the text box.

import { el, icon, iconButton } from "./dom.js";
import { currentTheme, isOpen, setOpen, setTheme, shared } from "./shared.js";

const WEIGHT_NAMES = { int4: "4-bit", nf4: "4-bit NF4", int8: "8-bit", bf16: "16-bit", none: "16-bit" };

/** Mount the status line; returns the function that takes each new value. */
export function mountStatus({ element }) {
  const facts = el("div", { class: "facts", role: "status" });
  const theme = iconButton("moon", "Dark theme", () => setTheme(currentTheme() === "dark" ? "light" : "dark"));
  const panel = iconButton("tree", "Medusa at work", () => setOpen("panel", !isOpen("panel")));
  element.replaceChildren(
    iconButton("menu", "Conversations", () => setOpen("sidebar", !isOpen("sidebar"))),
    facts, panel, theme);
  const showTheme = (dark) => {
    theme.replaceChildren(icon(dark ? "sun" : "moon"));
    theme.setAttribute("aria-label", dark ? "Light theme" : "Dark theme");
    theme.title = theme.getAttribute("aria-label");
  };
  const gain = el("span", { class: "gain-place" });
  const medusa = buildMedusa();
  shared.on("engine", (engine) => gain.replaceChildren(...gainOf(engine)));
  const showPanel = (open) => panel.setAttribute("aria-expanded", String(open));
  shared.on("theme", showTheme);
  shared.on("panel", showPanel);
  showTheme(currentTheme() === "dark");
  showPanel(isOpen("panel"));
  return (value) => {
    shared.contextSize = value?.max_context || 0;
    shared.tell("size");
    shared.tell("status", value);
    medusa.heads = value?.heads;
    medusa.show();
    facts.replaceChildren(...(value ? factsOf(value, medusa.node, gain) : []));
    if (value) document.documentElement.dataset.medusa = value.medusa ? "ready" : value.phase === "ready" ? "missing" : "unknown";
  };
}

/** "Medusa on" or "off", as the switch stands: it may be moved by a conversation that is opened, without an event. */
function buildMedusa() {
  const medusa = { node: el("span", { class: "medusa-state" }), heads: 0 };
  const box = () => document.querySelector("#medusa-switch input");
  medusa.show = () => {
    const on = box()?.checked ?? true;
    if (medusa.shown === `${on} ${medusa.heads}`) return;
    medusa.shown = `${on} ${medusa.heads}`;
    medusa.node.replaceChildren(on ? badge("good", "Medusa on", `${medusa.heads} heads draft`)
      : badge("plain", "Medusa off", "Answers are decoded one token a step; the switch is beside the text box."));
  };
  document.addEventListener("change", (event) => event.target === box() && medusa.show());
  for (const topic of ["thread", "conversation", "engine"]) shared.on(topic, () => setTimeout(medusa.show, SWITCH_MS));
  return medusa;
}

const SWITCH_MS = 150; // Gradio moves the switch after it has shown the conversation

function factsOf(value, medusa, gain) {
  if (value.phase === "loading") {
    return [el("span", { class: "spinner", "aria-hidden": "true" }), el("span", { class: "fact" }, `${value.message || "Starting"}…`)];
  }
  if (value.phase === "failed") return [badge("bad", `The model did not load. ${value.message}`)];
  // The weights last: on a CPU they can be a long name, and where there is no room the end is cut.
  const place = [value.device.toUpperCase(), megabytes(value.memory_bytes), WEIGHT_NAMES[value.weights] || value.weights]
    .filter(Boolean).join(" · ");
  return [
    el("span", { class: "headline" }, el("span", { class: "fact model", title: value.model }, value.model), value.medusa ? medusa : null, gain),
    el("span", { class: "fact detail", title: place }, place),
    value.medusa ? null : badge("warn", `Medusa unavailable: ${value.reason || "no heads were found for this model"}`),
    ...value.notes.map((note) => badge("note", note)),
  ].filter(Boolean);
}

/** What Medusa gains on this machine, by its own answers; before there are enough, what its step times promise. */
function gainOf(engine) {
  const { gain, medusa, plain, answers } = engine.measured || {};
  if (!engine.medusa) return [];
  if (gain) {
    const basis = `${medusa} tokens/s with Medusa (${answers[0]} answers), ${plain} without (${answers[1]}): medians of this machine`;
    if (gain < 0.98) return [badge("warn", `×${gain.toFixed(2)}: slower`, basis, ", measured here")];
    return [badge("good", gain < 1.02 ? "no faster" : `×${gain.toFixed(1)} faster`, basis, ", measured here")];
  }
  const promised = engine.tuning?.expected_gain;
  if (engine.tuning?.chosen === 0) return [badge("warn", "Medusa does not pay here: answers are decoded plainly", engine.tuning.reason)];
  return promised > 1 ? [badge("plain", `×${promised.toFixed(1)} expected`, "From step times measured here. Answer with and without Medusa, or race them, to measure it here.")] : [];
}

/** `more` is left out where there is little room; the title still says it. */
function badge(kind, text, basis = text, more = "") {
  return el("span", { class: `badge ${kind}`, title: basis }, ["good", "plain"].includes(kind) ? null : icon("warning"),
    el("span", {}, text, more ? el("span", { class: "not-narrow" }, more) : null));
}

function megabytes(bytes) {
  if (!bytes) return "";
  return bytes > 1e9 ? `${(bytes / 1e9).toFixed(1)} GB` : `${Math.round(bytes / 1e6)} MB`;
}

/** Mount the notice: why something that was asked for did not happen. */
export function mountNotice({ element }) {
  return (value) => {
    element.replaceChildren();
    if (!value) return;
    const line = el("p", { class: value.calm ? "notice calm" : "notice", role: value.calm ? "status" : "alert" },
      icon(value.calm ? "info" : "warning"), el("span", {}, value.text));
    if (value.action) line.append(noticeAction(value.action, line));
    line.append(iconButton("close", "Dismiss", () => line.remove()));
    element.append(line);
  };
}

const noticeAction = (action, line) => el("button", { type: "button", class: "notice-action", onclick: () => {
  line.remove();
  action.run();
} }, action.label);
