// What a search found: titles and passages, with the words that were looked for marked.

import { el } from "./dom.js";

const MARK = /\u0002([^\u0003]*)\u0003/g;

/** Elements for the hits; `choose` gets the one that was clicked. */
export function drawHits(hits, choose) {
  if (hits.length === 0) return [el("p", { class: "list-note", role: "status" }, "Nothing was found. Words may be the beginnings of words.")];
  const count = hits.length === 1 ? "1 conversation" : `${hits.length} conversations`;
  return [
    el("h2", { id: "hits", role: "status" }, count),
    el("ul", { class: "hits", "aria-labelledby": "hits" }, ...hits.map((hit) =>
      el("li", {}, el("button", { type: "button", class: "conversation hit", onclick: () => choose(hit) },
        el("span", { class: "hit-title" }, ...marked(hit.title || "New chat")),
        hit.snippet ? el("span", { class: "hit-text" }, ...marked(hit.snippet)) : null)))),
  ];
}

/** Text with its marks as elements; it never becomes markup. */
function marked(text) {
  const nodes = [];
  let last = 0;
  for (const match of text.matchAll(MARK)) {
    nodes.push(text.slice(last, match.index), el("mark", {}, match[1]));
    last = match.index + match[0].length;
  }
  return [...nodes, text.slice(last)];
}
