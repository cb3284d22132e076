// What the views share: which conversation is shown, the running answer, the theme, and the parts that can be folded.

export const shared = {
  conversation: null, // id of the one shown; "" is the empty page, null is before the first answer of the server
  thread: null, // the latest value of the thread
  wanted: "", // id that the next "select" asks for
  live: null, // the latest value of the live view
  views: {}, // by name: the function that shows a new value
  listeners: new Map(),

  /** Call `listener` on each `topic` message. */
  on(topic, listener) {
    if (!this.listeners.has(topic)) this.listeners.set(topic, []);
    this.listeners.get(topic).push(listener);
  },

  tell(topic, value) {
    for (const listener of this.listeners.get(topic) || []) listener(value);
  },
};

/** The page's own root; classes on it fold the sidebar and the panel. */
export const root = document.documentElement;

export const recall = (key) => {
  try {
    return localStorage.getItem(key);
  } catch {
    return null; // storage may be blocked; the page works without memory
  }
};

export const remember = (key, value) => {
  try {
    if (value === null) localStorage.removeItem(key);
    else localStorage.setItem(key, value);
  } catch {
    // see above
  }
};

/** Apply a theme: "light", "dark", or null for the system's. */
export function setTheme(theme) {
  const dark = theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.body.classList.toggle("dark", dark);
  root.dataset.theme = dark ? "dark" : "light";
  if (theme) remember("medusa-theme", theme);
  shared.tell("theme", dark);
}

export const currentTheme = () => root.dataset.theme;

/** Fold or unfold "sidebar" or "panel"; what was chosen on a wide screen is kept. */
export function setOpen(part, open) {
  root.dataset[part] = open ? "open" : "closed";
  if (!narrow.matches) remember(`medusa-${part}`, root.dataset[part]);
  shared.tell(part, open);
}

export const isOpen = (part) => root.dataset[part] === "open";

export const narrow = matchMedia("(max-width: 1099px)");

function start() {
  setTheme(recall("medusa-theme"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => setTheme(recall("medusa-theme")));
  const adapt = () => {
    for (const part of ["sidebar", "panel"]) setOpen(part, !narrow.matches && recall(`medusa-${part}`) !== "closed");
  };
  adapt();
  narrow.addEventListener("change", adapt);
  // Gradio sets its own theme class once when it starts; ours is the one that was chosen.
  new MutationObserver(() => {
    if (document.body.classList.contains("dark") !== (currentTheme() === "dark")) setTheme(currentTheme());
  }).observe(document.body, { attributes: true, attributeFilter: ["class"] });
}

start();
