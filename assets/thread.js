// The conversation that is shown. Finished messages come with the thread's own value; the running answer's text comes
// with the live view and grows in place.

import { el, iconButton, setText } from "./dom.js";
import { fillComposer } from "./drafts.js";
import { followIfRunning } from "./follow.js";
import { renderMarkdown } from "./markdown.js";
import { addActions, showLeftOut, updateActions } from "./message_actions.js";
import { root, shared } from "./shared.js";

const EXAMPLES = [
  ["Tell a story", "Write a long story about a dragon and a knight."],
  ["Explain something", "Explain how rainbows form, step by step."],
  ["Write some code", "Write a Python function that counts the words in a text."],
  ["Make a plan", "Plan a calm Saturday in a small town by the sea."],
];
const NEAR_END_PX = 80;

/** Mount the thread; returns the function that takes each new value. */
export function mountThread({ element }) {
  const scroller = element.closest("#thread");
  const list = el("ol", { class: "messages", "aria-label": "Conversation", hidden: true });
  const spoken = el("p", { class: "only-spoken", "aria-live": "polite" });
  const toEnd = iconButton("down", "Jump to the latest", () => scrollToEnd(scroller, true), { class: "icon-button to-end", hidden: true });
  element.replaceChildren(list, toEnd, spoken);
  root.style.setProperty("--scrollbar", `${scroller.offsetWidth - scroller.clientWidth}px`);
  const view = { scroller, list, toEnd, spoken, rows: new Map(), follows: true, top: 0 };
  scroller.addEventListener("scroll", () => noteScroll(view), { passive: true });
  // After the page's own layout: asking for heights while text is being put in would lay it out twice.
  const sizes = new ResizeObserver(() => keepEnd(view));
  sizes.observe(list);
  sizes.observe(scroller);
  shared.on("live", (live) => showLive(view, live));
  shared.on("begun", (value) => {
    view.follows = true;
    followIfRunning(value);
  });
  return (value) => value && showThread(view, value);
}

function showThread(view, value) {
  const switched = shared.conversation !== value.id;
  if (switched) leaveFor(value, view);
  view.list.hidden = value.messages.length === 0;
  const rows = new Map();
  for (const message of value.messages) {
    const row = view.rows.get(message.id) || buildRow(message);
    updateRow(row, message);
    updateActions(row, message);
    rows.set(message.id, row);
  }
  const last = value.messages.at(-1);
  if (last?.status === "running" && !view.rows.has(last.id)) view.follows = true; // what one has just asked for
  view.rows = rows;
  showRows(view.list, [...rows.values()].map((row) => row.node));
  showEmptyPage(view, value.messages.length === 0);
  shared.thread = value;
  shared.tell("thread", value);
  showLive(view, shared.live);
  if (switched) view.follows = value.messages.length > 0;
  if (!lookAt(view)) keepEnd(view);
}

/** Put the rows into the list; where they are there already, they are left alone, and with them what is selected. */
function showRows(list, nodes) {
  const isSame = nodes.length === list.children.length && nodes.every((node, index) => list.children[index] === node);
  if (!isSame) list.replaceChildren(...nodes);
}

/** Bring the message that a search found into view, once. */
function lookAt(view) {
  const row = shared.lookFor && view.rows.get(shared.lookFor);
  if (!row) return false;
  shared.lookFor = null;
  view.follows = false;
  row.node.scrollIntoView({ block: "start" });
  row.node.classList.add("found");
  return true;
}

/** Show another conversation in the address, so that a reload and the back button find it. */
function leaveFor(value, view) {
  const first = shared.conversation === null;
  shared.conversation = value.id;
  view.rows = new Map();
  const address = value.id ? `?c=${encodeURIComponent(value.id)}` : location.pathname;
  if (first) history.replaceState(null, "", address);
  else if (new URLSearchParams(location.search).get("c") !== (value.id || null)) history.pushState(null, "", address);
  shared.tell("conversation", value);
}

