// Small helpers to build the page's own drawings. Text always goes in as text: nothing here parses markup.

const SVG = "http://www.w3.org/2000/svg";

/** Build an HTML element: `el("p", {class: "x", onclick: f}, "text", child)`. Null children are left out. */
export function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** Build an SVG element. */
export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** Set text only where it differs, so that a quiet update touches nothing. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

const ICONS = {
  plus: "M12 5v14M5 12h14",
  menu: "M4 7h16M4 12h16M4 17h10",
  sun: "M12 4V2.5M12 21.5V20M4 12H2.5M21.5 12H20M6.3 6.3 5.3 5.3M18.7 18.7l-1-1M17.7 6.3l1-1M5.3 18.7l1-1M12 8a4 4 0 1 1 0 8 4 4 0 0 1 0-8Z",
  moon: "M19.5 14.5A8 8 0 0 1 9.5 4.5a8 8 0 1 0 10 10Z",
  tree: "M5 12h4m0 0c3 0 2.5-6 6-6m-6 6h6m-6 0c3 0 2.5 6 6 6M17 6h2m-2 6h2m-2 6h2M4 12h.01",
  copy: "M9 9h10v11H9zM5 15V4h10",
  check: "M5 12.5 10 17.5 19.5 7",
  down: "M12 5v14m-6-6 6 6 6-6",
  close: "M6 6l12 12M18 6 6 18",
  warning: "M12 4 21 19.5H3L12 4Zm0 6v4.5M12 17h.01",
};

/** A line icon, decoration only: the button around it carries the name. */
export function icon(name) {
  return svg(
    "svg",
    { viewBox: "0 0 24 24", class: "icon", "aria-hidden": "true", fill: "none", stroke: "currentColor",
      "stroke-width": "1.7", "stroke-linecap": "round", "stroke-linejoin": "round" },
    svg("path", { d: ICONS[name] }),
  );
}

/** An icon button with a name for everyone. */
export function iconButton(name, label, onclick, attributes = {}) {
  return el("button", { type: "button", class: "icon-button", "aria-label": label, title: label, onclick, ...attributes }, icon(name));
}

/** Copy text and let the button say so for a moment. */
export async function copyText(text, button) {
  await navigator.clipboard.writeText(text);
  const before = button.firstChild;
  button.replaceChildren(icon("check"));
  button.classList.add("done");
  setTimeout(() => {
    button.replaceChildren(before);
    button.classList.remove("done");
  }, 1200);
}
