"""How cost grows with the text before it: time to the first token, and decode speed, by length of context."""

from collections.abc import Callable, Sequence
from typing import Any

from engine.bench.contenders import Contender, Ends, Run, spread
from engine.engine import Engine

__all__ = ["CONTEXTS", "measure_contexts", "prompt_of"]

Ask = Callable[[Contender, Sequence[int], int, Ends], Run | None]  # None: it cannot answer any more
CONTEXTS = (100, 1000, 4000, 8000)
_LONG_RUN_MS = 20_000.0  # a contender this slow is measured once at a length
_TAIL = 8  # tokens at a prompt's end that ask for an answer
_STORY = (
    "In the spring the harbour filled with small boats, and each of them had its own colour, its own song and its own "
    "quarrel. The keeper of the lighthouse wrote all of it down: who left before dawn, who came back with nothing, "
    "what the wind did to the flags, and how the price of nets rose by {} coins after the storm. "
)


def prompt_of(engine: Engine, length: int) -> list[int]:
    """Return a chat prompt of exactly `length` tokens."""
    text = "".join(_STORY.format(number) for number in range(2 + length // 40))
    tokens = engine._tokenizer.encode_chat([{"role": "user", "content": text + "Go on with this story."}])
    return [*tokens[: length - _TAIL], *tokens[-_TAIL:]]


def measure_contexts(
    engine: Engine,
    contenders: Sequence[Contender],
    contexts: Sequence[int],
    *,
    rounds: int,
    new_tokens: int,
    ask: Ask,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Answer prompts of each length from an empty cache, the contenders in turns; lengths that do not fit are named."""
    found: dict[str, Any] = {"new_tokens": new_tokens, "lengths": {}, "left_out": ""}
    limit = engine.info.max_context
    fitting = [context for context in contexts if context + new_tokens <= limit]
    if len(fitting) < len(contexts):
        left = ", ".join(f"{context:,}" for context in contexts if context not in fitting)
        found["left_out"] = f"Left out: {left} tokens, as the model holds {limit:,}."
    for context in fitting:
        prompt = prompt_of(engine, context)
        first: dict[str, list[float]] = {contender.name: [] for contender in contenders}
        speed: dict[str, list[float]] = {contender.name: [] for contender in contenders}
        steps: dict[str, float] = {}
        for turn in range(rounds):
            say(f"Context of {context:,} tokens, round {turn + 1} of {rounds}")
            for contender in contenders:
                if max(first[contender.name], default=0.0) > _LONG_RUN_MS:
                    continue
                run = ask(contender, prompt, new_tokens, frozenset())
                if run is None:
                    continue
                first[contender.name].append(run.prefill_ms)
                speed[contender.name].append(run.tokens_per_second)
                steps[contender.name] = round(run.tokens_per_step, 3)
        found["lengths"][context] = {
            name: {
                "first_token_ms": spread(first[name]),
                "tokens_per_second": spread(speed[name]),
                "tokens_per_step": steps[name],
            }
            for name in first
            if first[name]
        }
    return found
