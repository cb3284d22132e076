// What can be done with one conversation of the list: rename, pin, put into a folder, export, delete.

import { act } from "./api.js";
import { deleteConversation } from "./conversations.js";
import { askText } from "./dialog.js";
import { el } from "./dom.js";
import { saveExport } from "./transfer.js";

/** Open the menu below `button`. */
export function openConversationMenu(button, item, items) {
  const folders = [...new Set(items.map((other) => other.folder).filter(Boolean))];
  openMenu(button, `Menu of ${item.title}`, [
    ["Rename…", () => rename(item)],
    [item.pinned ? "Unpin" : "Pin to the top", () => act("pin", { id: item.id, pinned: !item.pinned })],
    ["Put into a folder…", () => putIntoFolder(item, folders)],
    item.folder ? ["Take out of the folder", () => act("move", { id: item.id, folder: "" })] : null,
    ["Export as Markdown", () => saveExport("markdown", item.id)],
    ["Export as JSON", () => saveExport("json", item.id)],
    ["Export as ShareGPT", () => saveExport("sharegpt", item.id)],
    ["Delete", () => deleteConversation(item)],
  ].filter(Boolean));
}

async function rename(item) {
  const title = await askText("Rename the conversation", "Title", item.title);
  if (title !== null && title !== item.title) await act("rename", { id: item.id, title });
}

async function putIntoFolder(item, folders) {
  const folder = await askText("Put into a folder", "Folder; a new name makes a new one", item.folder || "", { choices: folders });
  if (folder !== null) await act("move", { id: item.id, folder });
}

/** A menu of [label, run] entries: arrows move, Escape closes, focus goes back to the button. */
function openMenu(button, label, entries) {
  document.querySelector("#shell .menu")?.remove();
  const close = () => {
    menu.remove();
    document.removeEventListener("pointerdown", away, true);
  };
  const away = (event) => !menu.contains(event.target) && close();
  const menu = el("div", { class: "menu", role: "menu", "aria-label": label, onkeydown: (event) => move(event, menu, close, button) },
    ...entries.map(([text, run]) => el("button", { type: "button", role: "menuitem", onclick: () => {
      close();
      button.focus();
      run();
    } }, text)));
  document.getElementById("shell").append(menu);
  place(menu, button.getBoundingClientRect());
  document.addEventListener("pointerdown", away, true);
  menu.firstChild.focus();
}

function place(menu, from) {
  menu.style.top = `${Math.min(from.bottom + 4, innerHeight - menu.offsetHeight - 8)}px`;
  menu.style.left = `${Math.max(8, Math.min(from.left, innerWidth - menu.offsetWidth - 8))}px`;
}

function move(event, menu, close, button) {
  const all = [...menu.children];
  const at = all.indexOf(document.activeElement);
  const to = { ArrowDown: at + 1, ArrowUp: at - 1 + all.length, Home: 0, End: all.length - 1 }[event.key];
  if (to !== undefined) {
    event.preventDefault();
    all[to % all.length].focus();
  } else if (event.key === "Escape" || event.key === "Tab") {
    event.preventDefault();
    close();
    button.focus();
  }
}
