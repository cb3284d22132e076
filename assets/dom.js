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
  sliders: "M4 8h9M17 8h3M15 6v4M4 16h3M11 16h9M9 14v4",
  search: "M10.5 4a6.5 6.5 0 1 1 0 13 6.5 6.5 0 0 1 0-13ZM15.5 15.5 20 20",
  more: "M5 12h.01M12 12h.01M19 12h.01",
  pin: "M9 4h6l-1 6 3 3v1.5H7V13l3-3-1-6ZM12 14.5V20",
  edit: "M4 20h4L19 9l-4-4L4 16v4ZM13 7l4 4",
  again: "M5 12a7 7 0 0 1 12-5l2 2M19 4v5h-5M19 12a7 7 0 0 1-12 5l-2-2M5 20v-5h5",
  onward: "M5 6v12l8-6-8-6ZM17 6v12",
  left: "M14 6l-6 6 6 6",
  right: "M10 6l6 6-6 6",
  info: "M12 4a8 8 0 1 1 0 16 8 8 0 0 1 0-16ZM12 11v5M12 8h.01",
  bin: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13",
  folder: "M4 6h5l2 2h9v11H4V6Z",
  transfer: "M8 4v14m0 0-4-4m4 4 4-4M16 20V6m0 0-4 4m4-4 4 4",
  keyboard: "M3 7h18v10H3V7ZM7 10h.01M11 10h.01M15 10h.01M7 14h10",
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
