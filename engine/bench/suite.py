"""Everything side by side in one run: answers, contexts, step times, memory and the start of a process.

Contenders take turns on every prompt, so that a busy moment of the machine falls on all of them. A part that fails
says so in its place and costs only itself.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

from engine.bench.contenders import Contender, Ends, Own, Run, spread
from engine.bench.contexts import CONTEXTS, measure_contexts
from engine.bench.fresh_process import Setup, measure_memory, time_to_answer
from engine.bench.hardware import describe, usable_cores
from engine.bench.loading import load_engine
from engine.bench.peer_process import PeerError, PeerProcess, ProcessContender, why_no_llama_cpp
from engine.build import choose_device
from engine.decode import PLAIN
from engine.engine import Engine
from engine.models.loader import bundled_path, open_model

__all__ = ["Plan", "run_suite"]

PROMPTS = Path(__file__).parent / "prompts" / "eval.txt"
_BUSY = 0.3  # share of the cores that others may want before it is worth a warning
_SKIP = 20  # the first prompts have served for choosing defaults

Messages = list[dict[str, str]]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """How much is measured. Slow peers answer every third prompt only."""

    prompts: list[Messages]
    max_tokens: int = 128
    contexts: tuple[int, ...] = CONTEXTS
    context_tokens: int = 48
    rounds: int = 3
    starts: int = 3
    peers: bool = False
    transformers: bool = True

    @classmethod
    def usual(cls, prompts: list[Messages] | None, *, quick: bool, peers: bool) -> "Plan":
        """Return the plan of the command; without prompts, of the package's own."""
        own = [[{"role": "user", "content": line}] for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
        if quick:
            chosen = prompts or own[_SKIP : _SKIP + 3]
            return cls(chosen, max_tokens=48, contexts=CONTEXTS[:2], starts=1, peers=peers, transformers=False)
        return cls(prompts or own[_SKIP : _SKIP + 12], peers=peers)


@dataclass
class Peers:
    """The other programs that could be started, and why others could not."""

    fast: list[Contender] = field(default_factory=list)
    slow: list[Contender] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    processes: list[PeerProcess] = field(default_factory=list)
    about: dict[str, str] = field(default_factory=dict)

    def ask(self, contender: Contender, prompt: Sequence[int], max_tokens: int, ends: Ends) -> Run | None:
        """Have a contender answer; one whose process has ended is left out from then on."""
        if contender.name in self.left_out:
            return None
        try:
            return contender.run(prompt, max_tokens, ends)
        except PeerError as error:
            self.left_out[contender.name] = str(error)
            return None

    def close(self) -> None:
        for process in self.processes:
            process.close()


def run_suite(setup: Setup, plan: Plan, say: Say) -> dict[str, Any]:
    """Run all parts and return their figures; `setup` is what the engine is loaded with."""
    choose_device(setup["device"])  # what cannot work at all is told before minutes of measuring
    open_model(setup["model"])
    load = _load()
    if load > _BUSY * usable_cores():
        say(f"Other programs are busy here (load {load:.1f}): the figures will be lower than this machine's.")
    # First, while this process is small: two models at a time would not fit everywhere.
    fresh = {
        "start": _part(lambda: _starts(setup, plan.starts, say)),
        "memory": _part(lambda: _memory(setup, plan.starts, say)),
    }
    say("Loading the engine")
    engine = load_engine(**setup, progress=say)
    # Where plain decoding was chosen, the best tree all the same, so that both are shown.
    own: list[Contender] = [Own(engine, PLAIN), *([Own(engine, engine._tuner.best)] if engine._tuner else [])]
    peers = _start_peers(setup, engine, plan, say)
    try:
        report = {
            **describe(engine),
            "threads": usable_cores(),
            "load_before": load,
            "tuning": engine.info.tuning,
            "medusa": engine.info.heads_reason or "on",
            "answers": _part(lambda: _answers(engine, own, peers, plan, say)),
            "contexts": _part(lambda: _contexts(engine, [*own, *peers.fast], peers, plan, say)),
            **fresh,
            "peers": peers.about,
            "left_out": peers.left_out,
        }
    finally:
        peers.close()
    return report


def _load() -> float:
    """Return how many programs wanted a core in the last minute; 0 where the system does not tell."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else 0.0


def _part(measure: Callable[[], Any]) -> Any:
    try:
        return measure()
    except Exception as error:  # one part must not cost the others
        return {"error": f"{type(error).__name__}: {error}"}


def _starts(setup: Setup, count: int, say: Say) -> dict[str, Any]:
    seconds = []
    for number in range(count):
        say(f"Start of a process to its first token, {number + 1} of {count}")
        seconds.append(time_to_answer(setup))
    return {"seconds_to_first_token": spread(seconds, 2)}


def _memory(setup: Setup, count: int, say: Say) -> dict[str, Any]:
    found = []
    for number in range(count):
        say(f"Memory of a fresh process, {number + 1} of {count}")
        found.append(measure_memory(setup))
    return sorted(found, key=lambda row: row["peak_over_held"])[len(found) // 2]


def _start_peers(setup: Setup, engine: Engine, plan: Plan, say: Say) -> Peers:
    peers = Peers()
    path = bundled_path() if setup["model"] == "bundled" else Path(setup["model"]).expanduser()
    device = engine.info.device
    base = {"path": str(path), "device": device, "threads": usable_cores(), "context": engine.info.max_context}
    if plan.peers:
        name, reason = "llama.cpp", why_no_llama_cpp(path)
        if reason:
            peers.left_out[name] = reason
        else:
            _start_peer(peers, peers.fast, name, {**base, "kind": "llama.cpp"}, say)
    if not plan.transformers:
        return peers
    for dtype in ("bfloat16", "float32") if device == "cpu" else ("bfloat16", *_nf4(engine, path)):
        name = f"transformers {dtype}"
        _start_peer(peers, peers.slow, name, {**base, "kind": "transformers", "dtype": dtype}, say)
    return peers


def _nf4(engine: Engine, path: Path) -> tuple[str, ...]:
    return ("nf4",) if engine.info.weights.startswith("nf4") and path.is_dir() else ()


def _start_peer(peers: Peers, group: list[Contender], name: str, settings: dict[str, Any], say: Say) -> None:
    say(f"Loading {name}")
    try:
        process = PeerProcess(settings)
        peers.processes.append(process)
        peers.about[name] = process.about
        process.ask([1, 2, 3, 4], 4, frozenset(), False)  # what loads fast may still not run here
    except PeerError as error:
        peers.left_out[name] = str(error)
        return
    group.append(ProcessContender(name, process))
    if settings["kind"] == "transformers":
        group.append(ProcessContender(f"{name}, prompt lookup", process, lookup=True))


def _answers(engine: Engine, own: list[Contender], peers: Peers, plan: Plan, say: Say) -> dict[str, Any]:
    """Have every prompt answered; slow peers take every third."""
    ends = frozenset(engine._tokenizer.end_token_ids)
    runs: dict[str, list[Run]] = {contender.name: [] for contender in (*own, *peers.fast, *peers.slow)}
    prompts = [engine._tokenizer.encode_chat(messages) for messages in plan.prompts]
    for contender in own:  # whatever is loaded or captured once
        contender.run(prompts[0], 8, ends)
    differ, started = 0, time.perf_counter()
    for number, prompt in enumerate(prompts):
        say(f"Prompt {number + 1} of {len(prompts)}")
        for contender in (*own, *peers.fast, *(peers.slow if number % 3 == 0 else ())):
            run = peers.ask(contender, prompt, plan.max_tokens, ends)
            if run is not None:
                runs[contender.name].append(run)
        differ += len({runs[contender.name][-1].tokens for contender in own}) > 1
    off = runs[own[0].name]
    return {
        "prompts": len(prompts),
        "max_tokens": plan.max_tokens,
        "seconds": round(time.perf_counter() - started),
        "answers_that_differ": differ,
        "contenders": {name: _figures(taken, off) for name, taken in runs.items() if taken},
    }


def _figures(runs: Sequence[Run], off: Sequence[Run]) -> dict[str, Any]:
    """Return one contender's figures; ratios are to plain decoding here, on the same prompts."""
    every = max(1, len(off) // len(runs))
    pairs = [(run, plain) for run, plain in zip(runs, off[::every], strict=False) if run.steps and plain.steps]
    timed = [run for run, _ in pairs] or list(runs)
    ratios = [run.tokens_per_second / plain.tokens_per_second for run, plain in pairs]
    return {
        "tokens_per_second": spread([run.tokens_per_second for run in timed]),
        "over_medusa_off": spread(ratios, 3) if ratios else None,
        "tokens_per_step": round(mean(run.tokens_per_step for run in timed), 3),
        "step_ms": round(median(run.decode_ms / max(1, run.steps) for run in timed), 3),
        "prefill_tokens_per_second": spread([run.prefill_tokens_per_second for run in runs]),
        "first_token_ms": spread([run.prefill_ms for run in runs]),
    }


def _contexts(engine: Engine, contenders: list[Contender], peers: Peers, plan: Plan, say: Say) -> dict[str, Any]:
    return measure_contexts(
        engine,
        contenders,
        plan.contexts,
        rounds=plan.rounds,
        new_tokens=plan.context_tokens,
        ask=peers.ask,
        say=say,
    )
