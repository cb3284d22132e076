// The race: one question without and with Medusa. The engine answers one after the other; then both are replayed on one
// clock, side by side, and the end says by how much and whether the texts are the same.

import { openDialog } from "./dialog.js";
import { el, setText } from "./dom.js";
import { shared } from "./shared.js";

/** Give each finished answer its button, where there are heads to race. */
export function startRace() {
  shared.on("thread", dress);
  shared.on("live", dress);
  shared.on("engine", dress);
}

function dress() {
  if (!shared.engine?.medusa) return;
  for (const row of document.querySelectorAll("#thread .message.assistant")) {
    const end = row.querySelector(".foot-end");
    if (!end || end.querySelector(".race-button") || ["running", "waiting"].includes(row.dataset.status)) continue;
    const button = el("button", { type: "button", class: "race-button", title: "Answer this without and with Medusa, side by side",
      onclick: () => race(row.dataset.id) }, "Race");
    end.prepend(button);
  }
}

function race(message) {
  const view = build();
  let source = null;
  const dialog = openDialog("The same question, twice", view.node, { onclose: () => leave() });
  dialog.node.classList.add("race-dialog");
  const leave = () => {
    source?.close();
    cancelAnimationFrame(view.frame);
  };
  const begin = () => {
    leave();
    reset(view);
    source = new EventSource(`/medusa/race?message=${encodeURIComponent(message)}`);
    source.onmessage = (event) => take(view, JSON.parse(event.data), source);
    source.onerror = () => {
      source.close();
      if (!view.outcome) say(view, "The app does not answer; start it again and reload this page.", "bad");
    };
  };
  view.again.onclick = () => replay(view);
  view.anew.onclick = begin;
  begin();
}

function build() {
  const view = { frame: 0, outcome: null };
  view.said = el("p", { class: "race-said", role: "status" });
  view.clock = el("p", { class: "race-clock" }, "0.00 s");
  view.lanes = ["Without Medusa", "With Medusa"].map((name) => {
    const lane = { speed: el("span", { class: "lane-speed" }), bar: el("i"), text: el("div", { class: "lane-text", tabindex: "0", role: "region", "aria-label": name }) };
    lane.node = el("section", { class: "lane" }, el("h3", {}, name, lane.speed), el("div", { class: "lane-bar" }, lane.bar), lane.text);
    return lane;
  });
  view.result = el("p", { class: "race-result", hidden: true });
  view.again = el("button", { type: "button", class: "plain-button", hidden: true }, "Replay");
  view.anew = el("button", { type: "button", class: "plain-button", hidden: true }, "Race again");
  view.node = el("div", { class: "race" }, el("div", { class: "race-top" }, view.said, view.clock),
    el("div", { class: "lanes" }, ...view.lanes.map((lane) => lane.node)),
    el("div", { class: "race-end" }, view.result, view.again, view.anew));
  return view;
}

function reset(view) {
  view.outcome = null;
  view.result.hidden = view.again.hidden = view.anew.hidden = true;
  view.lanes.forEach((lane) => {
    setText(lane.text, "");
    setText(lane.speed, "");
    lane.bar.style.transform = "scaleX(0)";
  });
  say(view, "Waiting for the model…");
}

function say(view, text, kind = "") {
  setText(view.said, text);
  view.said.className = `race-said ${kind}`;
}

function take(view, value, source) {
  if (value.progress) {
    const [plain, medusa] = value.progress;
    if (medusa) say(view, `Answering with Medusa: ${medusa} tokens`);
    else if (plain) say(view, `Answering without Medusa first: ${plain} tokens`);
    return;
  }
  source.close();
  view.anew.hidden = false;
  if (value.error) return say(view, value.error, "bad");
  view.outcome = value;
  replay(view);
}

/** Both texts grow as they did, on one clock. */
function replay(view) {
  cancelAnimationFrame(view.frame);
  view.result.hidden = true;
  view.again.hidden = false;
  say(view, "Both as they were written, on one clock");
  const { lanes } = view.outcome;
  const end = Math.max(...lanes.map((lane) => lane.times_ms.at(-1) || 0));
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const shown = lanes.map(() => 0);
  view.lanes.forEach((lane) => setText(lane.text, ""));
  const began = performance.now() - (calm ? end : 0);
  const draw = () => {
    const now = Math.min(end, performance.now() - began);
    lanes.forEach((lane, index) => grow(view.lanes[index], lane, shown, index, now));
    setText(view.clock, `${(now / 1000).toFixed(2)} s`);
    if (now < end) view.frame = requestAnimationFrame(draw);
    else finish(view);
  };
  draw();
}

function grow(target, lane, shown, index, now) {
  let text = "";
  while (shown[index] < lane.texts.length && lane.times_ms[shown[index]] <= now) text += lane.texts[shown[index]++];
  if (!text) return;
  target.text.append(text);
  target.text.scrollTop = target.text.scrollHeight;
  target.bar.style.transform = `scaleX(${shown[index] / lane.texts.length})`;
  if (shown[index] === lane.texts.length) {
    setText(target.speed, `${(lane.times_ms.at(-1) / 1000).toFixed(2)} s · ${lane.tokens_per_second.toFixed(0)} tokens/s`);
  }
}

function finish(view) {
  const { ratio, same, differs_at: at } = view.outcome;
  const words = !ratio ? "Too short to tell" : ratio >= 1.02 ? `×${ratio.toFixed(2)} faster with Medusa` : ratio > 0.98 ? "No difference in speed" : `×${ratio.toFixed(2)}: slower with Medusa`;
  view.result.replaceChildren(
    el("strong", {}, words),
    el("span", { class: `badge ${same ? "good" : "warn"}` }, same ? "✓ same text" : `the texts differ from character ${at + 1} on`));
  view.result.hidden = false;
  if (!same) view.lanes.forEach((lane) => markDifference(lane.text, at));
}

function markDifference(target, at) {
  const text = target.textContent;
  target.replaceChildren(text.slice(0, at), el("mark", {}, text.slice(at) || "(ends here)"));
}
