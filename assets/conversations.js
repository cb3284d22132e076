// The sidebar: the name of the app, a new chat, and the conversations by date.

import { el, icon, iconButton } from "./dom.js";
import { narrow, setOpen, shared } from "./shared.js";

const DAY_MS = 86_400_000;

/** Mount the sidebar; returns the function that takes each new list. */
export function mountConversations({ element, trigger }) {
  const list = el("nav", { class: "conversation-list", "aria-label": "Conversations" });
  const open = (id) => {
    shared.wanted = id;
    trigger("select", {});
    if (narrow.matches) setOpen("sidebar", false);
    if (!id) document.querySelector("#composer-text textarea")?.focus();
  };
  element.replaceChildren(
    el("div", { class: "brand" },
      el("img", { src: "/medusa/icons/medusa.svg", alt: "", width: "30", height: "30" }),
      el("span", {}, "Medusa Chat"),
      iconButton("close", "Close the list", () => setOpen("sidebar", false), { class: "icon-button only-narrow" })),
    el("button", { type: "button", class: "new-chat", onclick: () => open("") }, icon("plus"), "New chat"),
    list);
  document.getElementById("shell").before(el("div", { class: "veil", onclick: () => setOpen("sidebar", false) }));
  let shown = [];
  const draw = () => list.replaceChildren(...groups(shown).flatMap((group) => drawGroup(group, open)));
  shared.on("conversation", draw);
  window.addEventListener("popstate", () => open(new URLSearchParams(location.search).get("c") || ""));
  return (value) => {
    shown = value || [];
    draw();
  };
}

function drawGroup([name, items], open) {
  const id = `group-${name.replace(/\W/g, "-")}`;
  return [
    el("h2", { id }, name),
    el("ul", { "aria-labelledby": id }, ...items.map((item) =>
      el("li", {}, el("button", {
        type: "button",
        title: item.title,
        "aria-current": item.id === shared.conversation ? "page" : null,
        onclick: () => open(item.id),
      }, item.title)))),
  ];
}

/** Group by the reader's own days, in the order of the list. */
function groups(items) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  const found = new Map();
  for (const item of items) {
    const name = item.pinned ? "Pinned" : dayName(item.updated_ms, midnight);
    if (!found.has(name)) found.set(name, []);
    found.get(name).push(item);
  }
  return [...found];
}

function dayName(time, midnight) {
  if (time >= midnight) return "Today";
  if (time >= midnight - DAY_MS) return "Yesterday";
  if (time >= midnight - 7 * DAY_MS) return "Last 7 days";
  if (time >= midnight - 30 * DAY_MS) return "Last 30 days";
  return new Date(time).toLocaleDateString(undefined, { year: "numeric", month: "long" });
}
