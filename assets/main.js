// The page's scripts start here: the views that gr.HTML components mount, and what they share.

import { mountConversations } from "./conversations.js";
import { startEngine } from "./engine.js";
import { followIfRunning } from "./follow.js";
import { mountLive } from "./live.js";
import { mountNotice, mountStatus } from "./status.js";
import { startRace } from "./race.js";
import { mountThread } from "./thread.js";
import { currentSettings, startSettings } from "./settings.js";
import { startTokens } from "./tokens.js";
import { mountTools } from "./tools.js";
import { shared } from "./shared.js";

const VIEWS = {
  conversations: mountConversations,
  live: mountLive,
  notice: mountNotice,
  status: mountStatus,
  thread: mountThread,
  tools: mountTools,
};

/** Called by each gr.HTML once: build the view, then follow its value. */
function mount(name, component) {
  window.endLoading();
  const update = (shared.views[name] = VIEWS[name](component));
  const show = () => {
    const value = component.props.value ? JSON.parse(component.props.value) : null;
    update(value);
    if (name === "thread" && value) followIfRunning(value);
  };
  component.watch("value", show);
  show();
}

startSettings();
startEngine();
startTokens();
startRace();
window.MedusaChat = { mount, wanted: () => shared.wanted, settings: currentSettings };
window.dispatchEvent(new Event("medusa-chat-ready"));
