// Going through an answer's steps: back, forward, a slider, and a replay at a part of the speed at which it was written.

import { el, iconButton, setText, svg } from "./dom.js";

const SPEEDS = [["1", "1×"], ["0.5", "½×"], ["0.25", "¼×"], ["0.0625", "1⁄16×"]];
const DRAW_MS = 100; // no more than 10 drawings a second

/** Build the controls. `go(index, replaying)` shows a step, `pause()` stops following the running answer. */
export function buildTransport({ go, pause, follow }) {
  const state = { count: 0, index: 0, steps: null, timer: 0, running: false };
  const back = iconButton("left", "Step back", () => step(-1));
  const play = iconButton("play", "Replay", toggle);
  const on = iconButton("right", "Step forward", () => step(1));
  const slider = el("input", { type: "range", min: "1", max: "1", value: "1", "aria-label": "Step", oninput: () => move(slider.value - 1) });
  const speed = el("select", { "aria-label": "Speed of the replay" }, ...SPEEDS.map(([value, name]) => el("option", { value }, name)));
  const count = el("output", { class: "step-count" });
  const live = el("button", { type: "button", class: "follow-live", hidden: true, onclick: () => follow() }, "Follow");
  const node = el("div", { class: "transport", role: "group", "aria-label": "Steps of the answer" }, back, play, on, slider, count, speed, live);
  node.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by || event.target === speed) return;
    event.preventDefault();
    step(by);
  });

  function move(index) {
    halt();
    go(Math.min(state.count - 1, Math.max(0, index)), false);
  }

  const step = (by) => move(state.index + by);

  function halt() {
    clearTimeout(state.timer);
    state.timer = 0;
    showPlay();
  }

  function toggle() {
    if (state.timer) {
      halt();
      go(state.index, false);
    } else if (state.running) pause();
    else replay();
  }

  /** Walk along the steps' own times; drawings that would come too fast are left out, the clock is kept. */
  async function replay() {
    const steps = await state.load();
    if (!steps?.length) return;
    let at = state.index >= steps.length - 1 ? 0 : state.index;
    let before = performance.now();
    let owed = 0;
    const tick = () => {
      const now = performance.now();
      owed += (now - before) * Number(speed.value);
      before = now;
      while (at < steps.length - 1 && owed >= steps[at].ms) owed -= steps[at++].ms;
      const done = at >= steps.length - 1;
      go(at, !done);
      if (done) halt();
      else state.timer = setTimeout(tick, Math.max(DRAW_MS, (steps[at].ms - owed) / Number(speed.value)));
    };
    state.timer = setTimeout(tick, 0);
    showPlay();
  }

  function showPlay() {
    const name = state.timer || state.running ? "pause" : "play";
    if (play.dataset.icon === name) return;
    play.dataset.icon = name;
    const label = name === "play" ? "Replay" : "Pause";
    play.setAttribute("aria-label", label);
    play.title = label;
    play.replaceChildren(glyph(name));
  }

  /** Show where things stand; `load` gives the steps for a replay. */
  function show({ index, count: total, running, load, canFollow }) {
    Object.assign(state, { index, count: total, running, load });
    if (slider.max !== String(total)) slider.max = String(Math.max(1, total));
    if (slider.value !== String(index + 1)) slider.value = String(index + 1);
    setText(count, `${index + 1} / ${total}`);
    live.hidden = !canFollow;
    showPlay();
  }

  showPlay();
  return { node, show, halt, step, slow: () => Number(speed.value) < 0.1 };
}

const GLYPHS = { play: "M8 5.5v13l11-6.5Z", pause: "M8.5 5.5v13M15.5 5.5v13" };

const glyph = (name) => svg("svg", { viewBox: "0 0 24 24", class: "icon", "aria-hidden": "true", fill: name === "play" ? "currentColor" : "none",
  stroke: "currentColor", "stroke-width": "2", "stroke-linecap": "round", "stroke-linejoin": "round" }, svg("path", { d: GLYPHS[name] }));
