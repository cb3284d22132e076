"""The command `bench`: measure this machine, everything side by side in one run.

Standard library only until `run`. Tables (or JSON) go to standard output, progress to standard error. What a person
can get wrong is exit code 2 and one sentence.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TextIO

from app.cli_ask import answers_only
from app.prompts import BadInputError, read_questions

__all__ = ["EPILOG", "add_arguments", "run"]

EPILOG = """\
Compared are Medusa on and off here and transformers' generate (plain, and drafting from the prompt); with --peers also
llama.cpp on the same .gguf file, where llama-cpp-python is installed in .venv. It takes minutes; close other programs.

examples:
  python launcher.py bench --quick
  python launcher.py bench --peers --out
  python launcher.py bench --kernels"""

RESULTS = Path(__file__).resolve().parents[1] / "engine" / "bench" / "results"
EXIT_BAD_INPUT = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object and no tables")
    parser.add_argument("--prompts", type=Path, metavar="FILE.jsonl", help="a file of prompts as for ask")
    parser.add_argument("--peers", action="store_true", help="compare llama.cpp too")
    parser.add_argument("--quick", action="store_true", help="a minute of it: short texts, no transformers")
    parser.add_argument("--kernels", action="store_true", help="on a GPU: each matrix and the whole step of 7B shapes")
    parser.add_argument(
        "--heads", default="auto", metavar="auto|none|PATH", help="draft heads (default: those made for the model)"
    )
    parser.add_argument(
        "--out",
        nargs="?",
        type=Path,
        const=RESULTS,
        metavar="FILE|FOLDER",
        help="keep the JSON too (without a place: in engine/bench/results)",
    )


def run(args: argparse.Namespace) -> int:
    """Measure what `args` ask for; return the exit code, 1 where Medusa changed an answer."""
    try:
        messages = [question.messages for question in read_questions(args.prompts)] if args.prompts else None
        if args.out is not None and not args.out.is_dir() and not args.out.parent.is_dir():
            raise BadInputError(f"{args.out} cannot be written: there is no folder {args.out.parent}.")
    except BadInputError as error:
        return _refuse(error)
    with answers_only() as out:
        return _measure(args, messages, out)


def _measure(args: argparse.Namespace, messages: list[list[dict[str, str]]] | None, out: TextIO) -> int:
    # Here, not above: they need torch, which --help and the checks of the input must not wait for.
    from engine import EngineError
    from engine.bench.command import bench, bench_kernels

    try:
        if args.kernels:
            return bench_kernels(args.device, args.out or RESULTS)
        setup = {"model": args.model, "device": args.device, "quantize": args.quantize, "heads": args.heads}
        report, tables = bench(setup, messages, quick=args.quick, peers=args.peers, say=_say)
    except EngineError as error:
        return _refuse(error)
    text = json.dumps(report, indent=1)
    if args.out is not None:
        _keep(args.out, f"bench_{report['model']['device']}.json", text)
    out.write(f"{text}\n" if args.json else tables)
    return 1 if report["answers"].get("answers_that_differ") else 0


def _keep(place: Path, name: str, text: str) -> None:
    path = place / name if place.is_dir() else place
    path.write_text(text + "\n", encoding="utf-8")
    _say(f"Kept in {path}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _refuse(error: Exception) -> int:
    sys.stderr.write(" ".join(str(error).split()) + "\n")
    return EXIT_BAD_INPUT
