// The panel "Medusa at work": the latest step's tree, what it added to the text, and the figures of the answer.

import { el, setText } from "./dom.js";
import { shared } from "./shared.js";
import { drawTree } from "./tree.js";

const MAX_BARS = 48;

/** Mount the panel; returns the function that takes each new value. */
export function mountLive({ element }) {
  const view = buildPanel();
  element.replaceChildren(view.panel);
  shared.on("conversation", () => {
    if (shared.live && shared.live.conversation !== shared.conversation) show(view, null);
  });
  return (value) => {
    shared.live = value;
    shared.tell("live", value);
    show(view, value && value.conversation === shared.conversation ? value : null);
  };
}

function buildPanel() {
  const view = {
    caption: el("p", { class: "step-caption" }),
    tree: el("div", { class: "tree-scroll", tabindex: "0", role: "img", "aria-label": "Candidate tree" }),
    added: el("p", { class: "added", "aria-label": "Added to the text" }),
    speed: gauge("tok/s"),
    perStep: gauge("tokens a step"),
    recent: el("div", { class: "recent", role: "img" }),
    depths: el("div", { class: "depths" }),
    idle: el("div", { class: "idle" }),
  };
  view.guesses = el("div", {},
    el("h3", {}, "Accepted guesses, step by step"), view.recent,
    el("h3", {}, "Accepted by depth"), view.depths);
  const legend = el("p", { class: "legend" },
    el("span", { class: "key accepted" }, "accepted"), el("span", { class: "key rejected" }, "checked, not kept"),
    el("span", { class: "key bonus" }, "the model's own"));
  view.work = el("div", { class: "work", hidden: true },
    view.caption, view.tree, view.added, legend,
    el("div", { class: "gauges" }, view.speed.node, view.perStep.node),
    view.guesses);
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
};

function fillIdle(idle) {
  const sample = el("div", { class: "sample", "aria-hidden": "true" });
  idle.append(
    el("p", {}, "Each step of an answer is drawn here as it happens. From the last word on the left, the heads guess what may follow; the solid path is what the model agreed to, and it is added at once."),
    sample,
    el("p", { class: "small" }, "An example. Send a message to see a real one."));
  requestAnimationFrame(() => drawTree(sample, SAMPLE));
}

function gauge(unit) {
  const number = el("strong", {}, "–");
  return { number, node: el("p", { class: "gauge" }, number, el("span", {}, unit)) };
}

function show(view, value) {
  const step = value?.steps?.at(-1);
  view.work.hidden = !step;
  view.idle.hidden = Boolean(step);
  if (!step) return;
  drawTree(view.tree, step);
  const drafted = deepest(step.parents);
  setText(view.caption, drafted
    ? `Step ${step.number}: ${step.accepted} of ${drafted} guesses in a row accepted, ${step.parents.length - 1} checked`
    : `Step ${step.number}: without Medusa, one token a step`);
  view.tree.setAttribute("aria-label", `Candidate tree. ${view.caption.textContent}`);
  showAdded(view.added, step);
  view.guesses.hidden = !value.medusa;
  setText(view.speed.number, value.tokens_per_second.toFixed(0));
  setText(view.perStep.number, value.tokens_per_step.toFixed(2));
  showRecent(view.recent, value.recent);
  showDepths(view.depths, value.acceptance_by_depth);
}

/** What the step added: accepted guesses, then the model's own token. */
function showAdded(target, step) {
  const chips = step.texts.map((text, index) =>
    el("span", { class: index < step.accepted ? "chip accepted" : "chip bonus" }, visible(text)));
  target.replaceChildren(...chips);
}

export const visible = (text) => text.replace(/ /g, "·").replace(/\n/g, "↵").replace(/\t/g, "⇥") || "∅";

function showRecent(target, recent) {
  while (target.children.length < MAX_BARS) target.prepend(el("i"));
  const from = MAX_BARS - recent.length;
  [...target.children].forEach((bar, index) => {
    const accepted = index < from ? null : recent[index - from];
    const level = accepted === null ? "none" : String(Math.min(accepted, 5));
    if (bar.dataset.level !== level) bar.dataset.level = level;
  });
  const mean = recent.reduce((sum, count) => sum + count, 0) / Math.max(1, recent.length);
  target.setAttribute("aria-label", `The last ${recent.length} steps accepted ${mean.toFixed(1)} guesses on average`);
}

function showDepths(target, shares) {
  while (target.children.length > shares.length) target.lastChild.remove();
  shares.forEach((share, index) => {
    const row = target.children[index] || target.appendChild(depthRow(index + 1));
    row.children[1].firstChild.style.transform = `scaleX(${share})`;
    setText(row.children[2], `${Math.round(share * 100)} %`);
  });
}

const depthRow = (depth) => el("p", { class: "depth" }, el("span", {}, `${depth}`), el("span", { class: "bar" }, el("i")), el("span", {}));

function deepest(parents) {
  const depth = parents.map(() => 0);
  parents.forEach((parent, node) => {
    if (parent >= 0) depth[node] = depth[parent] + 1;
  });
  return Math.max(...depth);
}
