// Deleted conversations: each can be brought back, and removed for good only when that is asked for.

import { act } from "./api.js";
import { askSure, openDialog } from "./dialog.js";
import { el } from "./dom.js";

const DAY_MS = 86_400_000;

/** Show what was deleted. */
export async function openBin() {
  const body = el("div", { class: "sheet" });
  openDialog("Deleted conversations", body);
  draw(body, await act("bin"));
}

function draw(body, value) {
  if (!value) return;
  const { bin, kept_days: days } = value;
  const left = (item) => Math.max(0, Math.ceil((item.deleted_ms + days * DAY_MS - Date.now()) / DAY_MS));
  const restore = async (item) => draw(body, await act("restore", { id: item.id }));
  const purge = async (values, what) => {
    if (await askSure("Remove for good?", `${what} cannot be brought back afterwards.`, "Remove for good")) draw(body, await act("purge", values));
  };
  body.replaceChildren(
    el("p", {}, bin.length ? `They are kept for ${days} days.` : `Nothing is here. What you delete is kept for ${days} days.`),
    el("ul", { class: "bin" }, ...bin.map((item) => el("li", {},
      el("span", { class: "bin-title" }, item.title, el("span", { class: "help" }, `${left(item)} days left`)),
      el("button", { type: "button", class: "plain-button", onclick: () => restore(item) }, "Restore"),
      el("button", { type: "button", class: "plain-button", "aria-label": `Remove ${item.title} for good`,
        onclick: () => purge({ id: item.id }, `“${item.title}”`) }, "Remove")))),
    bin.length ? el("div", { class: "dialog-actions" },
      el("button", { type: "button", class: "main-button danger", onclick: () => purge({}, "Everything here") }, "Empty")) : "");
}
