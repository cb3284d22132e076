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
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TextIO

from app.answer_options import add_answer_options, answer_settings, given_options
from app.prompts import BadInputError, Question, checked_question, read_questions
from app.records import StorageError

if TYPE_CHECKING:
    from engine import Engine

__all__ = ["EPILOG", "add_arguments", "answers_only", "run", "stop_on_interrupt"]

EPILOG = """\
The answer goes to standard output, everything else to standard error. With --json an answer is one object; a file for
--prompts holds one object a line, {"prompt": "...", "system": "..."} ("system" may be left out), and gives one a line.

examples:
  python launcher.py ask "Why is the sky blue?"
  python launcher.py ask "Write a story about a dragon." --medusa off --max-tokens 200 --json
  python launcher.py ask "Tell me a joke." --preset creative --seed 7 --stop "\\n\\n"
  python launcher.py ask --prompts prompts.jsonl > answers.jsonl

With --data-dir the answer is also kept there as a conversation. An answer that was kept, by this command or by the app,
can be written again; --medusa off shows that drafting changes nothing. The exit code says whether it is identical:
  python launcher.py ask --from-message ID --data-dir DIR"""

EXIT_BAD_INPUT = 2
EXIT_PIPE_CLOSED = 1
EXIT_DIFFERS = 1
EXIT_INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("prompt", nargs="?", type=_prompt, metavar="PROMPT", help="what the model is to answer")
    source.add_argument("--prompts", type=Path, metavar="FILE.jsonl", help="answer a file of prompts; implies --json")
    source.add_argument(
        "--from-message", metavar="ID", help="write a kept answer again, with its own settings, and compare"
    )
    parser.add_argument("--json", action="store_true", help="print an object with text, tokens and measurements")
    parser.add_argument("--system", metavar="TEXT", help="system text before the prompt")
    add_answer_options(parser)


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
    if args.from_message is not None:
        also = [name for name in given_options(args) if name != "medusa"] + ["system"] * (args.system is not None)
        if also:
            flag = also[0].replace("_", "-")
            raise BadInputError(f"--from-message takes the kept answer's own settings; leave out --{flag}.")
        return []
    if args.prompts is not None:
        return read_questions(args.prompts, args.system)
    return [checked_question(args.prompt, args.system, "The command line")]


def _answer(args: argparse.Namespace, questions: Sequence[Question], out: TextIO) -> int:
    # Here, not above: it needs torch, which --help and the checks of the input must not wait for.
    from engine import EngineError

    try:
        if args.from_message is not None:
            return _answer_again(args, out)
        return _answer_questions(args, questions, out)
    except (EngineError, StorageError) as error:
        return _refuse(error)


def _answer_questions(args: argparse.Namespace, questions: Sequence[Question], out: TextIO) -> int:
    """Answer and, where a data folder was named, keep the answers there."""
    from app.ask import answer_all
    from engine import SamplingParams

    params = SamplingParams.from_dict(answer_settings(args))
    json_lines = args.json or args.prompts is not None
    with contextlib.ExitStack() as closing, stop_on_interrupt() as stop:
        loaded = _load(args)
        answer = partial(answer_all, stop=stop, out=out, log=sys.stderr, json_lines=json_lines)
        if args.is_data_dir_given:
            from app.saved_answers import KeepingEngine, open_store

            store = closing.enter_context(contextlib.closing(open_store(args.data_dir)))
            keeping = KeepingEngine(loaded, store)
            answer(keeping, questions, params, kept_as=lambda: keeping.message_id)
        else:
            answer(loaded, questions, params)
    return EXIT_INTERRUPTED if stop.is_set() else 0


def _answer_again(args: argparse.Namespace, out: TextIO) -> int:
    """Write a kept answer again; the exit code is 0 where it is identical."""
    from app.ask import as_json, summary
    from app.saved_answers import open_store, reproduce, stored_answer

    with contextlib.closing(open_store(args.data_dir)) as store:
        stored = stored_answer(store, args.from_message)
    medusa = None if args.medusa is None else args.medusa == "on"
    engine = _load(args)

    def show(text: str) -> None:
        if not args.json:
            out.write(text)
            out.flush()

    with stop_on_interrupt() as stop:
        again = reproduce(engine, stored, stop, show, medusa=medusa)
    verdict = {"message": args.from_message, "identical": not again.difference, "difference": again.difference}
    out.write(as_json(again.result, **verdict) + "\n" if args.json else "\n")
    out.flush()
    is_same = "Identical to" if not again.difference else f"Not identical ({again.difference}) to"
    sys.stderr.write(f"{summary(again.result)}\n{is_same} message {args.from_message}.\n")
    return EXIT_DIFFERS if again.difference else 0


def _load(args: argparse.Namespace) -> "Engine":
    from engine import Engine

    return Engine.load(
        args.model,
        device=args.device,
        quantize=args.quantize,
        heads=None if args.heads == "none" else args.heads,
        progress=lambda text: print(text, file=sys.stderr, flush=True),
    )


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
