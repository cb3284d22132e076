// Colours for code: comments, texts, numbers and the words that a language keeps to itself. One pass of one expression,
// whose parts are told apart by their group; what matches none stays as it is. Everything goes in as text nodes.

import { el } from "./dom.js";

const C_LIKE = "as async await bool boolean break case catch char class const continue default delete do double else enum export extends extern final finally float for from func function go goto if implements import in instanceof int interface let long new null nullptr operator override package private protected public return short signed sizeof static struct super switch template this throw try type typedef typename typeof union unsigned using var virtual void volatile while yield true false undefined fn impl mut pub trait use where match mod crate self Self string namespace abstract defer chan map range select val fun when object";
const LANGUAGES = {
  python: ["False None True and as assert async await break class continue def del elif else except finally for from global if import in is lambda match nonlocal not or pass raise return try while with yield self print", "#"],
  shell: ["if then else elif fi for in do done while until case esac function return export local echo cd exit set sudo source", "#"],
  sql: ["select from where insert into values update set delete create table index view drop alter join left right inner outer on group by order having limit offset as and or not null is in like between union all distinct primary key references with case when then else end", "--"],
  ruby: ["def end if elsif else unless while until for in do class module return yield begin rescue ensure raise nil true false self require include and or not puts attr_accessor lambda", "#"],
  lua: ["and break do else elseif end false for function if in local nil not or repeat return then true until while", "--"],
  haskell: ["case class data deriving do else if import in infix infixl infixr instance let module newtype of then type where", "--"],
  yaml: ["true false null yes no on off", "#"],
  c: [C_LIKE, "//"],
};
const NAMES = {
  py: "python", python3: "python", bash: "shell", sh: "shell", zsh: "shell", console: "shell", r: "python", rb: "ruby", hs: "haskell",
  yml: "yaml", toml: "yaml", ini: "yaml", dockerfile: "shell", makefile: "shell", postgresql: "sql", sqlite: "sql",
};
for (const name of ["js", "javascript", "jsx", "ts", "typescript", "tsx", "java", "kotlin", "kt", "swift", "go", "rust", "rs", "c", "h", "cpp", "c++", "cc", "hpp", "cs", "csharp", "c#", "php", "scala", "dart", "css", "json", "zig"]) NAMES[name] = "c";
const MAX_LENGTH = 20_000; // beyond, colour costs more than it helps
const known = new Map();

/** Nodes for `code`; plain text for a language that is not known. */
export function highlight(code, language) {
  const name = LANGUAGES[language] ? language : NAMES[language];
  if (!name || code.length > MAX_LENGTH) return [code];
  const { pattern, words, fold } = rules(name);
  const nodes = [];
  let last = 0;
  for (const match of code.matchAll(pattern)) {
    const [text, comment, string, number, word] = match;
    const kind = comment ? "comment" : string ? "string" : number ? "number" : kindOf(word, words, fold, code, match.index);
    if (!kind) continue;
    if (match.index > last) nodes.push(code.slice(last, match.index));
    nodes.push(el("span", { class: `code-${kind}` }, text));
    last = match.index + text.length;
  }
  nodes.push(code.slice(last));
  return nodes;
}

function kindOf(word, words, fold, code, index) {
  if (words.has(fold ? word.toLowerCase() : word)) return "word";
  return code[index + word.length] === "(" ? "call" : null;
}

function rules(name) {
  if (known.has(name)) return known.get(name);
  const [words, line] = LANGUAGES[name];
  const comment = name === "c" ? "\\/\\/[^\\n]*|\\/\\*[^]*?(?:\\*\\/|$)" : `(?<![^\\s;(])${line}[^\\n]*`;
  const long = name === "python" ? '"""[^]*?(?:"""|$)|\'\'\'[^]*?(?:\'\'\'|$)|' : "";
  const string = `${long}"(?:\\\\.|[^"\\\\\\n])*"?|'(?:\\\\.|[^'\\\\\\n])*'?${name === "c" ? "|`(?:\\\\.|[^`\\\\])*`?" : ""}`;
  const number = "\\b(?:0[xX][\\da-fA-F_]+|\\d[\\d_]*(?:\\.\\d+)?(?:[eE][+-]?\\d+)?)\\b";
  const made = {
    pattern: new RegExp(`(${comment})|(${string})|(${number})|([A-Za-z_]\\w*)`, "g"),
    words: new Set(words.split(" ")),
    fold: name === "sql",
  };
  known.set(name, made);
  return made;
}
