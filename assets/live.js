// The panel "Medusa at work": one step's tree, what it added to the text, and the figures. It follows the running
// answer, or shows a step that someone points at, steps to or replays.

import { el, setText } from "./dom.js";
import { buildGauges, figuresOf } from "./gauges.js";
import { isOpen, shared } from "./shared.js";
import { depthOf, pointAt, sentence, traceOf, visible } from "./trace.js";
import { buildTransport } from "./transport.js";
import { drawTree } from "./tree.js";

const DRAW_MS = 90; // the server sends 10 values a second while the answer runs; what comes faster is not drawn

/** Mount the panel; returns the function that takes each new value. */
export function mountLive({ element }) {
  const view = buildPanel();
  element.replaceChildren(view.panel);
  shared.on("conversation", () => shared.live?.conversation !== shared.conversation && take(view, null));
  shared.on("step", (at) => at?.from !== "panel" && pointedAt(view, at));
  shared.on("panel", (open) => open && take(view, view.value));
  shared.on("engine", (engine) => view.gauges.showTuning(engine.tuning));
  return (value) => {
    shared.live = value;
    shared.tell("live", value);
    take(view, value && value.conversation === shared.conversation ? value : null);
  };
}

function buildPanel() {
  const view = {
    caption: el("p", { class: "step-caption" }),
    tree: el("div", { class: "tree-scroll", tabindex: "0", role: "img", "aria-label": "Candidate tree" }),
    added: el("p", { class: "added", role: "group", "aria-label": "Added to the text" }),
    idle: el("div", { class: "idle" }),
    gauges: buildGauges(),
    value: null, // the latest live value of this conversation
    held: null, // {trace, index}: the step that is looked at instead of the latest
    peek: null, // the same, for as long as a pointer rests on it
    replaying: false,
    drawnAt: 0, timer: 0,
  };
  view.transport = buildTransport({
    go: (index, replaying) => goTo(view, index, replaying),
    pause: () => goTo(view, Infinity, false),
    follow: () => release(view),
  });
  const legend = el("p", { class: "legend" },
    el("span", { class: "key accepted" }, "accepted"), el("span", { class: "key rejected" }, "verified, not kept"),
    el("span", { class: "key bonus" }, "the model's own"));
  view.work = el("div", { class: "work", hidden: true },
    view.caption, view.tree, view.added, view.transport.node, legend, view.gauges.node);
  view.tree.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by && !event.shiftKey) {
      event.preventDefault();
      view.transport.step(by);
    }
  });
  view.tree.addEventListener("pointerenter", () => draw(view));
  view.tree.addEventListener("pointerleave", () => draw(view));
  fillIdle(view.idle);
  view.panel = el("section", { class: "live-panel", "aria-label": "Medusa at work" }, el("h2", {}, "Medusa at work"), view.idle, view.work);
  return view;
}

// A made-up step, to show what is to be seen here before there is one.
const SAMPLE = {
  number: 0,
  labels: ["The", " dragon", " knight", " old", " slept", " smiled", " rode", " on", " and"],
  parents: [-1, 0, 0, 0, 1, 1, 2, 4, 4],
  probabilities: [1, 0.6, 0.3, 0.1, 0.5, 0.2, 0.3, 0.4, 0.2],
  path: [0, 1, 4],
  texts: [" dragon", " slept", " under"],
  accepted: 2,
};

function fillIdle(idle) {
  const sample = el("div", { class: "sample", "aria-hidden": "true" });
  idle.append(
    el("p", {}, "Each step of an answer is drawn here as it happens. From the last word on the left, the heads draft what may follow; the solid path is what the model agreed to, and it is added at once, with one word of the model's own."),
    sample,
    el("p", { class: "small" }, "An example. Send a message to see a real one."));
  requestAnimationFrame(() => drawTree(sample, SAMPLE));
}

const isRunning = (view) => ["running", "waiting"].includes(view.value?.status);

/** A new value of the running or last answer. Another answer ends what was held of the one before. */
function take(view, value) {
  if (view.value?.message !== value?.message) {
    view.held = view.peek = null;
    view.transport.halt();
  }
  view.value = value;
  if (view.held || view.peek) return showTransport(view);
  const wait = isRunning(view) ? DRAW_MS - (performance.now() - view.drawnAt) : 0;
  clearTimeout(view.timer);
  if (!isOpen("panel")) return; // it is drawn when it is opened
  if (wait > 0) view.timer = setTimeout(() => draw(view), wait);
  else draw(view);
}

function draw(view) {
  view.drawnAt = performance.now();
  const at = view.peek || view.held;
  const step = at ? at.trace.steps[at.index] : view.value?.steps?.at(-1);
  view.work.hidden = !step;
  view.idle.hidden = Boolean(step);
  if (!step) return;
  const isNamed = named(view);
  drawTree(view.tree, step, isNamed);
  const words = sentence(step);
  setText(view.caption, `${words[0].toUpperCase()}${words.slice(1)}${checked(step)}`);
  view.tree.setAttribute("aria-label", `Candidate tree. ${view.caption.textContent}`);
  showAdded(view.added, step);
  view.gauges.show(at ? figuresOf(at.trace, at.index) : view.value);
  showTransport(view);
}

function checked(step) {
  const nodes = step.parents.length - 1;
  return nodes > depthOf(step.parents) ? `, ${nodes} verified at once` : "";
}

/** Whether labels are shown: they are for reading; while steps fly by they rest, unless a pointer asks for them. */
function named(view) {
  const flies = !view.peek && (view.held ? view.replaying && !view.transport.slow() : isRunning(view));
  const isQuiet = flies && !view.tree.matches(":hover");
  view.tree.classList.toggle("is-quiet", isQuiet);
  return !isQuiet;
}

function showTransport(view) {
  const { held, value } = view;
  const at = view.peek || held;
  const count = at ? at.trace.steps.length : value?.steps?.at(-1)?.number || 0;
  view.transport.show({
    count,
    index: at ? at.index : count - 1,
    running: isRunning(view) && !held,
    canFollow: isRunning(view) && Boolean(held),
    load: async () => (view.held?.trace || (await traceOf(view.value.message)))?.steps,
  });
}

/** Hold a step of the held answer, or else of the latest one. */
async function goTo(view, index, replaying) {
  const trace = view.held?.trace || (view.value && (await traceOf(view.value.message)));
  if (!trace?.steps.length) return;
  view.replaying = replaying;
  view.peek = null;
  view.held = { trace, index: Math.min(index, trace.steps.length - 1) };
  draw(view);
  pointAt({ message: trace.message, index: view.held.index, from: "panel" });
}

function release(view) {
  view.held = view.peek = null;
  view.transport.halt();
  draw(view);
}

/** Someone points at a step in a text (or at none any more). */
async function pointedAt(view, at) {
  view.pointer = at;
  const trace = at && (await traceOf(at.message));
  if (view.pointer !== at) return; // by now the pointer is elsewhere
  const there = trace?.steps[at.index] ? { trace, index: at.index } : null;
  if (at?.pinned && there) {
    view.transport.halt();
    view.held = there;
    view.replaying = false;
  }
  view.peek = there;
  draw(view);
}

/** What the step added: accepted drafts, then the model's own token. */
function showAdded(target, step) {
  const chips = step.texts.map((text, index) =>
    el("span", { class: index < step.accepted ? "chip accepted" : "chip bonus" }, visible(text)));
  target.replaceChildren(...chips);
}
