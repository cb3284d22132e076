// The Tokens view of an answer: its tokens as they came, step by step. Accepted drafts are tinted (two tints in turn) and
// carry one tick for each head they came from; the backbone's own token at the end of a step is plain.

import { el } from "./dom.js";
import { shared } from "./shared.js";
import { pointAt, sentence, traceOf } from "./trace.js";

const GROW_MS = 250; // while the answer runs
const views = new WeakMap(); // by the message's node

/** Give each answer of the thread its two views; rows are told by their nodes, so that other scripts own them. */
export function startTokens() {
  shared.on("thread", dress);
  shared.on("live", dress);
  shared.on("step", markCurrent);
}

function dress() {
  for (const row of document.querySelectorAll("#thread .message.assistant")) {
    if (!views.has(row) && row.querySelector(".foot")) views.set(row, build(row));
    const view = views.get(row);
    if (view?.shown) draw(view);
  }
}

function build(row) {
  const view = { row, message: row.dataset.id, shown: false, drawn: 0, last: 0, marked: null };
  view.tokens = el("div", { class: "tokens", hidden: true, tabindex: "0", role: "group",
    "aria-label": "Tokens by step. Left and right arrows go through the steps." });
  view.tip = el("p", { class: "step-tip", role: "status", hidden: true });
  view.answer = el("button", { type: "button", "aria-pressed": "true", onclick: () => show(view, false) }, "Answer");
  view.button = el("button", { type: "button", "aria-pressed": "false", onclick: () => show(view, true) }, "Tokens");
  row.querySelector(".body").after(view.tokens, view.tip);
  const views = el("span", { class: "views", role: "group", "aria-label": "View" }, view.answer, view.button);
  row.querySelector(".foot").append(el("span", { class: "foot-end" }, views));
  listen(view);
  return view;
}

function listen(view) {
  const { tokens } = view;
  tokens.addEventListener("pointerover", (event) => look(view, event.target.closest(".step")));
  tokens.addEventListener("pointerleave", () => !tokens.matches(":focus") && look(view, null));
  tokens.addEventListener("click", (event) => {
    const step = event.target.closest(".step");
    if (step) pointAt({ message: view.message, index: indexOf(step), pinned: true });
  });
  tokens.addEventListener("blur", () => look(view, null));
  tokens.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    event.preventDefault();
    const steps = tokens.querySelectorAll(".step");
    const at = view.marked ? indexOf(view.marked) + by : by > 0 ? 0 : steps.length - 1;
    const step = steps[Math.min(steps.length - 1, Math.max(0, at))];
    look(view, step);
    pointAt({ message: view.message, index: indexOf(step), pinned: true });
  });
}

const indexOf = (step) => Number(step.dataset.step) - 1;

function show(view, tokens) {
  view.shown = tokens;
  view.row.classList.toggle("shows-tokens", tokens);
  view.tokens.hidden = !tokens;
  view.answer.setAttribute("aria-pressed", String(!tokens));
  view.button.setAttribute("aria-pressed", String(tokens));
  look(view, null);
  if (tokens) draw(view, true);
}

/** Add the steps that are not there yet; those that are stay untouched. */
async function draw(view, now = false) {
  const running = ["running", "waiting"].includes(view.row.dataset.status);
  if (view.whole || (!now && running && performance.now() - view.last < GROW_MS)) return;
  view.last = performance.now();
  const trace = await traceOf(view.message);
  if (!trace || (!trace.steps.length && !trace.running)) {
    view.tokens.replaceChildren(el("p", { class: "no-steps" }, "No steps were kept for this answer."));
    return;
  }
  if (!view.began && trace.prefill.length) {
    view.began = true;
    view.tokens.append(...trace.prefill.map((text) => token(text, 0)));
  }
  view.tokens.append(...trace.steps.slice(view.drawn).map(stepNode));
  view.drawn = trace.steps.length;
  view.whole = !trace.running;
}

function stepNode(step) {
  return el("span", { class: `step ${step.number % 2 ? "odd" : "even"}`, "data-step": String(step.number), "data-says": sentence(step) },
    ...step.texts.map((text, index) => token(text, index < step.accepted ? index + 1 : 0)));
}

/** One token; `head` counts from 1, 0 is the backbone's own. Line breaks keep a sign, to have something to tint. */
function token(text, head) {
  const shown = text.replace(/\n/g, "↵\n");
  return el("span", { class: head ? "token drafted" : "token own", "data-head": head ? String(head) : null }, shown);
}

function look(view, step) {
  if (view.marked === step) return;
  view.marked = step;
  view.tokens.querySelector(".step.is-looked-at")?.classList.remove("is-looked-at");
  view.tip.hidden = !step;
  if (step) {
    step.classList.add("is-looked-at");
    view.tip.textContent = step.dataset.says;
    place(view, step);
    pointAt({ message: view.message, index: indexOf(step) });
  } else pointAt(null);
}

/** Steps are gone through elsewhere: what was looked at here is over. */
function hideTip(tip) {
  const view = views.get(tip.closest(".message"));
  view.marked?.classList.remove("is-looked-at");
  view.marked = null;
  tip.hidden = true;
}

/** The sentence stands above its step, inside the answer's width. */
function place(view, step) {
  const around = view.row.getBoundingClientRect();
  const box = step.getClientRects()[0] || step.getBoundingClientRect();
  const left = Math.min(box.left - around.left, around.width - view.tip.offsetWidth);
  view.tip.style.transform = `translate(${Math.max(0, left)}px, ${box.top - around.top - view.tip.offsetHeight - 6}px)`;
}

/** The step that the panel shows while it replays or is stepped through. */
function markCurrent(at) {
  document.querySelector(".tokens .step.is-current")?.classList.remove("is-current");
  if (at?.from === "panel") document.querySelectorAll(".step-tip:not([hidden])").forEach(hideTip);
  if (!at?.message) return;
  document.querySelector(`.message[data-id="${CSS.escape(at.message)}"] .tokens .step[data-step="${at.index + 1}"]`)?.classList.add("is-current");
}
