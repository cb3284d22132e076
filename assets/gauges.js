// The gauges under the tree: speed now and on the whole, accepted drafts step by step and by depth, and the measured
// times of a step by size of tree with the size that was chosen.

import { el, setText, svg } from "./dom.js";
import { depthOf } from "./trace.js";

const MAX_BARS = 48;
const BAR_PX = 4; // and 2 between two
const MOST = 5; // accepted drafts: the full height
const SPEED_STEPS = 16;

/** Build the gauges; `show(figures)` takes a live value or `figuresOf` a trace, `showTuning` the engine's tree choice. */
export function buildGauges() {
  const now = gauge("tokens/s now");
  const mean = gauge("tokens/s mean");
  const perStep = gauge("tokens a step");
  const recent = buildRecent();
  const depths = el("div", { class: "depths" });
  const curve = el("section", { class: "curve", hidden: true });
  const guesses = el("div", {},
    el("h3", {}, "Accepted drafts, step by step"), recent.node,
    el("h3", {}, "Accepted by depth"), depths);
  const node = el("div", {}, el("div", { class: "gauges" }, now.node, mean.node, perStep.node), guesses, curve);
  const show = (figures) => {
    guesses.hidden = !figures.medusa;
    setText(now.number, figures.tokens_per_second_now.toFixed(0));
    setText(mean.number, figures.tokens_per_second.toFixed(0));
    setText(perStep.number, figures.tokens_per_step.toFixed(2));
    showRecent(recent, figures.recent);
    showDepths(depths, figures.acceptance_by_depth);
  };
  return { node, show, showTuning: (tuning) => showCurve(curve, tuning) };
}

/** The figures of a trace as they stood at step `index` (from 0). */
export function figuresOf(trace, index) {
  const steps = trace.steps.slice(0, index + 1);
  const deepest = Math.max(0, ...trace.steps.map((step) => depthOf(step.parents)));
  const shares = Array.from({ length: deepest }, (_, depth) => steps.filter((step) => step.accepted > depth).length / steps.length);
  return {
    medusa: deepest > 0,
    tokens_per_second_now: speed(steps.slice(-SPEED_STEPS)),
    tokens_per_second: speed(steps),
    tokens_per_step: 1 + steps.reduce((sum, step) => sum + step.accepted, 0) / steps.length,
    recent: steps.slice(-MAX_BARS).map((step) => step.accepted),
    acceptance_by_depth: shares,
  };
}

function speed(steps) {
  const milliseconds = steps.reduce((sum, step) => sum + step.ms, 0);
  return milliseconds ? (1000 * steps.reduce((sum, step) => sum + step.texts.length, 0)) / milliseconds : 0;
}

function gauge(unit) {
  const number = el("strong", {}, "–");
  return { number, node: el("p", { class: "gauge" }, number, el("span", {}, unit)) };
}

function buildRecent() {
  const hits = svg("path", { class: "hits" });
  const misses = svg("path", { class: "misses" });
  const node = svg("svg", { class: "recent", role: "img", viewBox: `0 0 ${MAX_BARS * (BAR_PX + 2)} 40`, preserveAspectRatio: "none" }, hits, misses);
  return { node, hits, misses };
}

/** A bar a step, the latest at the right: two paths, because 48 elements that change ten times a second are felt. */
function showRecent({ node, hits, misses }, recent) {
  const bars = { hits: "", misses: "" };
  recent.forEach((accepted, index) => {
    const x = (MAX_BARS - recent.length + index) * (BAR_PX + 2) + 1 + BAR_PX / 2;
    bars[accepted ? "hits" : "misses"] += `M${x} 40v-${accepted ? 10 + (30 * Math.min(accepted, MOST)) / MOST : 2.5}`;
  });
  hits.setAttribute("d", bars.hits);
  misses.setAttribute("d", bars.misses);
  const mean = recent.reduce((sum, count) => sum + count, 0) / Math.max(1, recent.length);
  node.setAttribute("aria-label", `The last ${recent.length} steps accepted ${mean.toFixed(1)} drafted tokens on average`);
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

const WIDTH = 360, HEIGHT = 118, LEFT = 34, RIGHT = 14, TOP = 12, BOTTOM = 24;

/** The measured step times: one dot a size, the chosen one ringed and named, and why. */
function showCurve(target, tuning) {
  const sizes = (tuning?.nodes || []).filter((size) => tuning.step_ms[size] > 0);
  target.hidden = sizes.length < 2;
  if (target.hidden) return;
  const times = sizes.map((size) => tuning.step_ms[size]);
  const top = Math.max(...times) * 1.08;
  const most = Math.max(...sizes, 1);
  const x = (size) => LEFT + ((WIDTH - LEFT - RIGHT) * Math.sqrt(size)) / Math.sqrt(most);
  const y = (ms) => TOP + (HEIGHT - TOP - BOTTOM) * (1 - ms / top);
  const chosen = tuning.chosen;
  const at = sizes.includes(chosen) ? chosen : null;
  const line = sizes.map((size, index) => `${index ? "L" : "M"}${x(size).toFixed(1)} ${y(times[index]).toFixed(1)}`).join("");
  const ticks = sizes.filter((size, index) => index === 0 || x(size) - x(sizes[index - 1]) > 16 || size === most);
  const drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img",
    "aria-label": `Time of a step by drafted nodes: ${sizes.map((size, index) => `${size}: ${times[index].toFixed(1)} ms`).join(", ")}. Chosen: ${chosen}.` },
  svg("path", { class: "axis", d: `M${LEFT} ${TOP}V${HEIGHT - BOTTOM}H${WIDTH - RIGHT}` }),
  svg("text", { class: "unit", x: LEFT - 6, y: y(0) + 3, "text-anchor": "end" }, "0"),
  svg("text", { class: "unit", x: LEFT - 6, y: y(Math.max(...times)) + 3, "text-anchor": "end" }, Math.max(...times).toFixed(0)),
  ...ticks.map((size) => svg("text", { class: "unit", x: x(size), y: HEIGHT - 9, "text-anchor": "middle" }, String(size))),
  svg("path", { class: "line", d: line }),
  ...sizes.map((size, index) => svg("circle", { class: "point", cx: x(size), cy: y(times[index]), r: 2.6 })),
  at === null ? null : svg("circle", { class: "chosen", cx: x(at), cy: y(tuning.step_ms[at]), r: 6 }),
  at === null ? null : svg("text", { class: "chosen-name", x: x(at), y: Math.max(11, y(tuning.step_ms[at]) - 11),
    "text-anchor": x(at) < LEFT + 50 ? "start" : x(at) > WIDTH - 60 ? "end" : "middle" }, `${chosen} · ${tuning.step_ms[at].toFixed(1)} ms`));
  target.replaceChildren(
    el("h3", {}, "Milliseconds a step, by drafted nodes, measured here"), drawing,
    el("p", { class: "why" }, tuning.reason || ""));
}
