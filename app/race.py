"""A race: one question answered without and then with Medusa, one after the other, so that neither slows the other.

Same prompt, same settings, same seed. What is kept is each run's texts with the moments they came at, for a replay of
both on one clock. Nothing of a race is stored with the conversation.
"""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from app.chat import AnswerEngine, ChatSession
from app.settings import params_from
from app.storage import StorageError
from engine import EngineError, GenerationResult, SamplingParams

__all__ = ["Lane", "Race", "race_events", "verdict"]

UPDATE_INTERVAL_S = 0.15
MAX_TOKENS = 256  # enough to see, and no long wait for the slower one
DEFAULT_SEED = 7


@dataclass
class Lane:
    """One run: texts with the milliseconds since its first token, and the engine's own record at the end."""

    medusa: bool
    texts: list[str] = field(default_factory=list)
    times_ms: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    result: GenerationResult | None = None

    def as_json(self) -> dict[str, Any]:
        assert self.result is not None, "a lane is shown when its run has ended"
        return {
            "medusa": self.result.medusa,
            "texts": self.texts,
            "times_ms": [round(value, 1) for value in self.times_ms],
            "tokens": len(self.tokens),
            "tokens_per_second": round(self.result.tokens_per_second, 1),
            "tokens_per_step": round(self.result.tokens_per_step, 2),
        }


class Race:
    """Both runs as one job of the engine's thread."""

    def __init__(self, messages: Sequence[dict[str, str]], params: SamplingParams) -> None:
        self._messages = list(messages)
        seed = DEFAULT_SEED if params.seed is None else params.seed
        self._params = replace(params, seed=seed, max_tokens=min(params.max_tokens, MAX_TOKENS))
        self.lanes = (Lane(medusa=False), Lane(medusa=True))
        self.error = ""
        self.finished = threading.Event()
        self._stop = threading.Event()

    def cancel(self) -> None:
        """End after the current step; nobody looks any more."""
        self._stop.set()

    def run(self, engine: AnswerEngine | None, why_not: str) -> None:
        """Do both runs, the plain one first."""
        try:
            if engine is None:
                self.error = f"The model is not loaded. {why_not}"
            elif not engine.info.has_heads:
                reason = engine.info.heads_reason or "the model has no heads"
                self.error = f"There is nothing to race against: {reason}."
            else:
                self._warm(engine)
                for lane in self.lanes:
                    self._run_lane(engine, lane)
        except EngineError as error:
            self.error = str(error)
        except Exception as error:
            self.error = f"The race failed ({type(error).__name__}: {error}); start it again."
            raise
        finally:
            self.finished.set()

    def _warm(self, engine: AnswerEngine) -> None:
        """Both lanes find the prompt read already, so that the order does not favour the second."""
        for _ in engine.stream(self._messages, replace(self._params, max_tokens=2), self._stop):
            pass

    def _run_lane(self, engine: AnswerEngine, lane: Lane) -> None:
        if self._stop.is_set():
            return
        began = 0.0
        for chunk in engine.stream(self._messages, replace(self._params, medusa=lane.medusa), self._stop):
            now = time.perf_counter()
            began = began or now
            if chunk.tokens or chunk.text:
                lane.tokens.extend(chunk.tokens)
                lane.times_ms.append(1000 * (now - began))
                lane.texts.append(chunk.text)
            lane.result = chunk.result or lane.result


def verdict(plain: Lane, medusa: Lane) -> dict[str, Any]:
    """Who won by how much, and whether both wrote the same; where they differ, from which character on."""
    texts = ["".join(lane.texts) for lane in (plain, medusa)]
    spans = [lane.times_ms[-1] if lane.times_ms else 0.0 for lane in (plain, medusa)]
    counts = [len(lane.tokens) - 1 for lane in (plain, medusa)]
    speeds = [count / span if span > 0 else 0.0 for count, span in zip(counts, spans, strict=True)]
    same = texts[0] == texts[1]
    common = next((place for place, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    return {
        "ratio": round(speeds[1] / speeds[0], 2) if all(speeds) else None,
        "same": same,
        "differs_at": None if same else common,
    }


async def race_events(session: ChatSession, message_id: str) -> AsyncIterator[str]:
    """Race for an answer's question: progress, then both lanes with the verdict, as JSON. Ends with whoever looks."""
    try:
        race = await asyncio.to_thread(_race_for, session, message_id)
    except StorageError as error:
        yield json.dumps({"error": str(error)})
        return
    session.submit(race)
    try:
        while not race.finished.is_set():
            yield json.dumps({"progress": [len(lane.tokens) for lane in race.lanes]})
            await asyncio.sleep(UPDATE_INTERVAL_S)
        yield json.dumps(_outcome(race), ensure_ascii=False)
    finally:
        race.cancel()


def _outcome(race: Race) -> dict[str, Any]:
    if race.error or any(lane.result is None for lane in race.lanes):
        return {"error": race.error or "The race was stopped; start it again."}
    return {"lanes": [lane.as_json() for lane in race.lanes], **verdict(*race.lanes)}


def _race_for(session: ChatSession, message_id: str) -> Race:
    """The question above an answer, with the settings that the answer had."""
    message = session.store.message(message_id)
    thread = session.store.thread(message.conversation_id, message_id)
    return Race(list(_prompt(thread, message.settings)), params_from(message.settings))


def _prompt(thread: Sequence[Any], settings: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """The prompt that the answer at the end of the thread had."""
    if settings.get("system"):
        yield {"role": "system", "content": str(settings["system"])}
    above = [message for message in thread[:-1] if message.content]
    for message in above[int(settings.get("left_out") or 0) :]:
        yield {"role": message.role, "content": message.content}
