"""The toggle's promise, greedy: `python -m engine.bench.identity [--prompts FILE] [--nodes 2,4] [--tokens 256] [--out]`

Every prompt is answered plainly and then with each size of tree, through the same stream of messages that people use.
Tells every answer whose tokens, text or ending are not those of plain decoding, and where they part; exits with 1 then.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from engine.bench.hardware import describe, usable_cores
from engine.bench.loading import load_engine
from engine.bench.toggle import answer
from engine.engine import Engine
from engine.errors import EngineError, InvalidParameterError
from engine.records import GenerationResult

__all__ = ["Comparison", "Plan", "file_name", "first_difference", "identity_text", "run_identity"]

RESULTS = Path(__file__).parent / "results"
PROMPTS = Path(__file__).parent / "prompts" / "eval.txt"
NUM_PROMPTS = 80  # of the bundled file, from its beginning

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What is compared; `nodes` are the sizes of tree, without the root."""

    prompts: tuple[str, ...]
    nodes: tuple[int, ...] = (2, 4)
    max_tokens: int = 256

    def __post_init__(self) -> None:
        if not self.prompts:
            raise InvalidParameterError("There is no prompt to compare; give a file with one a line.")
        if not self.nodes or min(self.nodes) < 1:
            raise InvalidParameterError(f"The sizes of tree are {list(self.nodes)}; give one of 1 or more, as in 2,4.")


@dataclass(frozen=True)
class Comparison:
    """One prompt with one size of tree, beside plain decoding."""

    prompt: int
    nodes: int
    is_identical: bool
    first_difference: int | None
    tokens: int  # plain decoding's; all of them were compared
    tokens_with_medusa: int
    finish_reasons: tuple[str, str]  # plain, with Medusa
    tokens_per_step: float


def first_difference(one: GenerationResult, other: GenerationResult) -> int | None:
    """Return the place of the first token that differs, or where the shorter answer ends; None for the same answer."""
    if (one.tokens, one.text, one.finish_reason) == (other.tokens, other.text, other.finish_reason):
        return None
    pairs = enumerate(zip(one.tokens, other.tokens, strict=False))
    return next((place for place, pair in pairs if pair[0] != pair[1]), min(len(one.tokens), len(other.tokens)))


def compare(engine: Engine, plan: Plan) -> Iterator[Comparison]:
    """Compare every size of tree on every prompt. Raises EngineError where there is no such tree."""
    for number, prompt in enumerate(plan.prompts):
        plain = answer(engine, prompt, 0, plan.max_tokens)
        for nodes in plan.nodes:
            ours = answer(engine, prompt, nodes, plan.max_tokens)
            if ours.tree_nodes != nodes:  # a smaller tree would stand in the report as one that was never tried
                raise InvalidParameterError(
                    f"The largest tree here drafts {ours.tree_nodes} nodes; ask for as many at most, not {nodes}."
                )
            place = first_difference(plain, ours)
            yield Comparison(
                prompt=number,
                nodes=nodes,
                is_identical=place is None,
                first_difference=place,
                tokens=len(plain.tokens),
                tokens_with_medusa=len(ours.tokens),
                finish_reasons=(plain.finish_reason, ours.finish_reason),
                tokens_per_step=round(ours.tokens_per_step, 3),
            )


def run_identity(engine: Engine, plan: Plan, say: Say) -> dict[str, Any]:
    """Compare and return the report. Raises EngineError without heads: nothing would have been compared."""
    if not engine.info.has_heads:
        raise EngineError(f"Medusa on and off cannot be compared: {engine.info.heads_reason}.")
    started, rows = time.perf_counter(), []
    for row in compare(engine, plan):
        rows.append(row)
        if not row.is_identical:
            say(f"Prompt {row.prompt + 1} with {row.nodes} nodes differs from token {row.first_difference} on")
        if row.nodes == plan.nodes[-1] and (row.prompt + 1) % 10 == 0:
            say(f"Prompt {row.prompt + 1} of {len(plan.prompts)}")
    return {
        **describe(engine),
        "threads": usable_cores(),
        "prompts": len(plan.prompts),
        "max_tokens": plan.max_tokens,
        "seconds": round(time.perf_counter() - started),
        "answers_that_differ": sum(not row.is_identical for row in rows),
        "prompts_that_differ": sorted({row.prompt for row in rows if not row.is_identical}),
        "by_drafted_nodes": {nodes: _figures([row for row in rows if row.nodes == nodes]) for nodes in plan.nodes},
        "rows": [asdict(row) for row in rows],
    }