function buildRow(message) {
  const body = el("div", { class: "body" });
  const node = el("li", { class: `message ${message.role}`, "data-id": message.id },
    el("p", { class: "only-spoken" }, message.role === "user" ? "You:" : "Answer:"), body);
  const row = { node, body, text: null };
  if (message.role === "assistant") {
    row.error = el("p", { class: "answer-error", role: "alert", hidden: true });
    row.figures = el("span", { class: "figures" });
    row.medusa = el("span", { class: "tag" });
    row.foot = el("div", { class: "foot" }, row.figures, row.medusa);
    node.append(row.error, row.foot);
  }
  addActions(row, message);
  return row;
}

function updateRow(row, message) {
  if (row.node.dataset.status !== message.status) row.node.dataset.status = message.status;
  if (message.role === "user") {
    if (row.text !== message.content) row.body.textContent = row.text = message.content;
    return;
  }
  if (row.text === null || message.content.length >= row.text.length || message.status !== "running") showText(row, message.content);
  setText(row.figures, message.figures);
  setText(row.medusa, message.medusa ? "Medusa" : "plain");
  setText(row.error, message.error);
  row.error.hidden = !message.error;
}

function showText(row, text) {
  if (row.text === text) return;
  row.text = text;
  renderMarkdown(row.body, text);
}

/** Let the running answer grow. A stale value (of a conversation that was left) changes nothing. */
function showLive(view, live) {
  const row = live && live.conversation === shared.conversation ? view.rows.get(live.message) : null;
  const running = Boolean(row) && (live.status === "running" || live.status === "waiting");
  setRunning(view, running);
  if (!row) return;
  updateRow(row, { role: "assistant", status: live.status, content: live.text, figures: live.figures, medusa: live.medusa, error: live.error });
  showLeftOut(row, live.left_out);
}

function setRunning(view, running) {
  const state = running ? "yes" : "no";
  const before = root.dataset.running;
  if (before === state) return;
  root.dataset.running = state;
  // A screen reader hears the beginning and the end, not every word as it comes.
  if (before || running) setText(view.spoken, running ? "The answer is being written." : "The answer has ended.");
}

function keepEnd(view) {
  if (view.follows) scrollToEnd(view.scroller, false);
}

function scrollToEnd(scroller, smooth) {
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  scroller.scrollTo({ top: scroller.scrollHeight, behavior: smooth && !calm ? "smooth" : "instant" });
}

/** Someone who scrolled up reads; only at the end does the page go along with the text. */
function noteScroll(view) {
  const { scroller } = view;
  const top = scroller.scrollTop;
  const isAtEnd = scroller.scrollHeight - top - scroller.clientHeight < NEAR_END_PX;
  // Text that grows also moves the end away; only going up means reading.
  if (isAtEnd) view.follows = true;
  else if (top < view.top - 1) view.follows = false;
  view.top = top;
  if (view.toEnd.hidden !== view.follows) view.toEnd.hidden = view.follows;
}

function showEmptyPage(view, empty) {
  view.empty?.remove();
  view.empty = null;
  if (!empty) return;
  view.empty = el("section", { class: "empty", "aria-label": "How it works" },
    el("img", { src: "/medusa/icons/medusa.svg", alt: "", width: "56", height: "56" }),
    el("h1", {}, "What shall we talk about?"),
    el("p", {},
      "Everything runs on this machine; nothing you write leaves it. While the model writes, small heads guess the next words, and the model checks a whole tree of guesses in one pass: what it would have written anyway is kept, so the text is the same and comes sooner. Flip the Medusa switch to feel the difference."),
    el("ul", { class: "examples" }, ...EXAMPLES.map(([name, prompt]) =>
      el("li", {}, el("button", { type: "button", onclick: () => useExample(prompt) }, el("strong", {}, name), el("span", {}, prompt))))));
  view.list.before(view.empty);
}

/** Put an example into the text box, ready to be sent or changed. */
function useExample(prompt) {
  fillComposer(prompt);
  document.querySelector("#composer-text textarea").focus();
}
