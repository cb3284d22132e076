// Whole traces: every step of an answer, fetched when someone looks closer, kept while the page is open, and grown in
// place while the answer runs.

import { shared } from "./shared.js";

const KEPT = 24;
const traces = new Map(); // by message: {steps, prefill, running, busy}

/** The trace of a message: {prefill: [text], steps: [...]}, at least as new as the call; null where none was kept. */
export async function traceOf(message) {
  const trace = traces.get(message) || { message, steps: [], prefill: [], running: true, busy: null };
  if (trace.running) {
    trace.busy ||= grow(trace).finally(() => (trace.busy = null));
    if (!(await trace.busy)) return null;
  }
  traces.delete(message); // to the end of the order: the one that was looked at last
  traces.set(message, trace);
  while (traces.size > KEPT) traces.delete(traces.keys().next().value);
  return trace;
}

async function grow(trace) {
  const first = trace.steps.length;
  const answer = await fetch(`/medusa/trace?message=${encodeURIComponent(trace.message)}&first=${first}`).catch(() => null);
  if (!answer?.ok) return false;
  const columns = await answer.json();
  trace.prefill = columns.prefill.texts;
  trace.running = columns.running;
  columns.accepted.forEach((_, index) => trace.steps.push(stepFrom(columns, index, first + index + 1)));
  return true;
}

function stepFrom(columns, index, number) {
  const words = (numbers) => numbers.map((word) => columns.words[word]);
  return {
    number,
    labels: words(columns.labels[index]),
    parents: columns.shapes[columns.shape[index]],
    probabilities: columns.probabilities[index].map((level) => level / 99),
    path: columns.path[index],
    texts: words(columns.texts[index]),
    accepted: columns.accepted[index],
    ms: columns.ms[index],
  };
}

const depths = new WeakMap();

/** How deep a tree is: the most tokens in a row that one step can accept. */
export function depthOf(parents) {
  if (!depths.has(parents)) {
    const depth = [];
    parents.forEach((parent) => depth.push(parent < 0 ? 0 : depth[parent] + 1));
    depths.set(parents, Math.max(...depth));
  }
  return depths.get(parents);
}

/** A step in words, such as "step 17: 3 of 4 drafted tokens accepted". */
export function sentence(step) {
  const drafted = depthOf(step.parents);
  if (!drafted) return `step ${step.number}: one token, without Medusa`;
  return `step ${step.number}: ${step.accepted} of ${drafted} drafted token${drafted === 1 ? "" : "s"} accepted`;
}

/** Let every view know which step is looked at: {message, index}, or null for none. */
export function pointAt(step) {
  shared.tell("step", step);
}

/** Text of a token for a label: what cannot be seen is shown by a sign. */
export const visible = (text) => text.replace(/ /g, "·").replace(/\n/g, "↵").replace(/\t/g, "⇥") || "∅";