def identity_text(report: dict[str, Any]) -> str:
    """Return the report as plain text for people."""
    model = report["model"]
    lines = [
        f"{model['name']}, {model['weights']}\n{report['hardware']['device']}; {report['date']}",
        f"{report['prompts']} prompts x {report['max_tokens']} tokens, greedy, Medusa on against off:",
    ]
    for nodes, row in report["by_drafted_nodes"].items():
        lines.append(
            f"  {nodes} nodes: {row['answers_that_differ']} answers differ, {row['tokens_compared']:,} tokens "
            f"compared, {row['tokens_per_step']:.2f} tokens a step"
        )
    lines += [
        f"  prompt {row['prompt'] + 1} with {row['nodes']} nodes DIFFERS from token {row['first_difference']} on"
        for row in report["rows"]
        if not row["is_identical"]
    ]
    return "\n".join(lines) + "\n"


def file_name(report: dict[str, Any]) -> str:
    """Return the name that a report is kept under: the device's, on a GPU with the format of the weights."""
    model = report["model"]
    return "_".join(["identity", model["device"], *([model["weights"].split()[0]] if model["device"] != "cpu" else [])])


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    try:
        lines = [line for line in args.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
        plan = Plan(tuple(lines[: args.count]), args.nodes, args.tokens)
        engine = load_engine(args.model, device=args.device, quantize=args.quantize, heads=args.heads, progress=_say)
        report = run_identity(engine, plan, _say)
    except (EngineError, OSError, UnicodeDecodeError) as error:
        _say(str(error))
        return 2
    if args.out is not None:
        path = args.out / f"{file_name(report)}.json" if args.out.is_dir() else args.out
        path.write_text(_one_row_a_line(report), encoding="utf-8")
        _say(f"Kept in {path}")
    print(json.dumps(report, indent=1) if args.json else identity_text(report), end="" if not args.json else "\n")
    return 1 if report["answers_that_differ"] else 0


def _figures(rows: Sequence[Comparison]) -> dict[str, Any]:
    return {
        "answers_that_differ": sum(not row.is_identical for row in rows),
        "first_differing_positions": {row.prompt: row.first_difference for row in rows if not row.is_identical},
        "tokens_compared": sum(row.tokens for row in rows),
        "tokens_per_step": round(mean(row.tokens_per_step for row in rows), 3),
    }


def _one_row_a_line(report: dict[str, Any]) -> str:
    """Return the report as JSON that a diff can be read of."""
    head = json.dumps({**report, "rows": []}, indent=1).removesuffix("[]\n}")
    return head + "[\n  " + ",\n  ".join(map(json.dumps, report["rows"])) + "\n ]\n}\n"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="a text file, one prompt a line")
    parser.add_argument("--count", type=int, default=NUM_PROMPTS, help="how many of them")
    parser.add_argument("--nodes", type=_sizes, default=(2, 4), metavar="N,N", help="sizes of tree, without the root")
    parser.add_argument("--tokens", type=int, default=256, help="at most so many an answer")
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--quantize", default="auto", help="as for the launcher")
    parser.add_argument("--heads", default="auto", help="auto or a file")
    parser.add_argument("--json", action="store_true", help="print one JSON object and no text")
    parser.add_argument(
        "--out", nargs="?", type=Path, const=RESULTS, help="keep the JSON too (without a place: in results/)"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
