// The candidate tree, left to right: the root, one column a head, and below a slot in each column for the backbone's own
// token. Steps verify other trees of as many nodes: what is drawn keeps the most columns and rows that any of them had, so
// that nothing around it moves. While the shape stays, a step changes labels and classes only.

import { setText, svg } from "./dom.js";
import { visible } from "./trace.js";

const RADIUS = 5;
const LEFT = 12;
const HEAD_ROOM = 22; // for the names of the columns
const MIN_COLUMN_PX = 52;
const SMALL = 12; // nodes: up to here there is room for each one's probability

const widths = new WeakMap(); // by target, kept by an observer: to ask for it at each step would force a layout

/**
 * Show `step` in `target`, reusing the drawing where the tree has the same shape and room as before. Without `named`
 * the labels keep what they say: nobody sees them while steps fly by, and texts are what a drawing costs most.
 */
export function drawTree(target, step, named = true) {
  const width = widthOf(target);
  target.shown = { step, named };
  const room = roomOf(target, step.parents);
  const key = `${step.parents.join(",")}@${Math.round(width / 16)},${room.deepest},${room.leaves}`;
  if (target.drawing?.key !== key) {
    target.drawing = { key, ...build(step.parents, width, room) };
    target.replaceChildren(target.drawing.node);
  }
  mark(target.drawing, step, named);
}

/** The most columns and rows that trees of as many nodes have needed here, with those of `parents`. */
function roomOf(target, parents) {
  const depth = [], isLeaf = parents.map(() => true);
  parents.forEach((parent, node) => {
    depth[node] = parent < 0 ? 0 : depth[parent] + 1;
    if (parent >= 0) isLeaf[parent] = false;
  });
  const before = target.room?.nodes === parents.length ? target.room : { deepest: 0, leaves: 0 };
  const deepest = Math.max(before.deepest, ...depth), leaves = Math.max(before.leaves, isLeaf.filter(Boolean).length);
  target.room = { nodes: parents.length, deepest, leaves };
  return target.room;
}

function widthOf(target) {
  if (!widths.has(target)) {
    widths.set(target, target.clientWidth);
    new ResizeObserver(() => {
      const width = target.clientWidth;
      if (!width || width === widths.get(target)) return;
      widths.set(target, width);
      drawTree(target, target.shown.step, target.shown.named);
    }).observe(target);
  }
  return widths.get(target) || 360;
}

/** Place nodes: x by depth, y by leaves in order, parents in the middle of their children. */
function layout(parents, width, room) {
  const children = parents.map(() => []);
  const depth = parents.map(() => 0);
  parents.forEach((parent, node) => {
    if (parent < 0) return;
    children[parent].push(node);
    depth[node] = depth[parent] + 1;
  });
  const { deepest, leaves } = room;
  const small = parents.length <= SMALL;
  const rowHeight = small ? 48 : leaves <= 14 ? 28 : leaves <= 24 ? 22 : 17;
  const column = Math.max(MIN_COLUMN_PX, Math.min(150, (width - LEFT - 4) / (deepest + 2)));
  const rows = parents.map(() => 0);
  let next = 0;
  const place = (node) => {
    children[node].forEach(place);
    const own = children[node].map((child) => rows[child]);
    rows[node] = own.length ? (own[0] + own[own.length - 1]) / 2 : next++;
  };
  place(0);
  const top = HEAD_ROOM + (small ? 22 : 16);
  const x = (level) => LEFT + level * column;
  return {
    points: parents.map((_, node) => ({ x: x(depth[node]), y: top + rows[node] * rowHeight })),
    slots: Array.from({ length: deepest + 1 }, (_, level) => ({ x: x(level + 1), y: top + leaves * rowHeight + (small ? 0 : 8) })),
    depth, deepest, column, small,
    width: x(deepest + 2),
    height: top + leaves * rowHeight + (small ? 14 : 20),
  };
}

