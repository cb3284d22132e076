// What the engine says of itself and what this machine's answers showed: asked for when the model is ready and after
// each answer, because both change with every answer.

import { shared } from "./shared.js";

let running = false;

/** Follow the answers' ends. */
export function startEngine() {
  shared.on("live", (live) => {
    const now = ["running", "waiting"].includes(live?.status);
    if (running && !now) refreshEngine();
    running = now;
  });
  shared.on("status", (status) => status?.phase === "ready" && refreshEngine());
}

/** Ask anew and tell every view. */
export async function refreshEngine() {
  const answer = await fetch("/medusa/engine").catch(() => null);
  if (answer?.ok) shared.tell("engine", (shared.engine = await answer.json()));
}
