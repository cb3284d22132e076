// The settings of a conversation: preset, system prompt and every control. What is chosen holds for its next answers and
// is saved with it; a conversation that has no message yet keeps them here until it has.

import { act } from "./api.js";
import { openDialog } from "./dialog.js";
import { el } from "./dom.js";
import { shared } from "./shared.js";

let options = null;
let current = {};
let saving = Promise.resolve();

/** All settings of the shown conversation, as they go along with a message. */
export const currentSettings = () => ({ ...(options?.defaults || {}), ...current });

export const settingsName = () => presetOf(currentSettings());

/** Called once: learn the controls, and follow the conversation. */
export async function startSettings() {
  shared.on("conversation", (value) => change(value.settings || {}));
  options = await act("options");
  shared.tell("settings");
}

function change(settings) {
  current = { ...settings };
  shared.tell("settings");
}

function presetOf(settings) {
  const match = Object.entries(options?.presets || {}).find(([, values]) =>
    Object.entries(values).every(([name, value]) => settings[name] === value));
  return match ? match[0] : options?.custom || "Settings";
}

/** Take changes at once, for a message may follow at once; then check and save them. False where a value is refused. */
function keep(changes) {
  const before = current;
  current = { ...current, ...changes };
  const medusa = document.querySelector("#medusa-switch input")?.checked ?? true;
  const values = { id: shared.conversation || "", settings: { ...currentSettings(), medusa } };
  saving = saving.then(() => save(values, changes, before));
  return saving;
}

async function save(values, changes, before) {
  const answer = await act("settings", values);
  if (answer) document.querySelector("dialog[open] .dialog-said")?.remove();
  else if (values.id === (shared.conversation || "")) {
    for (const name of Object.keys(changes)) if (current[name] === changes[name]) current = { ...current, [name]: before[name] ?? options.defaults[name] };
  }
  shared.tell("settings");
  return Boolean(answer);
}

/** Show the dialog with everything. */
export function openSettings() {
  if (!options) return;
  const body = el("div", { class: "settings" });
  const draw = () => body.replaceChildren(...sections(draw));
  draw();
  openDialog("Settings of this conversation", body, { side: true });
}

function sections(draw) {
  const settings = currentSettings();
  return [
    presets(settings, draw),
    systemPrompt(settings),
    el("fieldset", {}, el("legend", {}, "How the next word is chosen"), ...options.controls.map((control) => slider(control, settings, draw))),
    el("fieldset", {}, el("legend", {}, "Repeatable and cut"), seed(settings), stops(settings), biases(settings)),
    acceptance(settings, draw),
  ];
}

function presets(settings, draw) {
  const chosen = presetOf(settings);
  const buttons = Object.entries(options.presets).map(([name, values]) => el("button", {
    type: "button", class: "preset", "aria-pressed": String(name === chosen),
    onclick: async () => (await keep(values)) && draw(),
  }, name));
  return el("div", { class: "presets", role: "group", "aria-label": "Preset" }, ...buttons,
    el("span", { class: "preset-note" }, chosen === options.custom ? "Custom" : ""));
}

function systemPrompt(settings) {
  const box = el("textarea", { id: "setting-system", rows: "3", placeholder: "For example: Answer in two sentences.",
    onchange: (event) => keep({ system: event.target.value }) });
  box.value = settings.system || "";
  return el("div", { class: "field" }, el("label", { for: "setting-system" }, "System prompt"), box);
}

function slider(control, settings, draw) {
  const id = `setting-${control.name}`;
  const value = settings[control.name];
  const save = async (event) => {
    await keep({ [control.name]: Number(event.target.value) });
    draw();
    document.getElementById(event.target.id)?.focus();
  };
  const range = { min: control.low, max: control.high, step: control.step };
  const track = el("input", { type: "range", id: `${id}-track`, "aria-label": control.label, ...range, onchange: save,
    oninput: (event) => { number.value = event.target.value; } });
  const number = el("input", { type: "number", id, min: range.min, step: "any", "aria-describedby": `${id}-help`, onchange: save });
  track.value = number.value = value;
  return el("div", { class: "control" },
    el("label", { for: id }, control.label), number, track, el("p", { class: "help", id: `${id}-help` }, control.help));
}

function seed(settings) {
  const box = el("input", { type: "text", id: "setting-seed", inputmode: "numeric", placeholder: "drawn for each answer",
    onchange: (event) => keep({ seed: event.target.value.trim() === "" ? null : wholeOrText(event.target.value) }) });
  box.value = settings.seed ?? "";
  return field("setting-seed", "Seed", box, "The same seed and settings give the same answer.");
}

const wholeOrText = (text) => (/^\d{1,15}$/.test(text.trim()) ? Number(text) : text);

function stops(settings) {
  const box = el("textarea", { id: "setting-stop", rows: "2", onchange: (event) =>
    keep({ stop: event.target.value.split("\n").filter(Boolean).map((line) => line.replaceAll("\\n", "\n")) }) });
  box.value = (settings.stop || []).map((stop) => stop.replaceAll("\n", "\\n")).join("\n");
  return field("setting-stop", "Stop strings", box, "One a line, \\n is a new line; the answer ends before the first of them.");
}

function biases(settings) {
  const box = el("input", { type: "text", id: "setting-logit_bias", placeholder: "e.g. 1234: -5, 77: 2",
    onchange: (event) => keep({ logit_bias: pairs(event.target.value) }) });
  box.value = (settings.logit_bias || []).map(([token, bias]) => `${token}: ${bias}`).join(", ");
  return field("setting-logit_bias", "Logit bias", box, "Token id: number from -100 to 100, with commas between.");
}

const pairs = (text) => text.split(",").filter((part) => part.trim()).map((part) => part.split(":").map(Number));

function acceptance(settings, draw) {
  const choose = (value) => async () => (await keep({ acceptance: value })) && draw();
  const radio = (value, label, help) => el("label", { class: "radio" },
    el("input", { type: "radio", name: "acceptance", value, checked: settings.acceptance === value, onchange: choose(value) }),
    el("span", {}, el("strong", {}, label), el("span", { class: "help" }, help)));
  const thresholds = settings.acceptance === "typical" ? options.thresholds.map((control) => slider(control, settings, draw)) : [];
  return el("fieldset", {}, el("legend", {}, "Medusa's acceptance"),
    radio("exact", "Exact", "The text is the same as without Medusa."),
    radio("typical", "Typical", "Accepts more at temperatures above 0; the text differs from plain decoding."),
    ...thresholds, treeNodes(settings));
}

function treeNodes(settings) {
  const box = el("input", { type: "text", id: "setting-tree_nodes", inputmode: "numeric", placeholder: "measured on this machine",
    onchange: (event) => keep({ tree_nodes: event.target.value.trim() === "" ? null : wholeOrText(event.target.value) }) });
  box.value = settings.tree_nodes ?? "";
  return field("setting-tree_nodes", "Tree nodes", box, "Guesses checked in one pass, 1 to 64; empty lets the app choose.");
}

const field = (id, label, box, help) => el("div", { class: "field" }, el("label", { for: id }, label), box, el("p", { class: "help" }, help));
