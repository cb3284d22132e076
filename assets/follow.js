// Follows the running answer of the shown conversation, whichever page or tab began it, and tells the views.
//
// The stream is only looked at: closing it ends nothing. A hidden tab lets go, because a browser allows few connections
// to one server; when it is seen again it asks anew, and gets at least the present state.

import { shared } from "./shared.js";

const tabs = new BroadcastChannel("medusa-chat");
let source = null;
let pending = null; // what came since the last frame; drawn together, for a frame costs more than what is in it

/** Look at the shown conversation's answer; a stream that was open before is left. */
export function follow() {
  source?.close();
  source = pending = null;
  if (!shared.conversation || document.hidden) return;
  const conversation = shared.conversation;
  const opened = new EventSource(`/medusa/follow?conversation=${encodeURIComponent(conversation)}`);
  source = opened;
  opened.onmessage = (event) => {
    const value = JSON.parse(event.data);
    if (value.ended) opened.close();
    if (source === opened) expect(value, conversation);
  };
}

function expect(value, conversation) {
  if (!pending) {
    requestAnimationFrame(() => {
      const latest = pending;
      pending = null;
      if (latest && conversation === shared.conversation) tell(latest);
    });
  }
  pending = { ...pending, ...value };
}

function tell(value) {
  if (value.live !== undefined) shared.views.live?.(value.live); // first: the thread shows the live view over its own
  if (value.thread) shared.views.thread?.(value.thread);
  if (value.conversations) shared.views.conversations?.(value.conversations);
  if (value.ended) source = null;
}

/** A thread that came with an event of this page: follow what is to come of it, and let the other tabs look too. */
export function followIfRunning(thread) {
  if (!thread.is_awaited && !thread.messages.some((message) => message.status === "running")) return;
  follow();
  tabs.postMessage("an answer has begun");
}

tabs.onmessage = () => follow();
document.addEventListener("visibilitychange", () => follow());
