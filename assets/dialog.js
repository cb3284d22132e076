// Dialogs over the page: the browser's own, so that Escape closes them, focus stays inside and goes back afterwards.

import { el, iconButton } from "./dom.js";

/** Show `body` under a title; `side` puts it at the right edge. Returns {close, node}. */
export function openDialog(title, body, { side = false, onclose = null } = {}) {
  const heading = el("h2", { id: "dialog-title" }, title);
  const dialog = el("dialog", { class: side ? "dialog side" : "dialog", "aria-labelledby": "dialog-title" });
  dialog.append(el("div", { class: "dialog-head" }, heading, iconButton("close", "Close", () => dialog.close())), body);
  dialog.addEventListener("close", () => {
    dialog.remove();
    onclose?.();
  });
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close(); // the backdrop
  });
  document.getElementById("shell").append(dialog); // inside, so that the page's styles hold
  dialog.showModal();
  return { close: () => dialog.close(), node: dialog };
}

/** Ask for one line of text; resolves to it, or to null. `choices` are offered while typing. */
export function askText(title, label, value, { choices = [], confirm = "Save" } = {}) {
  return new Promise((resolve) => {
    let given = null;
    const input = el("input", { type: "text", id: "dialog-text", maxlength: "200", list: "dialog-choices", autocomplete: "off" });
    input.value = value;
    const form = el("form", { class: "ask", onsubmit: (event) => {
      event.preventDefault();
      given = input.value;
      dialog.close();
    } },
    el("label", { for: "dialog-text" }, label), input,
    el("datalist", { id: "dialog-choices" }, ...choices.map((choice) => el("option", { value: choice }))),
    el("div", { class: "dialog-actions" },
      el("button", { type: "button", class: "plain-button", onclick: () => dialog.close() }, "Cancel"),
      el("button", { type: "submit", class: "main-button" }, confirm)));
    const dialog = openDialog(title, form, { onclose: () => resolve(given) });
    input.select();
  });
}

/** Ask before something that cannot be undone; resolves to whether it was confirmed. */
export function askSure(title, text, confirm) {
  return new Promise((resolve) => {
    let sure = false;
    const yes = () => {
      sure = true;
      dialog.close();
    };
    const dialog = openDialog(title, el("div", { class: "ask" }, el("p", {}, text),
      el("div", { class: "dialog-actions" },
        el("button", { type: "button", class: "plain-button", autofocus: true, onclick: () => dialog.close() }, "Cancel"),
        el("button", { type: "button", class: "main-button danger", onclick: yes }, confirm))), { onclose: () => resolve(sure) });
  });
}
