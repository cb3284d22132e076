// The sidebar: the name of the app, a new chat, search, the conversations by date and folder, and the way to the rest.

import { act, notify } from "./api.js";
import { openConversationMenu } from "./conversation_menu.js";
import { el, icon, iconButton } from "./dom.js";
import { drawHits } from "./search.js";
import { openShortcuts } from "./shortcuts.js";
import { narrow, recall, remember, setOpen, shared } from "./shared.js";
import { openTransfer } from "./transfer.js";
import { openBin } from "./bin.js";

const DAY_MS = 86_400_000;
const SEARCH_PAUSE_MS = 150;

/** Mount the sidebar; returns the function that takes each new list. */
export function mountConversations({ element, trigger }) {
  const list = el("nav", { class: "conversation-list", "aria-label": "Conversations" });
  const open = (id, message = null) => {
    shared.wanted = id;
    shared.lookFor = message;
    trigger("select", {});
    if (narrow.matches) setOpen("sidebar", false);
    if (!id) document.querySelector("#composer-text textarea")?.focus();
  };
  shared.open = open;
  const view = { list, items: [], hits: null, open };
  const search = buildSearch(view);
  element.replaceChildren(
    el("div", { class: "brand" },
      el("img", { src: "/medusa/icons/medusa.svg", alt: "", width: "30", height: "30" }),
      el("span", {}, "Medusa Chat"),
      iconButton("close", "Close the list", () => setOpen("sidebar", false), { class: "icon-button only-narrow" })),
    el("button", { type: "button", class: "new-chat", title: "New chat (Alt+N)", onclick: () => open("") }, icon("plus"), "New chat"),
    search, list, footer());
  document.getElementById("shell").before(el("div", { class: "veil", onclick: () => setOpen("sidebar", false) }));
  shared.on("conversation", () => draw(view));
  window.addEventListener("popstate", () => open(new URLSearchParams(location.search).get("c") || ""));
  return (value) => {
    view.items = value || [];
    draw(view);
  };
}

function footer() {
  const button = (name, label, run) => el("button", { type: "button", class: "tool-button", onclick: run }, icon(name), label);
  return el("div", { class: "sidebar-foot" },
    button("transfer", "Import and export", openTransfer),
    button("bin", "Deleted", openBin),
    button("keyboard", "Shortcuts", openShortcuts));
}

function buildSearch(view) {
  let waiting = null;
  const input = el("input", { type: "search", id: "search", placeholder: "Search", "aria-label": "Search titles and messages",
    autocomplete: "off", spellcheck: "false" });
  const look = async () => {
    const text = input.value.trim();
    const answer = text ? await act("search", { text }) : null;
    if (input.value.trim() !== text) return; // typed on meanwhile
    view.hits = answer?.hits || null;
    draw(view);
  };
  input.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(look, SEARCH_PAUSE_MS);
  });
  input.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      input.value = "";
      look();
    } else if (event.key === "ArrowDown") view.list.querySelector("button")?.focus();
  });
  return el("div", { class: "search" }, icon("search"), input);
}

function draw(view) {
  if (view.hits) {
    view.list.replaceChildren(...drawHits(view.hits, async (hit) => {
      if (hit.message) await act("show", { message: hit.message });
      view.open(hit.id, hit.message);
    }));
    return;
  }
  const focused = document.activeElement?.closest?.("[data-conversation]")?.dataset.conversation;
  view.list.replaceChildren(...groups(view.items).map((group) => drawGroup(group, view)));
  if (view.items.length === 0) view.list.append(el("p", { class: "list-note" }, "Conversations are kept here, on this machine alone."));
  if (focused) view.list.querySelector(`[data-conversation="${CSS.escape(focused)}"] button`)?.focus();
}

function drawGroup({ name, items, folder }, view) {
  const id = `group-${name.replace(/\W/g, "-")}`;
  const list = el("ul", { "aria-labelledby": id }, ...items.map((item) => drawItem(item, view)));
  if (!folder) return el("section", {}, el("h2", { id }, name), list);
  const key = `medusa-folder-${name}`;
  const details = el("details", { open: recall(key) !== "closed", ontoggle: () => remember(key, details.open ? "open" : "closed") },
    el("summary", { id }, icon("folder"), el("span", {}, name)), list);
  return details;
}

function drawItem(item, view) {
  const more = iconButton("more", `More for ${item.title}`, () => openConversationMenu(more, item, view.items), {
    class: "icon-button more", "aria-haspopup": "menu",
  });
  return el("li", { "data-conversation": item.id },
    el("button", { type: "button", class: "conversation", title: item.title, "aria-current": item.id === shared.conversation ? "page" : null,
      onclick: () => view.open(item.id),
      ondblclick: () => more.click(),
      onkeydown: (event) => keys(event, item) },
    item.title), more);
}

/** F2 renames, Delete deletes: with undo, so no question is asked. */
function keys(event, item) {
  if (event.key === "Delete") deleteConversation(item);
  else if (event.key === "F2") event.currentTarget.nextSibling.click();
  else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    const all = [...document.querySelectorAll(".conversation-list .conversation")];
    all[all.indexOf(event.currentTarget) + (event.key === "ArrowDown" ? 1 : -1)]?.focus();
    event.preventDefault();
  }
}

/** Hide a conversation, and offer to bring it back. */
export async function deleteConversation(item) {
  if (!(await act("delete", { id: item.id }))) return;
  const shown = item.id === shared.conversation;
  if (shown) shared.open("");
  const undo = async () => {
    await act("restore", { id: item.id });
    if (shown) shared.open(item.id);
  };
  // After the page has changed, which clears what was said before.
  setTimeout(() => notify(`“${item.title}” was deleted.`, { action: { label: "Undo", run: undo } }), shown ? 600 : 0);
}

/** Pinned ones, then folders by name, then the reader's own days, in the order of the list. */
function groups(items) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  const found = new Map();
  const put = (name, item, folder = false) => {
    const key = `${folder ? 1 : 0}${name}`;
    if (!found.has(key)) found.set(key, { name, folder, items: [] });
    found.get(key).items.push(item);
  };
  items.filter((item) => item.pinned).forEach((item) => put("Pinned", item));
  const rest = items.filter((item) => !item.pinned);
  rest.filter((item) => item.folder).sort((a, b) => a.folder.localeCompare(b.folder)).forEach((item) => put(item.folder, item, true));
  rest.filter((item) => !item.folder).forEach((item) => put(dayName(item.updated_ms, midnight), item));
  return [...found.values()];
}

function dayName(time, midnight) {
  if (time >= midnight) return "Today";
  if (time >= midnight - DAY_MS) return "Yesterday";
  if (time >= midnight - 7 * DAY_MS) return "Previous 7 days";
  if (time >= midnight - 30 * DAY_MS) return "Previous 30 days";
  return new Date(time).toLocaleDateString(undefined, { year: "numeric", month: "long" });
}
