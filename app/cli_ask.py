"""The command `ask`: answer prompts in the terminal.

Standard library only until `run`. Standard output is for answers alone: whatever a library prints goes to standard
error. What a person can get wrong is exit code 2 and one sentence.
"""

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TextIO

from app.options import auto_or_whole_number, finite_number, whole_number
from app.prompts import BadInputError, Question, checked_question, read_questions

__all__ = ["EPILOG", "add_arguments", "answers_only", "run", "stop_on_interrupt"]

EPILOG = """\
The answer goes to standard output, everything else to standard error. With --json an answer is one object; a file for
--prompts holds one object a line, {"prompt": "...", "system": "..."} ("system" may be left out), and gives one a line.

examples:
  python launcher.py ask "Why is the sky blue?"
  python launcher.py ask "Write a story about a dragon." --medusa off --max-tokens 200 --json
  python launcher.py ask --prompts prompts.jsonl > answers.jsonl"""

EXIT_BAD_INPUT = 2
EXIT_PIPE_CLOSED = 1
EXIT_INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("prompt", nargs="?", type=_prompt, metavar="PROMPT", help="what the model is to answer")
    source.add_argument("--prompts", type=Path, metavar="FILE.jsonl", help="answer a file of prompts; implies --json")
    parser.add_argument("--json", action="store_true", help="print an object with text, tokens and measurements")
    parser.add_argument("--system", metavar="TEXT", help="system text before the prompt")
    answer = parser.add_argument_group("answer")
    answer.add_argument("--medusa", choices=("on", "off"), default="on", help="draft with Medusa heads (default: on)")
    answer.add_argument(
        "--heads", default="auto", metavar="auto|none|PATH", help="draft heads (default: those made for the model)"
    )
    answer.add_argument(
        "--tree-nodes",
        type=auto_or_whole_number(1),
        metavar="auto|N",
        help="drafted tokens a step, without the root (default: auto)",
    )
    answer.add_argument(
        "--acceptance",
        choices=("exact", "typical"),
        default="exact",
        help="exact: the text of plain decoding; typical: more accepted, other text (default: exact)",
    )
    answer.add_argument(
        "--temperature", type=finite_number, default=0.0, metavar="T", help="0 always takes the likeliest (default: 0)"
    )
    answer.add_argument("--seed", type=whole_number(0), metavar="S", help="repeats a sampled answer (default: drawn)")
    answer.add_argument(
        "--max-tokens", type=whole_number(1), default=512, metavar="N", help="longest answer (default: 512)"
    )


def _prompt(text: str) -> str:
    try:
        return checked_question(text, None, "it").prompt
    except BadInputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run(args: argparse.Namespace) -> int:
    """Answer what `args` ask for; return the exit code."""
    try:
        questions = _questions(args)
    except BadInputError as error:
        return _refuse(error)
    try:
        with answers_only() as out:
            return _answer(args, questions, out)
    except BrokenPipeError:  # the reader, such as `head`, has enough
        return EXIT_PIPE_CLOSED


def _questions(args: argparse.Namespace) -> list[Question]:
    if args.prompts is not None:
        return read_questions(args.prompts, args.system)
    return [checked_question(args.prompt, args.system, "The command line")]


def _answer(args: argparse.Namespace, questions: Sequence[Question], out: TextIO) -> int:
    # Here, not above: they need torch, which --help and the checks of the input must not wait for.
    from app.ask import answer_all
    from engine import Engine, EngineError, SamplingParams

    try:
        params = SamplingParams(
            medusa=args.medusa == "on",
            temperature=args.temperature,
            seed=args.seed,
            max_tokens=args.max_tokens,
            tree_nodes=args.tree_nodes,
            acceptance=args.acceptance,
        )
        engine = Engine.load(
            args.model,
            device=args.device,
            quantize=args.quantize,
            heads=None if args.heads == "none" else args.heads,
            progress=lambda text: print(text, file=sys.stderr, flush=True),
        )
        with stop_on_interrupt() as stop:
            json_lines = args.json or args.prompts is not None
            answer_all(engine, questions, params, stop=stop, out=out, log=sys.stderr, json_lines=json_lines)
    except EngineError as error:
        return _refuse(error)
    return EXIT_INTERRUPTED if stop.is_set() else 0


def _refuse(error: Exception) -> int:
    sys.stderr.write(" ".join(str(error).split()) + "\n")
    return EXIT_BAD_INPUT


@contextlib.contextmanager
def answers_only() -> Iterator[TextIO]:
    """Yield standard output as a private UTF-8 stream, and send all else that is written there to standard error."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)  # the descriptor, not only sys.stdout: libraries in C write there too
    # A lone surrogate becomes \udxxx, which JSON reads back; anything else is written as it is.
    out = open(kept, "w", encoding="utf-8", errors="backslashreplace", newline="\n", closefd=False)  # noqa: SIM115
    try:
        yield out
        out.flush()
    finally:
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()
            os.dup2(kept, 1)
            out.close()
        os.close(kept)


@contextlib.contextmanager
def stop_on_interrupt() -> Iterator[threading.Event]:
    """Yield an event that the first Ctrl+C sets, so that the partial answer is kept; a second one ends at once."""
    stop = threading.Event()

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
