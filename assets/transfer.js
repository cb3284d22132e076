// Export of everything and import of files, chosen or dropped onto the dialog.

import { importFile } from "./api.js";
import { openDialog } from "./dialog.js";
import { el } from "./dom.js";

const FORMATS = [
  ["json", "JSON", "Everything, with branches, settings and figures; this app reads it back."],
  ["markdown", "Markdown", "To read or print: the branches that are shown."],
  ["sharegpt", "ShareGPT", "To train a model with: the branches that are shown."],
];

/** Save one conversation, or all without an id, as a file of the browser's. */
export function saveExport(format, conversation = "") {
  const address = `/medusa/export?${new URLSearchParams({ format, conversation })}`;
  const link = el("a", { href: address, download: "" });
  document.body.append(link);
  link.click();
  link.remove();
}

/** Show the dialog. */
export function openTransfer() {
  const said = el("p", { role: "status" });
  const file = el("input", { type: "file", id: "import-file", accept: ".json,.jsonl,.zip", onchange: () => {
    load([...file.files], said);
    file.value = ""; // so that the same file can be chosen again
  } });
  const body = el("div", { class: "sheet",
    ondragover: (event) => event.preventDefault(),
    ondrop: (event) => {
      event.preventDefault();
      load([...event.dataTransfer.files], said);
    } },
  el("h3", {}, "Export all conversations"),
  el("ul", { class: "formats" }, ...FORMATS.map(([format, name, help]) => el("li", {},
    el("span", {}, el("strong", {}, name), el("span", { class: "help" }, help)),
    el("button", { type: "button", class: "plain-button", "aria-label": `Save as ${name}`, onclick: () => saveExport(format) }, "Save")))),
  el("h3", {}, "Import"),
  el("label", { for: "import-file" }, "A file of this app (JSON), ShareGPT (JSON or JSON lines), or ChatGPT's export (the zip or its conversations.json). What is here already is not added twice."),
  file, said);
  openDialog("Import and export", body);
}

async function load(files, said) {
  for (const file of files) {
    said.textContent = `Reading ${file.name}…`;
    const answer = await importFile(file, (sentence) => {
      said.textContent = sentence;
    });
    said.className = answer ? "" : "refused";
  }
}
