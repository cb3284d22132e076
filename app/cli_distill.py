"""The command `distill`: a model writes its own training data, or a person's conversations and a server give it.

Standard library only until `run`.
"""

import argparse
import contextlib
import sys
from pathlib import Path

from app.options import whole_number
from app.paths import default_data_dir
from app.records import StorageError

__all__ = ["EPILOG", "add_arguments", "run"]

EPILOG = """\
The model writes questions and answers them; no data set is needed. With --prompts it answers the prompts of a file
instead: plain text, one a line, or .jsonl with {"prompt": "...", "system": "..."} a line ("system" may be left out).
With --conversations it answers the questions of your own saved chats; they stay on this machine. With --server another
program answers, such as vLLM or llama.cpp with a model too large for this one; --model is then the model whose
tokenizer and chat template it has. Stop it whenever you like: the same command goes on after the last finished shard.

examples:
  python launcher.py distill --out data --tokens 30000000
  python launcher.py distill --out data --conversations
  python launcher.py distill --out data --prompts questions.txt --model FOLDER --server http://localhost:8000/v1"""

EXIT_BAD_INPUT = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `distill` takes."""
    parser.add_argument(
        "--model", default="bundled", metavar="NAME|PATH", help="bundled (default), a model folder or a .gguf file"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute (default: auto)"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="data folder, new or to be continued")
    parser.add_argument("--tokens", type=whole_number(1), metavar="N", help="tokens to keep, earlier runs included")
    questions = parser.add_mutually_exclusive_group()
    questions.add_argument("--prompts", type=Path, metavar="FILE", help="answer these instead of invented questions")
    questions.add_argument(
        "--conversations",
        nargs="?",
        type=Path,
        const=default_data_dir(),
        metavar="DATA_DIR",
        help="answer the questions of your saved chats (default folder: %(const)s)",
    )
    parser.add_argument("--server", metavar="URL", help="have an OpenAI-compatible server answer")
    parser.add_argument("--server-model", metavar="NAME", help="the model to ask there (default: its first)")
    parser.add_argument("--api-key-env", metavar="VARIABLE", help="environment variable that holds the server's key")
    parser.add_argument("--time-limit", type=_seconds, metavar="SECONDS", help="stop after this time")
    parser.add_argument(
        "--max-answer", type=whole_number(8), default=320, metavar="N", help="longest answer in tokens (default: 320)"
    )
    parser.add_argument(
        "--slots", type=whole_number(1), metavar="N", help="conversations, or requests, at once (default: by memory; 8)"
    )
    parser.add_argument(
        "--shard-tokens",
        type=whole_number(1),
        metavar="N",
        help="tokens a file (default: 1000000 on a GPU, else 10000)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="another seed gives other questions")


def run(args: argparse.Namespace) -> int:
    """Fill the data folder; return the exit code."""
    try:
        conversations = None if args.conversations is None else _questions_asked(args.conversations)
    except StorageError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_BAD_INPUT
    # Here, not above: it needs torch, which --help must not wait for.
    from engine.training.distill_command import run as fill

    return fill(args, conversations)


def _questions_asked(data_dir: Path) -> list[list[dict[str, str]]]:
    """Return a prompt for every question of every chat, oldest chat first: the turns before it and the question."""
    from app.kept_answer import prompt_parts
    from app.saved_answers import open_store

    if not (data_dir / "conversations.db").is_file():
        raise StorageError(f"There are no saved conversations in {data_dir}; name the app's --data-dir.")
    prompts = []
    with contextlib.closing(open_store(data_dir)) as store:
        for conversation in sorted(store.conversations(), key=lambda one: (one.created_ms, one.id)):
            for message in store.messages(conversation.id):
                if message.role != "user" or not message.content.strip():
                    continue
                turns = [turn for turn in store.thread(conversation.id, message.id) if turn.content]
                system, above = prompt_parts(message, turns, "")
                prompts.append([*(system or _system_of(conversation.settings)), *above])
    if not prompts:
        raise StorageError(f"The conversations in {data_dir} hold no question yet.")
    return prompts


def _system_of(settings: dict[str, object]) -> list[dict[str, str]]:
    system = str(settings.get("system") or "")
    return [{"role": "system", "content": system}] if system else []


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return value
