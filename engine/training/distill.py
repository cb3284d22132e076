"""Self-distillation: keep every slot of the decoder busy with conversations and write what is kept.

The host looks at the slots a few steps behind the device: while it decides how ended turns go on, the next steps are
already queued.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engine.models.tokenizer import ChatTokenizer
from engine.training.batch_decoder import BatchDecoder, Placement, Snapshot
from engine.training.chat_format import ChatFormat
from engine.training.dialogues import Dialogue, Script
from engine.training.filters import QueryFilter
from engine.training.shards import Document, ShardWriter, read_documents

__all__ = ["DistillGoal", "answer_all", "distill", "remember_queries"]

POLL_STEPS = 8
REPORT_SECONDS = 5.0


@dataclass(frozen=True)
class DistillGoal:
    """When to stop: `tokens` kept in all (earlier runs included), or after `seconds`."""

    tokens: int
    seconds: float = float("inf")


class _Floor:
    """Which conversation is in which slot, and since which round."""

    def __init__(self, decoder: BatchDecoder, script: Script) -> None:
        self.decoder, self.script = decoder, script
        self.dialogues: dict[int, Dialogue] = {}
        self.changed = [-1] * decoder.slots

    def open(self) -> None:
        started = (self._start(slot) for slot in range(self.decoder.slots))
        self.decoder.place([item for item in started if item is not None])

    def attend(self, snapshot: Snapshot, taken: int, now: int) -> None:
        """Let every turn that had ended in round `taken` go on; what is placed counts from round `now`."""
        snapshot.wait()
        placements = []
        for slot in snapshot.is_done.nonzero().flatten().tolist():
            if self.changed[slot] >= taken or slot not in self.dialogues:
                continue
            text = snapshot.tokens[slot, : int(snapshot.position[slot]) + 1].tolist()
            placement = self.script.go_on(slot, self.dialogues[slot], text)
            if placement is None:
                del self.dialogues[slot]
                placement = self._start(slot)
            if placement is not None:
                placements.append(placement)
                self.changed[slot] = now
        self.decoder.place(placements)

    def close(self, snapshot: Snapshot, taken: int) -> None:
        """Keep what unfinished conversations have."""
        snapshot.wait()
        for slot, dialogue in self.dialogues.items():
            if self.changed[slot] < taken:
                length = int(snapshot.position[slot]) + 1
                self.script.cut_short(dialogue, snapshot.tokens[slot, :length].tolist())

    def _start(self, slot: int) -> Placement | None:
        started = self.script.start(slot)
        if started is None:
            return None
        self.dialogues[slot], placement = started
        return placement


def distill(
    decoder: BatchDecoder, script: Script, writer: ShardWriter, goal: DistillGoal, report: Callable[[str], None]
) -> None:
    """Generate until the goal is reached or the given prompts are used up; the writer then holds all that was kept."""
    script.keep = writer.add
    floor = _Floor(decoder, script)
    start, reported, before = time.monotonic(), 0.0, writer.num_tokens
    wanted = f" of {goal.tokens:,}" if goal.tokens < sys.maxsize else ""  # prompts from a file may be all there is
    floor.open()
    waiting: Snapshot | None = None
    round_number = 0
    while True:
        decoder.run(POLL_STEPS)
        taken = decoder.snapshot()
        if waiting is not None:
            floor.attend(waiting, round_number - 1, round_number)
        waiting, round_number = taken, round_number + 1
        seconds = time.monotonic() - start
        is_over = writer.num_tokens >= goal.tokens or seconds >= goal.seconds or not floor.dialogues
        if is_over or seconds - reported >= REPORT_SECONDS:
            reported = seconds
            made = writer.num_tokens - before
            report(
                f"{writer.num_tokens:,}{wanted} tokens kept ({writer.num_labels:,} answered), "
                f"{made / max(seconds, 1e-9):,.0f} tokens/s, {round_number * POLL_STEPS} steps, "
                f"{script.num_rejected:,} turns rejected, {len(floor.dialogues)} open"
            )
        if is_over:
            break
    floor.close(waiting, round_number - 1)
    writer.flush()


def answer_all(decoder: BatchDecoder, script: Script) -> list[Document]:
    """Answer all prompts given to `script` and return the conversations, in the order in which they ended."""
    documents: list[Document] = []
    script.keep = documents.append
    floor = _Floor(decoder, script)
    floor.open()
    round_number = 0
    while floor.dialogues:
        decoder.run(POLL_STEPS)
        floor.attend(decoder.snapshot(), round_number, round_number)
        round_number += 1
    return documents


def remember_queries(folder: Path, queries: QueryFilter, tokenizer: ChatTokenizer, chat: ChatFormat) -> None:
    """Take the first queries of earlier runs as seen."""
    opening = len(chat.default_opening)
    for document in read_documents(folder):
        stop = document.spans[0][0] - len(chat.to_answer) - 1
        queries.remember(tokenizer.decode(document.tokens[opening:stop]))
