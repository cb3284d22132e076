// The candidate tree, left to right. A shape is laid out once; from then on a step only changes labels and classes.

import { setText, svg } from "./dom.js";

const MIN_COLUMN_PX = 84;
const RADIUS = 5;
const CHARACTER_PX = 6.6; // of the 11 px monospace labels

/** Show `step` in `target`, reusing the drawing where the tree has the same shape and room as before. */
export function drawTree(target, step) {
  const width = target.clientWidth || 360;
  const key = `${step.parents.join(",")}@${Math.round(width / 24)}`;
  if (target.drawing?.key !== key) {
    target.drawing = { key, ...build(step.parents, width) };
    target.replaceChildren(target.drawing.node);
  }
  mark(target.drawing, step);
}

/** Place nodes: x by depth, y by leaves in order, parents in the middle of their children. */
function layout(parents, width) {
  const children = parents.map(() => []);
  const depth = parents.map(() => 0);
  parents.forEach((parent, node) => {
    if (parent < 0) return;
    children[parent].push(node);
    depth[node] = depth[parent] + 1;
  });
  const leaves = children.filter((list) => list.length === 0).length;
  const rowHeight = leaves <= 10 ? 30 : leaves <= 20 ? 23 : 17;
  const column = Math.max(MIN_COLUMN_PX, (width - 24) / (Math.max(...depth) + 1));
  const rows = parents.map(() => 0);
  let next = 0;
  const place = (node) => {
    children[node].forEach(place);
    const own = children[node].map((child) => rows[child]);
    rows[node] = own.length ? (own[0] + own[own.length - 1]) / 2 : next++;
  };
  place(0);
  const points = parents.map((_, node) => ({ x: 14 + depth[node] * column, y: 20 + rows[node] * rowHeight }));
  return { points, column, width: column * (Math.max(...depth) + 1) + 14, height: Math.max(1, leaves) * rowHeight + 6 };
}

function build(parents, width) {
  const plan = layout(parents, width);
  const edges = parents.map((parent, node) => (parent < 0 ? null : svg("path", { class: "edge", d: curve(plan.points[parent], plan.points[node]) })));
  const nodes = parents.map((_, node) => buildNode(plan.points[node]));
  const node = svg("svg", { width: plan.width, height: plan.height, viewBox: `0 0 ${plan.width} ${plan.height}`, "aria-hidden": "true" },
    svg("g", {}, ...edges.filter(Boolean)), svg("g", {}, ...nodes.map((each) => each.group)));
  return { node, edges, nodes, room: Math.floor((plan.column - 20) / CHARACTER_PX) };
}

function buildNode({ x, y }) {
  const dot = svg("circle", { cx: x, cy: y, r: RADIUS });
  const label = svg("text", { x: x + RADIUS + 3, y: y - 5 }); // above the line that leads on
  const title = svg("title");
  return { group: svg("g", { class: "node" }, dot, label, title), label, title };
}

function curve(from, to) {
  const bend = Math.min(44, (to.x - from.x) * 0.5); // the line runs straight below the label, then turns
  const turn = to.x - RADIUS - bend;
  const middle = turn + bend / 2;
  return `M${from.x + RADIUS} ${from.y}H${turn}C${middle} ${from.y} ${middle} ${to.y} ${to.x - RADIUS} ${to.y}`;
}

function mark(drawing, step) {
  const accepted = new Set(step.path);
  drawing.nodes.forEach((node, index) => {
    const kind = index === 0 ? "root" : accepted.has(index) ? "accepted" : "rejected";
    const probability = step.probabilities[index];
    setClass(node.group, `node ${kind}`);
    setText(node.label, shorten(step.labels[index], drawing.room));
    setText(node.title, `${JSON.stringify(step.labels[index])}, ${kind === "root" ? "already in the text" : `${kind}, guessed with ${Math.round(probability * 100)} %`}`);
    node.group.style.opacity = kind === "rejected" ? String(0.5 + 0.5 * Math.sqrt(probability)) : "1";
    if (drawing.edges[index]) setClass(drawing.edges[index], accepted.has(index) ? "edge accepted" : "edge");
  });
  for (const index of step.path.slice(1)) drawing.edges[index].parentNode.append(drawing.edges[index]); // in front
}

function setClass(node, name) {
  if (node.getAttribute("class") !== name) node.setAttribute("class", name);
}

function shorten(text, room) {
  const shown = text.replace(/^ /, "").replace(/ /g, "·").replace(/\n/g, "↵").replace(/\t/g, "⇥") || "·";
  return shown.length > room ? `${shown.slice(0, Math.max(1, room - 1))}…` : shown;
}
