// Markdown to DOM nodes. Model text never becomes markup: every character arrives as a text node, links are limited to
// http, https and mailto, and pictures are shown as links, because loading one would tell a stranger what is read.

import { copyText, el, iconButton } from "./dom.js";
import { highlight } from "./highlight.js";
import { formula } from "./math.js";
import { morph } from "./morph.js";

/** Keeps `target` showing `text`; what did not change keeps its nodes, so a growing answer costs the end of its last block. */
export function renderMarkdown(target, text) {
  const blocks = splitBlocks(text.replace(/\r\n?/g, "\n").split("\n"));
  const old = target.blocks || [];
  let same = 0;
  while (same < blocks.length && same < old.length && old[same].key === blocks[same].key) same += 1;
  // The first block that differs is the one that grew; those behind it are new.
  const grown = same < blocks.length ? old[same] : undefined;
  for (const block of old.slice(grown ? same + 1 : same)) block.node.remove();
  const shown = blocks.slice(same).map(({ key, build }, index) => (
    { key, node: grown && index === 0 ? morph(grown.node, build()) : target.appendChild(build()) }));
  target.blocks = [...old.slice(0, same), ...shown];
}

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`\s]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])( +|$)/;
const TABLE_RULE = /^ {0,3}\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const FORMULA = /^ {0,3}(\$\$|\\\[)/; // on lines of its own
const FORMULA_END = { "$$": "$$", "\\[": "\\]" };
const MAX_NESTING = 12;

/** Cut lines into blocks: each has the source it came from as `key`, and `build()` for its node. */
function splitBlocks(lines, depth = 0) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const [end, build] = readBlock(lines, at, depth);
    blocks.push({ key: lines.slice(at, end).join("\n"), build });
    at = end;
  }
  return blocks;
}

function readBlock(lines, at, depth) {
  const line = lines[at];
  if (FENCE.test(line)) return readFence(lines, at);
  if (FORMULA.test(line)) {
    const found = readFormula(lines, at);
    if (found) return found;
  }
  if (HEADING.test(line)) return [at + 1, () => buildHeading(line)];
  if (RULE.test(line)) return [at + 1, () => el("hr")];
  if (QUOTE.test(line) && depth < MAX_NESTING) return readQuote(lines, at, depth);
  if (ITEM.test(line) && depth < MAX_NESTING) return readList(lines, at, depth);
  if (line.includes("|") && TABLE_RULE.test(lines[at + 1] || "") && (lines[at + 1] || "").includes("-")) return readTable(lines, at);
  return readParagraph(lines, at);
}

function readFence(lines, at) {
  const [, mark, language] = lines[at].match(FENCE);
  const indent = lines[at].search(/\S/);
  let end = at + 1;
  while (end < lines.length && !isFenceEnd(lines[end], mark)) end += 1;
  const code = lines.slice(at + 1, end).map((line) => line.replace(new RegExp(`^ {0,${indent}}`), "")).join("\n");
  return [Math.min(end + 1, lines.length), () => buildCode(code, language)];
}

/** A formula that fills whole lines, up to its closing mark; null where that has not come or more text follows it. */
function readFormula(lines, at) {
  const close = FORMULA_END[lines[at].match(FORMULA)[1]];
  for (let end = at; end < lines.length && (end === at || lines[end].trim()); end += 1) {
    const text = end === at ? lines[end].trim().slice(2) : lines[end].trim();
    if (!text.includes(close)) continue;
    const source = lines.slice(at, end + 1).join("\n").trim();
    return text.endsWith(close) && text.indexOf(close) === text.length - 2 ? [end + 1, () => formula(source, true)] : null;
  }
  return null;
}

const isFenceEnd = (line, mark) => {
  const text = line.trim();
  return text.length >= mark.length && text === mark[0].repeat(text.length) && line.search(/\S/) < 4;
};

function buildCode(code, language) {
  const name = language.toLowerCase().replace(/[^a-z0-9+#.-]/g, "").slice(0, 20);
  const text = el("code", {}, ...highlight(code, name));
  const copy = iconButton("copy", "Copy code", () => copyText(text.textContent, copy)); // the block may have grown
  return el("div", { class: "code-block" },
    el("div", { class: "code-head" }, el("span", {}, name || "code"), copy),
    el("pre", { tabindex: "0", "aria-label": name ? `${name} code` : "code" }, text));
}

function buildHeading(line) {
  const [, marks, text] = line.match(HEADING);
  return el(`h${Math.min(marks.length + 2, 6)}`, {}, ...inline(text)); // h1 and h2 belong to the page
}

function readQuote(lines, at, depth) {
  let end = at;
  while (end < lines.length && (QUOTE.test(lines[end]) || (lines[end].trim() && !startsBlock(lines[end])))) end += 1;
  const inner = lines.slice(at, end).map((line) => line.replace(QUOTE, ""));
  return [end, () => el("blockquote", {}, ...build(inner, depth + 1))];
}

function readList(lines, at, depth) {
  const ordered = /\d/.test(lines[at].match(ITEM)[2]);
  const items = [];
  let end = at;
  while (end < lines.length) {
    const match = lines[end].match(ITEM);
    if (!match || /\d/.test(match[2]) !== ordered || RULE.test(lines[end])) break;
    const [itemEnd, item] = readItem(lines, end, match);
    items.push(item);
    end = itemEnd;
  }
  const start = ordered ? parseInt(lines[at].match(ITEM)[2], 10) : null;
  return [end, () => buildList(items, ordered, start, depth)];
}

/** One item: its first line, and what follows indented, or directly as the same paragraph. */
function readItem(lines, at, match) {
  const width = match[1].length + match[2].length + Math.max(1, Math.min(match[3].length, 4));
  const inner = [lines[at].slice(match[0].length)];
  let end = at + 1;
  while (end < lines.length) {
    const line = lines[end];
    const indent = line.search(/\S/);
    if (indent < 0) {
      const next = lines.slice(end).find((later) => later.trim());
      if (next === undefined || next.search(/\S/) < Math.min(width, 2)) {
        if (next === undefined || !ITEM.test(next)) break;
        end += 1;
        break;
      }
      inner.push("");
    } else if (indent >= Math.min(width, 2)) inner.push(line.slice(Math.min(indent, width)));
    else if (ITEM.test(line) || startsBlock(line) || !inner[inner.length - 1].trim()) break;
    else inner.push(line);
    end += 1;
  }
  return [end, inner];
}

function buildList(items, ordered, start, depth) {
  const list = el(ordered ? "ol" : "ul", { start: ordered && start !== 1 ? start : null });
  for (const lines of items) {
    const children = build(lines, depth + 1);
    // A tight item's lone paragraph would only add space.
    const flat = children.flatMap((child) => (child.tagName === "P" && !lines.includes("") ? [...child.childNodes] : [child]));
    list.append(el("li", {}, ...flat));
  }
  return list;
}

function readTable(lines, at) {
  let end = at + 2;
  while (end < lines.length && lines[end].trim() && lines[end].includes("|")) end += 1;
  const rows = [lines[at], ...lines.slice(at + 2, end)].map(cells);
  const sides = cells(lines[at + 1]).map(side);
  return [end, () => buildTable(rows, sides)];
}

const cells = (line) => line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replace(/\\\|/g, "|"));
const side = (rule) => (rule.endsWith(":") ? (rule.startsWith(":") ? "center" : "right") : null);

function buildTable([head, ...rows], sides) {
  const row = (tag, texts) => el("tr", {}, ...head.map((_, column) =>
    el(tag, { class: sides[column] ? `to-${sides[column]}` : null }, ...inline(texts[column] || ""))));
  return el("div", { class: "table-scroll", tabindex: "0" },
    el("table", {}, el("thead", {}, row("th", head)), el("tbody", {}, ...rows.map((texts) => row("td", texts)))));
}

function readParagraph(lines, at) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !startsBlock(lines[end])) end += 1;
  const text = lines.slice(at, end).map((line) => line.trimStart()).join("\n");
  return [end, () => el("p", {}, ...inline(text.trimEnd()))];
}

const startsBlock = (line) => FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line);

const build = (lines, depth) => splitBlocks(lines, depth).map((block) => block.build());

// Inline: the first alternative that matches wins; what matches none is text.
const INLINE = new RegExp(
  [
    /(\$\$[^$]+?\$\$|\\\[[^]+?\\\])/, // 1 formula on lines of its own
    /(\\\([^]+?\\\)|(?<![\w$\\])\$(?=[^\s$])(?:\\.|[^$\\\n])*?(?<=\S)\$(?![\w$]))/, // 2 formula
    /\\([!-/:-@[-`{-~])/, // 3 escaped punctuation
    /(`+)([^]*?[^`])\4(?!`)/, // 4 5 code
    /!\[([^\]\n]*)\]\(\s*<?([^\s)>]+)>?[^)\n]*\)/, // 6 7 picture
    /\[((?:[^[\]\n]|\[[^\]\n]*\])+)\]\(\s*<?([^\s)>]+)>?[^)\n]*\)/, // 8 9 link
    /<?(https?:\/\/[^\s<>"'`]*[^\s<>"'`.,;:!?)\]}*_])>?/, // 10 bare address
    /\*\*(?=\S)([^]*?\S)\*\*(?!\*)/, // 11 strong
    /(?<![\p{L}\p{N}])__(?=\S)([^]*?\S)__(?![\p{L}\p{N}])/, // 12 strong
    /\*(?=[^\s*])([^*]*?[^\s*])\*(?!\*)/, // 13 emphasis
    /(?<![\p{L}\p{N}_])_(?=[^\s_])([^_]*?[^\s_])_(?![\p{L}\p{N}_])/, // 14 emphasis
    /~~(?=\S)([^]*?\S)~~/, // 15 struck
    /( *\n)/, // 16 line break
  ].map((part) => part.source).join("|"),
  "gu",
);

