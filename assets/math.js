// Formulas, set by the KaTeX that Gradio brings along: nothing is fetched from outside, and until it is here (or where it
// is missing) the source stands in its place. KaTeX gets no trust: no links, pictures or classes from a formula.

import { el } from "./dom.js";

let loading = null;
let katex = null;

/** An element for a formula; `display` puts it on lines of its own. */
export function formula(source, display) {
  const node = el(display ? "div" : "span", { class: display ? "formula display" : "formula", tabindex: display ? "0" : null }, source);
  if (katex) set(node, source, display);
  else load().then((ready) => ready && set(node, source, display));
  return node;
}

function set(node, source, display) {
  const tex = source.replace(/^(\$\$|\$|\\\(|\\\[)|(\$\$|\$|\\\)|\\\])$/g, "");
  try {
    katex.render(tex, node, { displayMode: display, throwOnError: true, trust: false, strict: "ignore", maxSize: 20, maxExpand: 300 });
  } catch {
    node.textContent = source; // half a formula while it streams, or none at all
  }
}

function load() {
  loading ||= import("/medusa/katex.js").then((module) => {
    document.head.append(el("link", { rel: "stylesheet", href: "/medusa/katex.css" }));
    katex = module.default;
    return true;
  }).catch(() => false);
  return loading;
}
