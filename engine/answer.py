"""One answer as it grows: tokens, text, where it ends, and the figures of its record."""

import time
from collections.abc import Sequence
from dataclasses import replace

from engine.models.tokenizer import ChatTokenizer, StreamDecoder
from engine.records import DecodeStep, GenerationChunk, GenerationResult
from engine.runner import Runner
from engine.stops import StopBuffer

__all__ = ["AnswerRecord"]


class AnswerRecord:
    """Collects steps until an end token, a stop string or `max_tokens`; a run of accepted tokens is cut exactly there.

    `tokens` are those given out so far: with stop strings, a token waits until it is certain that it stays.
    """

    def __init__(self, tokenizer: ChatTokenizer, max_tokens: int, started: float, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer)
        self._buffer = StopBuffer(stops)
        self._room = max_tokens
        self._started = self._first_at = self._last_at = started
        self._text: list[str] = []
        self._accepted: list[int] = []
        self._depth = 0
        self.tokens: list[int] = []
        self.finish_reason: str | None = None

    def first(self, token: int) -> GenerationChunk:
        """Take the prefill's token."""
        self._first_at = self._last_at = time.perf_counter()
        return self._take([token], None)

    def add(self, step: DecodeStep) -> GenerationChunk:
        """Take one decode step's tokens."""
        self._last_at = time.perf_counter()
        self._accepted.append(step.num_accepted)
        return self._take(step.tokens, step)

    def finish(
        self, *, prompt_tokens: int, cached_tokens: int, medusa: bool, tree_nodes: int, runner: Runner, seed: int
    ) -> GenerationChunk:
        """Close the record; an answer that nothing ended was cancelled."""
        rest = self._release(None, is_over=True)
        if not self._buffer.is_found:  # or what is left belongs to the stop string
            rest = replace(rest, text=rest.text + self._decoder.finish())
        self._text.append(rest.text)
        seconds = self._last_at - self._first_at
        steps = len(self._accepted)
        result = GenerationResult(
            text="".join(self._text),
            tokens=tuple(self.tokens),
            prompt_tokens=prompt_tokens,
            cached_tokens=cached_tokens,
            finish_reason=self.finish_reason or "cancelled",
            medusa=medusa,
            steps=steps,
            tokens_per_step=1 + sum(self._accepted) / steps if steps else 1.0,
            acceptance_by_depth=acceptance_by_depth(self._accepted),
            tree_nodes=tree_nodes,
            tokens_per_second=max(0, len(self.tokens) - 1) / seconds if seconds > 0 else 0.0,
            time_to_first_token_ms=(self._first_at - self._started) * 1e3,
            device=runner.device,
            weights=runner.weights,
            seed=seed,
        )
        return replace(rest, result=result)

    def _take(self, tokens: Sequence[int], step: DecodeStep | None) -> GenerationChunk:
        for token in tokens:
            self.finish_reason = self._reason_to_end(token)
            if self.finish_reason:
                break
        chunk = self._release(step, is_over=self.finish_reason is not None)
        self._text.append(chunk.text)
        return chunk

    def _reason_to_end(self, token: int) -> str | None:
        """Take one token, unless it is an end token."""
        if token in self._tokenizer.end_token_ids:
            return "stop"
        self._buffer.feed(token, self._decoder.feed(token))
        self._room -= 1
        if self._buffer.is_found:
            return "stop"
        return "length" if self._room == 0 else None

    def _release(self, step: DecodeStep | None, is_over: bool) -> GenerationChunk:
        text, kept = self._buffer.release(is_over)
        self.tokens.extend(kept)
        labels = tuple(self._tokenizer.token_text(token) for token in kept)
        return GenerationChunk(text=text, tokens=tuple(kept), token_texts=labels, step=step)


def acceptance_by_depth(accepted: Sequence[int]) -> tuple[float, ...]:
    """Return, for each depth from 1, the share of steps that accepted a node there."""
    deepest = max(accepted, default=0)
    return tuple(sum(count >= depth for count in accepted) / len(accepted) for depth in range(1, deepest + 1))
