// The keyboard: one list of shortcuts, from which both the keys and their help are made.

import { openDialog } from "./dialog.js";
import { el } from "./dom.js";
import { openSettings } from "./settings.js";
import { isOpen, setOpen, shared } from "./shared.js";

const composer = () => document.querySelector("#composer-text textarea");
const last = (selector) => [...document.querySelectorAll(selector)].at(-1);

// [shown, help, matches, run]; without a function it is the browser's or the text box's own.
const SHORTCUTS = [
  ["Enter", "Send the message"],
  ["Shift+Enter", "New line"],
  ["Alt+N", "New chat", alt("KeyN"), () => shared.open("")],
  ["/", "Go to the text box", plain("/"), () => composer()?.focus()],
  ["Alt+S", "Search", alt("KeyS"), focusSearch],
  ["Escape", "Stop the answer", (event) => event.key === "Escape" && running() && !document.querySelector("dialog[open], .menu"), () => document.getElementById("stop")?.click()],
  ["Alt+R", "Answer again", alt("KeyR"), () => last("[data-act='regenerate']")?.click()],
  ["Alt+E", "Edit the last message", alt("KeyE"), () => last("[data-act='edit']")?.click()],
  ["Alt+← →", "Other versions of the last message", null, null],
  ["Alt+M", "Medusa on or off", alt("KeyM"), () => document.querySelector("#medusa-switch input")?.click()],
  ["Alt+C", "Copy the last answer", alt("KeyC"), () => last(".message.assistant [data-act='copy']")?.click()],
  ["Alt+,", "Settings of the conversation", alt("Comma"), openSettings],
  ["Alt+L", "Show or hide the conversations", alt("KeyL"), () => setOpen("sidebar", !isOpen("sidebar"))],
  ["Alt+P", "Show or hide Medusa at work", alt("KeyP"), () => setOpen("panel", !isOpen("panel"))],
  ["F2 · Delete", "Menu of the conversation, delete it (in the list)"],
  ["?", "This list", plain("?"), openShortcuts],
];

function alt(code) {
  return (event) => event.altKey && !event.ctrlKey && !event.metaKey && event.code === code;
}

/** A plain character, unless someone is typing. */
function plain(key) {
  return (event) => event.key === key && !event.ctrlKey && !event.metaKey && !event.altKey && !isTyping(event.target);
}

const isTyping = (node) => node.matches?.("input:not([type='checkbox'], [type='radio'], [type='range']), textarea, select");
const running = () => document.documentElement.dataset.running === "yes";

function focusSearch() {
  setOpen("sidebar", true);
  document.getElementById("search")?.focus();
}

/** Show the list. */
export function openShortcuts() {
  if (document.querySelector("dialog[open]")) return;
  openDialog("Keyboard shortcuts", el("div", { class: "sheet" }, el("dl", { class: "shortcuts" },
    ...SHORTCUTS.map(([keys, help]) => el("div", {}, el("dt", {}, el("kbd", {}, keys)), el("dd", {}, help))))));
}

document.addEventListener("keydown", (event) => {
  const found = SHORTCUTS.find(([, , matches]) => matches?.(event));
  if (found) {
    event.preventDefault();
    found[3]();
  } else if (event.altKey && (event.key === "ArrowLeft" || event.key === "ArrowRight") && last(".branch-step")) {
    event.preventDefault(); // or the browser would leave the page
    last(`.branch-step[data-step="${event.key === "ArrowLeft" ? -1 : 1}"]`)?.click();
  }
});
