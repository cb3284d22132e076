"""Speed with Medusa on and off: `python -m engine.bench.toggle [--nodes 2 3 4 6] [--prompts 12] [--out FILE]`.

Every prompt is answered once plainly and once for each tree size, one after the other, so that a busy moment of the
machine falls on all of them. Prints and writes medians; exits with 1 where any answer's tokens differ.
"""

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from statistics import mean, median

import torch

from engine import Engine, GenerationResult, SamplingParams
from engine.bench.loading import load_engine

PROMPTS = Path(__file__).parent / "prompts" / "eval.txt"


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    engine = load_engine(device=args.device)
    if not engine.info.has_heads:
        print(engine.info.heads_reason, file=sys.stderr)
        return 1
    prompts = PROMPTS.read_text().splitlines()[args.skip : args.skip + args.prompts]
    results: dict[int, list[GenerationResult]] = {nodes: [] for nodes in (0, *args.nodes)}
    for prompt in prompts:
        for nodes, answers in results.items():
            answers.append(answer(engine, prompt, nodes, args.max_tokens))
    plain = [result.tokens for result in results[0]]
    differing = sum(
        ours.tokens != theirs for rows in results.values() for ours, theirs in zip(rows, plain, strict=True)
    )
    report = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {engine.info.device}, {engine.info.weights}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "prompts": len(prompts),
        "max_tokens": args.max_tokens,
        "answers_that_differ": differing,
        "by_drafted_nodes": {nodes: figures(rows) for nodes, rows in results.items()},
    }
    print(json.dumps(report, indent=1))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if differing else 0


def answer(engine: Engine, prompt: str, nodes: int, max_tokens: int) -> GenerationResult:
    """Answer greedily with a tree of `nodes` drafted nodes; 0 decodes plainly."""
    params = SamplingParams(medusa=nodes > 0, tree_nodes=nodes or None, max_tokens=max_tokens)
    *_, last = engine.stream([{"role": "user", "content": prompt}], params)
    assert last.result is not None, "the last chunk carries the result"
    return last.result


def figures(rows: Sequence[GenerationResult]) -> dict[str, float]:
    """Return the median speed with its spread, and the mean tokens per step."""
    speeds = [row.tokens_per_second for row in rows]
    return {
        "tokens_per_second": round(median(speeds), 1),
        "slowest": round(min(speeds), 1),
        "fastest": round(max(speeds), 1),
        "tokens_per_step": round(mean(row.tokens_per_step for row in rows), 3),
    }


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[2, 3, 4, 6])
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--skip", type=int, default=20, help="prompts to leave out at the start")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
