"""The pieces of the command line: a parser that refuses in one sentence, the shared flags, the value checks.

Standard library only: the launcher reads arguments before anything is installed. Nothing here looks at argv.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from app.paths import default_data_dir

__all__ = ["Parser", "add_model_options", "add_repair_option", "auto_or_whole_number", "finite_number", "whole_number"]

DEVICES = ("auto", "cpu", "cuda")
QUANTIZATIONS = ("auto", "int4", "nf4", "int8", "none")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose refusals are one sentence on standard error and exit code 2."""

    def __init__(self, prog: str, description: str, epilog: str | None = None) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=_HelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ").rstrip(".")
        sys.stderr.write(f"{message[:1].upper()}{message[1:]}. `{self.prog} --help` lists what is possible.\n")
        raise SystemExit(2)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=110)


class _StoreAndSay(argparse.Action):
    """Store a value, and in `is_..._given` that it did not come by default."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        setattr(namespace, self.dest, values)
        setattr(namespace, f"is_{self.dest}_given", True)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags that every command with a model shares: which model, where, how small, where data is kept."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default="bundled",
        metavar="NAME|PATH",
        type=_not_empty,
        help="a model folder, a .gguf file or a hub name (default: the bundled SmolLM2-135M-Instruct)",
    )
    group.add_argument("--device", choices=DEVICES, default="auto", help="where to compute (default: auto)")
    group.add_argument(
        "--quantize", choices=QUANTIZATIONS, default="auto", help="how to store the weights (default: auto)"
    )
    group.add_argument(
        "--data-dir",
        type=_folder,
        action=_StoreAndSay,
        default=default_data_dir(),
        metavar="DIR",
        help="folder for conversations and settings (default: %(default)s)",
    )
    parser.set_defaults(is_data_dir_given=False)


def add_repair_option(parser: argparse.ArgumentParser) -> None:
    """Add `--repair`. The launcher acts on it before the command runs, so commands never see it set."""
    parser.add_argument("--repair", action="store_true", help="first build the private environment .venv anew")


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    """Return an argparse type for a whole number from `low` to `high` (no upper limit when None)."""
    allowed = f"from {low} to {high}" if high is not None else f"of {low} or more"

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {allowed}") from None
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"{value} is not a whole number {allowed}")
        return value

    return convert


def finite_number(text: str) -> float:
    """Convert as an argparse type; what range makes sense is for the engine's settings to say."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return value


def auto_or_whole_number(low: int) -> Callable[[str], int | None]:
    """Return an argparse type that takes `auto`, as None, beside a whole number."""
    convert = whole_number(low)
    return lambda text: None if text == "auto" else convert(text)


def _not_empty(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("the value is empty; a name or a path is needed")
    return text


def _folder(text: str) -> Path:
    path = Path(_not_empty(text)).expanduser().absolute()
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a file, not a folder")
    return path
