// What can be done with a message: edit it, ask again, go on, walk through its other versions, see what it was made with.

import { act } from "./api.js";
import { openDialog } from "./dialog.js";
import { copyText, el, iconButton, setText } from "./dom.js";
import { currentSettings } from "./settings.js";
import { shared } from "./shared.js";

/** Add the line of actions to a row of the thread. */
export function addActions(row, message) {
  row.branches = el("span", { class: "branches", role: "group", "aria-label": "Versions", hidden: true });
  const copy = named("copy", "copy", message.role === "user" ? "Copy message" : "Copy answer", () => copyText(row.text || "", copy));
  row.actions = el("span", { class: "actions" }, copy);
  if (message.role === "user") {
    row.actions.append(named("edit", "edit", "Edit", () => startEdit(row)));
    row.foot = el("div", { class: "foot" }, row.branches, row.actions);
    row.node.append(row.foot);
    return;
  }
  row.leftOut = el("p", { class: "left-out", role: "note", hidden: true });
  row.node.prepend(row.leftOut);
  row.onward = named("continue", "onward", "Continue the answer", () => begin("continue", { message: row.message.id }));
  row.actions.append(
    named("regenerate", "again", "Answer again", () => begin("regenerate", { message: row.message.id })),
    row.onward,
    named("details", "info", "How this answer was made", () => showDetails(row.message)));
  row.foot.prepend(row.branches);
  row.foot.append(row.actions);
}

const named = (name, picture, label, run) => iconButton(picture, label, run, { "data-act": name });

/** Show what the store knows of the message; the running answer's own updates do not come here. */
export function updateActions(row, message) {
  row.message = message;
  const at = message.siblings.indexOf(message.id);
  row.branches.hidden = message.siblings.length < 2;
  if (!row.branches.hidden) row.branches.replaceChildren(...stepper(message.siblings, at));
  if (row.onward) row.onward.hidden = message.status === "running" || !message.content;
  if (row.leftOut) showLeftOut(row, message.left_out);
}

/** Say that the oldest messages were not in the prompt of this answer. */
export function showLeftOut(row, count) {
  row.leftOut.hidden = !count;
  if (count) setText(row.leftOut, `The context is full: the ${count === 1 ? "oldest message was" : `oldest ${count} messages were`} left out of the prompt for this answer.`);
}

function stepper(siblings, at) {
  const step = (by, picture, label) => iconButton(picture, label, () => act("show", { message: siblings[at + by] }), {
    class: "icon-button branch-step", "data-step": by, disabled: siblings[at + by] === undefined,
  });
  return [step(-1, "left", "Version before"),
    el("span", { class: "branch-count", "aria-label": `Version ${at + 1} of ${siblings.length}` }, `${at + 1}/${siblings.length}`),
    step(1, "right", "Next version")];
}

/** The settings of the next answer: the conversation's own and the switch. */
const settings = () => ({ ...currentSettings(), medusa: document.querySelector("#medusa-switch input")?.checked ?? true });

async function begin(name, values) {
  const answer = await act(name, { ...values, settings: settings() });
  if (answer) shared.tell("begun", answer.thread);
  return answer;
}

function startEdit(row) {
  if (row.node.querySelector(".edit-box")) return;
  const box = el("textarea", { rows: "3", "aria-label": "Edit the message" });
  box.value = row.message.content;
  const end = () => {
    form.remove();
    row.body.hidden = row.foot.hidden = false;
    row.node.classList.remove("editing");
  };
  const send = async (event) => {
    event.preventDefault();
    if (await begin("edit", { message: row.message.id, text: box.value })) end();
  };
  const form = el("form", { class: "edit-box", onsubmit: send, onkeydown: (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      end();
    } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
  } },
  box, el("p", { class: "help" }, "The old version stays: ‹ › lead back to it."),
  el("div", { class: "dialog-actions" },
    el("button", { type: "button", class: "plain-button", onclick: end }, "Cancel"),
    el("button", { type: "submit", class: "main-button" }, "Send")));
  row.body.hidden = row.foot.hidden = true;
  row.node.classList.add("editing");
  row.body.after(form);
  box.style.height = `${Math.min(box.scrollHeight + 4, 400)}px`;
  box.focus();
}

const NAMES = {
  preset: "Preset", medusa: "Medusa", acceptance: "Acceptance", temperature: "Temperature", seed: "Seed", top_k: "Top-k",
  top_p: "Top-p", min_p: "Min-p", repetition_penalty: "Repetition penalty", presence_penalty: "Presence penalty",
  frequency_penalty: "Frequency penalty", max_tokens: "Longest answer", tree_nodes: "Tree nodes", epsilon: "Epsilon",
  delta: "Delta", stop: "Stop strings", logit_bias: "Logit bias", system: "System prompt", left_out: "Messages left out",
};
const ONLY_TYPICAL = ["epsilon", "delta"];

/** Everything an answer was made with; with it, it can be written again. */
function showDetails(message) {
  const made = message.settings;
  const shown = Object.keys(NAMES).filter((name) => made[name] !== undefined && !isEmpty(made[name]))
    .filter((name) => made.acceptance === "typical" || !ONLY_TYPICAL.includes(name));
  const copy = iconButton("copy", "Copy the id", () => copyText(message.id, copy));
  openDialog("How this answer was made", el("div", { class: "sheet" },
    el("p", {}, message.figures),
    el("dl", { class: "made-with" }, ...shown.map((name) => el("div", {}, el("dt", {}, NAMES[name]), el("dd", {}, asText(made[name]))))),
    el("p", { class: "message-id" }, el("span", {}, "To write it again: ", el("code", {}, `ask --from-message ${message.id}`)), copy)));
}

const isEmpty = (value) => value === null || value === "" || (Array.isArray(value) && value.length === 0);

function asText(value) {
  if (value === true) return "on";
  if (value === false) return "off";
  return Array.isArray(value) ? JSON.stringify(value) : String(value);
}