function build(parents, width, room) {
  const plan = layout(parents, width, room);
  const edges = parents.map((parent, node) => (parent < 0 ? null : svg("path", { class: "edge", d: curve(plan.points[parent], plan.points[node]) })));
  // From every node to the slot beside it: all are laid out, and the step's own one is shown.
  const ways = parents.map((_, node) => svg("path", { class: "way", d: curve(plan.points[node], plan.slots[plan.depth[node]]) }));
  const nodes = parents.map((_, node) => buildNode(plan.points[node], plan.small));
  const slots = plan.slots.map((point) => buildNode(point, plan.small, true));
  const columns = ["last", ...plan.slots.map((_, level) => (level < plan.deepest ? `head ${level + 1}` : "next"))];
  const names = columns.map((name, level) => svg("text", { class: "column-name", x: LEFT + level * plan.column - 4, y: 11 }, name));
  const node = svg("svg", { width: plan.width, height: plan.height, viewBox: `0 0 ${plan.width} ${plan.height}`, "aria-hidden": "true",
    class: plan.small ? "small" : "" },
  svg("g", { class: "columns" }, ...names),
  svg("g", {}, ...ways, ...edges.filter(Boolean)), svg("g", {}, ...slots.map((each) => each.group), ...nodes.map((each) => each.group)));
  return { node, edges, ways, nodes, slots, room: Math.floor((plan.column - 12) / (plan.small ? 7.3 : 6.4)) };
}

function buildNode({ x, y }, small, slot = false) {
  const dot = svg("circle", { cx: x, cy: y, r: small ? RADIUS + 1 : RADIUS });
  // Above the line that leads on; nothing leads on from a slot.
  const place = slot ? { x: x + RADIUS + 4, y: y + 4 } : { x: x + (small ? -3 : RADIUS + 2), y: y - (small ? 11 : 5) };
  const label = svg("text", { class: "label", ...place });
  const chance = small && !slot ? svg("text", { class: "chance", x: x - 3, y: y + 18 }) : null;
  const title = svg("title");
  const group = svg("g", { class: "node" }, title, dot, label, chance);
  return { group, dot, label, chance, title };
}

function curve(from, to) {
  const bend = Math.min(44, (to.x - from.x) * 0.5); // the line runs straight below the label, then turns
  const turn = to.x - RADIUS - bend;
  const middle = turn + bend / 2;
  return `M${from.x + RADIUS} ${from.y}H${turn}C${middle} ${from.y} ${middle} ${to.y} ${to.x - RADIUS} ${to.y}`;
}

function mark(drawing, step, named) {
  const accepted = new Set(step.path);
  drawing.nodes.forEach((node, index) => {
    const kind = index === 0 ? "root" : accepted.has(index) ? "accepted" : "rejected";
    const probability = step.probabilities[index];
    setClass(node.group, `node ${kind}`);
    if (named) name(node, step.labels[index], kind, probability, drawing.room);
    const opacity = kind === "rejected" ? (0.35 + 0.65 * Math.sqrt(probability)).toFixed(2) : "1";
    setStyle(node.dot, opacity);
    if (!drawing.edges[index]) return;
    setClass(drawing.edges[index], accepted.has(index) ? "edge accepted" : "edge");
    setStyle(drawing.edges[index], opacity);
  });
  markOwn(drawing, step, named);
}

function name(node, text, kind, probability, room) {
  label(node, text, room);
  setText(node.title, `${JSON.stringify(text)}: ${kind === "root" ? "already in the text" : `${kind}, guessed with ${percent(probability)}`}`);
  if (node.chance) setText(node.chance, kind === "root" ? "" : percent(probability));
}

/** The backbone's own token stands in the slot after the last accepted node. */
function markOwn(drawing, step, named) {
  const last = step.path[step.path.length - 1];
  const own = step.texts.length > step.accepted ? step.texts[step.accepted] : null;
  drawing.ways.forEach((way, node) => setClass(way, own !== null && node === last ? "way shown" : "way"));
  drawing.slots.forEach((slot, level) => {
    const shown = own !== null && level === step.path.length - 1;
    setClass(slot.group, shown ? "slot shown" : "slot");
    if (!named) return;
    label(slot, shown ? own : "", drawing.room);
    setText(slot.title, shown ? `${JSON.stringify(own)}: the model's own next token` : "");
  });
}

const percent = (probability) => `${Math.round(probability * 100)} %`;

function label(node, text, room) {
  setText(node.label, text === "" ? "" : shorten(text, room));
}

function setClass(node, name) {
  if (node.getAttribute("class") !== name) node.setAttribute("class", name);
}

function setStyle(node, opacity) {
  if (node.style.opacity !== opacity) node.style.opacity = opacity;
}

function shorten(text, room) {
  const shown = text.trim() === "" ? visible(text) : visible(text.replace(/^ /, ""));
  return shown.length > room ? `${shown.slice(0, Math.max(1, room - 1))}…` : shown;
}
