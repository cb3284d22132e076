"""The toggle's promise under sampling: `python -m engine.bench.sampling_identity [--settings 100] --out DIR`.

Draws settings at random, all controls of them, and answers every prompt with each, once with Medusa and once without.
Writes what was drawn and what came of it to DIR/sampling_identity_DEVICE.json, also while it runs; exits with 1 where
any two answers differ in a token, in the text or in why they ended.
"""

import argparse
import json
import platform
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from engine import Engine, EngineError, GenerationResult, SamplingParams
from engine.bench.identity import first_difference
from engine.bench.loading import load_engine
from engine.cuda_runner import CudaRunner

PROMPTS = Path(__file__).parent / "prompts" / "eval.txt"
BIASED_TOKENS = 20_000  # biases go to tokens below: every model has them


@dataclass(frozen=True)
class Comparison:
    """One prompt under one setting: what Medusa changed, and how much it drafted."""

    setting: int
    prompt: str
    is_identical: bool
    first_difference: int | None
    generated_tokens: int
    finish_reasons: tuple[str, str]
    tokens_per_step: float
    tokens_per_second: tuple[float, float]


def random_settings(draw: random.Random, max_tokens: int) -> SamplingParams:
    """Draw every control; each is at its neutral value about every third time, so that others show alone too."""

    def some(neutral: Any, *others: Any) -> Any:
        return neutral if draw.random() < 1 / 3 else draw.choice(others)

    biases = {draw.randrange(BIASED_TOKENS): round(draw.uniform(-8, 8), 2) for _ in range(draw.randrange(1, 30))}
    return SamplingParams(
        temperature=some(1.0, 0.0, 0.3, 0.7, 1.3, round(draw.uniform(0.05, 2), 3)),
        seed=draw.getrandbits(draw.choice([8, 32, 63])),
        max_tokens=max_tokens,
        tree_nodes=some(None, 1, 3, 8, 16, 32, 63),
        top_k=some(0, 1, 5, 40, 200, 3000),
        top_p=some(1.0, 0.99, 0.95, 0.8, 0.3),
        min_p=some(0.0, 0.01, 0.05, 0.2),
        repetition_penalty=some(1.0, 0.8, 1.1, 1.3),
        presence_penalty=some(0.0, -0.5, 0.3, 1.5),
        frequency_penalty=some(0.0, -0.2, 0.2, 1.0),
        stop=some((), ("\n\n",), (". ", "!"), ("the end",)),
        logit_bias=some((), tuple(biases.items())),
    )


def compare(engine: Engine, number: int, params: SamplingParams, prompt: str) -> Comparison:
    """Answer once with Medusa and once without."""
    on, off = (_answer(engine, prompt, {**params.to_dict(), "medusa": medusa}) for medusa in (True, False))
    place = first_difference(off, on)
    return Comparison(
        setting=number,
        prompt=prompt,
        is_identical=place is None,
        first_difference=place,
        generated_tokens=len(off.tokens),
        finish_reasons=(on.finish_reason, off.finish_reason),
        tokens_per_step=round(on.tokens_per_step, 3),
        tokens_per_second=(round(on.tokens_per_second, 1), round(off.tokens_per_second, 1)),
    )


def run(engine: Engine, settings: Sequence[SamplingParams], prompts: Sequence[str]) -> Iterator[Comparison]:
    """Compare every setting on every prompt."""
    for number, params in enumerate(settings):
        for prompt in prompts:
            yield compare(engine, number, params, prompt)


def report(
    engine: Engine, settings: Sequence[SamplingParams], rows: Sequence[Comparison], state: str
) -> dict[str, Any]:
    """Return what was measured, the settings with it."""
    info = engine.info
    sampled = [row for row in rows if settings[row.setting].temperature > 0]
    return {
        "date": date.today().isoformat(),
        "state": state,
        "machine": f"{platform.machine()}, {_device_name(info.device)}",
        "model": f"{info.model}, {info.weights}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "settings": len({row.setting for row in rows}),
        "comparisons": len(rows),
        "tokens_compared": sum(row.generated_tokens for row in rows),
        "answers_that_differ": sum(not row.is_identical for row in rows),
        "comparisons_sampled": len(sampled),
        "tokens_per_step": round(mean(row.tokens_per_step for row in rows), 3) if rows else None,
        "tokens_per_second_of_the_engines_own_tree": _speeds(settings, rows),
        "memory_bytes": info.memory_bytes,
        "notes": list(info.notes),
        "capture_failure": engine._runner.graphs.failure if isinstance(engine._runner, CudaRunner) else "",
        "drawn": [params.to_dict() for params in settings],
        "rows": [asdict(row) for row in rows],
    }


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    engine = load_engine(
        args.model, device=args.device, quantize=args.quantize, progress=lambda text: print(text, file=sys.stderr)
    )
    if not engine.info.has_heads:
        print(engine.info.heads_reason, file=sys.stderr)
        return 1
    draw = random.Random(args.seed)
    settings = [random_settings(draw, args.max_tokens) for _ in range(args.settings)]
    prompts = PROMPTS.read_text().splitlines()[args.skip : args.skip + args.prompts]
    target, rows = args.out / f"sampling_identity_{engine.info.device}.json", []
    deadline, state = time.monotonic() + args.minutes * 60, "complete"
    try:
        for row in run(engine, settings, prompts):
            rows.append(row)
            if len(rows) % 10 == 0:
                _write(target, report(engine, settings, rows, "running"))
            if time.monotonic() > deadline and len(rows) < len(settings) * len(prompts):
                state = f"stopped after {args.minutes} minutes"
                break
    except (EngineError, RuntimeError) as error:  # what has been compared is kept
        state = f"failed: {type(error).__name__}: {error}"
    result = report(engine, settings, rows, state)
    _write(target, result)
    print(json.dumps({key: value for key, value in result.items() if key not in ("drawn", "rows")}, indent=1))
    return 1 if result["answers_that_differ"] or state != "complete" else 0


def _answer(engine: Engine, prompt: str, settings: dict[str, Any]) -> GenerationResult:
    *_, last = engine.stream([{"role": "user", "content": prompt}], SamplingParams.from_dict(settings))
    assert last.result is not None, "the last chunk carries the result"
    return last.result


def _speeds(settings: Sequence[SamplingParams], rows: Sequence[Comparison]) -> dict[str, float]:
    """Return median speeds where the tree was the engine's choice; other sizes are drawn to be different, not fast."""
    pairs = [row.tokens_per_second for row in rows if settings[row.setting].tree_nodes is None]
    return {"on": median(on for on, _ in pairs), "off": median(off for _, off in pairs)} if pairs else {}


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else device


def _write(path: Path, content: dict[str, Any]) -> None:
    """Write one line a figure, one line a row."""
    lines = []
    for key, value in content.items():
        is_table = key in ("drawn", "rows")
        text = ",\n  ".join(map(_line, value)) if is_table else _line(value)
        lines.append(f" {_line(key)}: " + (f"[\n  {text}\n ]" if is_table else text))
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the result")
    parser.add_argument("--settings", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--skip", type=int, default=20, help="prompts to leave out at the start")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--minutes", type=float, default=60, help="stop after this long")
    parser.add_argument("--seed", type=int, default=5, help="of the settings that are drawn")
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--quantize", default="auto", help="as for the launcher")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
