// Beside the Medusa switch: the settings of this conversation, and how full the model's context is.

import { el, icon, setText } from "./dom.js";
import { openSettings, settingsName } from "./settings.js";
import { shared } from "./shared.js";

/** Mount the tools; their content follows the conversation, not a value of their own. */
export function mountTools({ element }) {
  const name = el("span", {});
  const button = el("button", { type: "button", class: "tool-button", "aria-haspopup": "dialog", onclick: openSettings },
    icon("sliders"), el("span", { class: "only-spoken" }, "Settings: "), name);
  const meter = buildMeter();
  element.replaceChildren(button, meter.node);
  const showName = () => setText(name, settingsName());
  shared.on("settings", showName);
  shared.on("conversation", (value) => showContext(meter, value.context));
  shared.on("thread", (value) => showContext(meter, value.context));
  shared.on("live", (live) => {
    if (live?.context && live.conversation === shared.conversation) showContext(meter, live.context);
  });
  shared.on("size", () => showContext(meter, meter.shown));
  showName();
  showContext(meter, shared.thread?.context); // it may have been shown before this was mounted
  return () => {};
}

const NUMBER = new Intl.NumberFormat("en");

function buildMeter() {
  const fill = el("i");
  const text = el("span", {});
  const node = el("p", { class: "context-meter", hidden: true }, el("span", { class: "meter-bar", "aria-hidden": "true" }, fill),
    el("span", { class: "only-spoken" }, "Context used: "), text);
  return { node, fill, text, shown: null };
}

function showContext(meter, context) {
  meter.shown = context;
  const size = context?.size || shared.contextSize || 0;
  const used = context?.used || 0;
  meter.node.hidden = !size;
  if (!size) return;
  const share = Math.min(1, used / size);
  const text = `${NUMBER.format(used)} / ${NUMBER.format(size)}`;
  if (meter.text.textContent === text) return;
  meter.text.textContent = text;
  meter.fill.style.transform = `scaleX(${share})`;
  meter.node.classList.toggle("nearly", share > 0.85);
  meter.node.title = share > 0.85
    ? "Tokens of the conversation / of the model's context. It is nearly full: soon the oldest messages are left out of the prompt, and a line says so."
    : "Tokens of the conversation / of the model's context";
}