function inline(text, depth = 0) {
  if (depth > MAX_NESTING) return [text];
  const nodes = [];
  let last = 0;
  for (const match of text.matchAll(INLINE)) {
    if (match.index > last) nodes.push(text.slice(last, match.index));
    nodes.push(inlineNode(match, depth + 1));
    last = match.index + match[0].length;
  }
  if (last < text.length) nodes.push(text.slice(last));
  return nodes;
}

function inlineNode(match, depth) {
  const [whole, display, within, escaped, , code, pictureText, pictureUrl, linkText, linkUrl, address, strong, strong2, em, em2, struck] = match;
  if (display !== undefined) return formula(display, true);
  if (within !== undefined) return formula(within, false);
  if (escaped !== undefined) return escaped;
  if (code !== undefined) return el("code", {}, code.replace(/\n/g, " ").replace(/^ (.*[^ ].*) $/, "$1"));
  if (pictureUrl !== undefined) return link(pictureUrl, [`🖼 ${pictureText || pictureUrl}`], whole);
  if (linkUrl !== undefined) return link(linkUrl, inline(linkText, depth), whole);
  if (address !== undefined) return link(address, [address], whole);
  if (strong !== undefined || strong2 !== undefined) return el("strong", {}, ...inline(strong ?? strong2, depth));
  if (em !== undefined || em2 !== undefined) return el("em", {}, ...inline(em ?? em2, depth));
  if (struck !== undefined) return el("del", {}, ...inline(struck, depth));
  return el("br");
}

function link(url, children, source) {
  if (!/^(https?:|mailto:)/i.test(url)) return source;
  return el("a", { href: url, target: "_blank", rel: "noopener noreferrer nofollow" }, ...children);
}
