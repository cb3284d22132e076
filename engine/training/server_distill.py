"""Distillation by a server: its answers become the same documents as the model's own.

Text comes back, not tokens, so an answer is encoded here; one in which a special token is written out is not kept, as
nobody could tell it from a real one.
"""

import time
from collections.abc import Sequence
from random import Random

from engine.models.tokenizer import ChatTokenizer
from engine.training.chat_format import read_chat_format
from engine.training.cli_options import Report
from engine.training.dialogues import DialoguePlan
from engine.training.distill import DistillGoal
from engine.training.filters import repetition
from engine.training.prompt_file import Message
from engine.training.server_answers import ChatServer, Question, ServerAnswer, ask_all
from engine.training.shards import Document, ShardWriter

__all__ = ["ServerDistiller"]

_REPORT_SECONDS = 5.0


class ServerDistiller:
    """Has a server answer prompts. Greedy or sampled is drawn by prompt, so a run that goes on draws the same."""

    def __init__(
        self, server: ChatServer, tokenizer: ChatTokenizer, plan: DialoguePlan, *, at_once: int, seed: int
    ) -> None:
        self._server, self._tokenizer, self._plan = server, tokenizer, plan
        self._at_once, self._seed = at_once, seed
        self._end_token = read_chat_format(tokenizer).end_token

    def run(
        self, prompts: Sequence[tuple[int, list[Message]]], writer: ShardWriter, goal: DistillGoal, report: Report
    ) -> None:
        """Answer until the prompts are used up or the goal is reached; whatever ends it, what came is kept."""
        started, reported, done = time.monotonic(), 0.0, 0
        try:
            for answer in ask_all(self._server, [self._question(*prompt) for prompt in prompts], self._at_once):
                document = self._document(answer)
                if document is None:
                    writer.reject(answer.question.source)
                else:
                    writer.add(document)
                done += 1
                seconds = time.monotonic() - started
                if seconds - reported >= _REPORT_SECONDS or done == len(prompts):
                    reported = seconds
                    report(f"{done:,} of {len(prompts):,} prompts, {writer.num_tokens:,} tokens kept")
                if writer.num_tokens >= goal.tokens or seconds >= goal.seconds:
                    break
        finally:
            writer.flush()

    def _question(self, number: int, messages: list[Message]) -> Question:
        is_greedy = Random(self._seed * 1_000_003 + number).random() < self._plan.greedy_share
        temperature = 0.0 if is_greedy else self._plan.answer_temperature
        return Question(number, messages, temperature, self._plan.max_answer)

    def _document(self, answer: ServerAnswer) -> Document | None:
        """Return the conversation, or None where the answer is empty, repeats itself or writes special tokens out."""
        prompt = self._tokenizer.encode_chat(answer.question.messages)
        said = self._tokenizer.encode(answer.text)
        if not said or any(not self._tokenizer.token_bytes(token) for token in said):
            return None
        if answer.is_complete:
            said.append(self._end_token)
        if repetition(said, 4) > self._plan.max_repetition:
            return None
        tokens = [*prompt, *said]
        return Document(tokens, [(len(prompt), len(tokens))], answer.question.temperature == 0, answer.question.source)
