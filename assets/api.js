// The page's own requests: one JSON object in, new values for the views out. A refusal is a sentence above the text box.

import { el } from "./dom.js";
import { shared } from "./shared.js";

const tabs = new BroadcastChannel("medusa-chat-list");

/** Ask for `name`; the views it changed are shown, and the answer is returned, or null after a refusal. */
export async function act(name, values = {}) {
  const body = JSON.stringify(values);
  return take(await send(`/medusa/do/${name}`, { method: "POST", headers: { "content-type": "application/json" }, body }));
}

/** Import a file of conversations; `say` gets the sentence about it. Null after a refusal. */
export async function importFile(file, say) {
  const value = await send("/medusa/import", { method: "POST", body: file });
  say(value.error || value.said);
  return value.error ? null : take({ ...value, said: "" });
}

async function send(address, options) {
  try {
    const answer = await fetch(address, options);
    const value = await answer.json();
    return answer.ok ? value : { error: value.error || `The app answered with status ${answer.status}; reload the page.` };
  } catch {
    return { error: "The app does not answer; start it again and reload this page." };
  }
}

function take(value) {
  if (value.error || value.said) notify(value.error || value.said, { calm: !value.error });
  if (value.error) return null;
  if (value.conversations) {
    shared.views.conversations?.(value.conversations);
    tabs.postMessage(value.conversations);
  }
  if (value.live !== undefined) shared.views.live?.(value.live); // first: the thread shows the live view over its own
  if (value.thread) shared.views.thread?.(value.thread);
  return value;
}

/** Say something where the person looks: in the open dialog, or else above the text box; `action` is {label, run}. */
export function notify(text, { calm = true, action = null } = {}) {
  const dialog = document.querySelector("dialog[open]");
  if (dialog) {
    dialog.querySelector(".dialog-said")?.remove();
    dialog.firstChild.append(el("p", { class: calm ? "dialog-said" : "dialog-said refused", role: calm ? "status" : "alert" }, text));
    return;
  }
  shared.views.notice?.({ text, calm, action });
}

tabs.onmessage = (event) => shared.views.conversations?.(event.data);
