// What is typed and not sent yet, kept in this browser by conversation: it survives a reload and a look elsewhere.

import { recall, remember, shared } from "./shared.js";

const key = () => `medusa-draft-${shared.conversation || "new"}`;
const box = () => document.querySelector("#composer-text textarea");

/** Put text into the text box as if it had been typed; Gradio learns of it by the event. */
export function fillComposer(text) {
  const target = box();
  if (!target || target.value === text) return;
  target.value = text;
  target.dispatchEvent(new Event("input", { bubbles: true }));
}

document.addEventListener("input", (event) => {
  if (event.target === box()) remember(key(), event.target.value || null);
});

// What has become a message is no draft any more, neither here nor on the empty page where it may have begun.
shared.on("thread", (value) => {
  const said = value.messages.findLast((message) => message.role === "user")?.content;
  for (const place of ["medusa-draft-new", key()]) if (said && recall(place)?.trim() === said) remember(place, null);
});

shared.on("conversation", () => fillComposer(recall(key()) || ""));
