"""The flags that say how to answer: every control of the engine's settings, and presets.

Standard library only. A flag that is not given stays None, so that a preset or a stored answer's own settings show
through; ranges are for the engine's settings to check.
"""

import argparse
from typing import Any

from app.options import auto_or_whole_number, finite_number, whole_number
from app.presets import PRESETS, with_preset

__all__ = ["add_answer_options", "answer_settings", "given_options"]

_NUMBERS = (
    ("--temperature", "T", "0 always takes the likeliest token; higher is more varied (default: 0)"),
    ("--top-p", "P", "only the likeliest tokens that together have this probability (default: 1, all)"),
    ("--min-p", "P", "only tokens at least this likely, relative to the likeliest (default: 0)"),
    ("--repetition-penalty", "R", "above 1: less of the tokens in the prompt or the answer (default: 1)"),
    ("--presence-penalty", "R", "taken once from a token that the answer holds (default: 0)"),
    ("--frequency-penalty", "R", "taken each time that the answer holds a token (default: 0)"),
)
_THRESHOLDS = (
    ("--epsilon", "E", "typical acceptance: a probability above this is always accepted (default: 0.09)"),
    ("--delta", "D", "typical acceptance: scales the threshold that falls with entropy (default: 0.3)"),
)
_NAMES = (
    "medusa", "tree_nodes", "acceptance", "epsilon", "delta", "temperature", "top_k", "top_p", "min_p",
    "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "max_tokens", "stop", "logit_bias", "preset",
)  # fmt: skip


def add_answer_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags to a command's parser, in two groups."""
    answer = parser.add_argument_group("answer")
    answer.add_argument("--preset", choices=[name.lower() for name in PRESETS], help="settings to start from")
    for flag, metavar, text in _NUMBERS[:1]:
        answer.add_argument(flag, type=finite_number, metavar=metavar, help=text)
    answer.add_argument(
        "--top-k", type=whole_number(0), metavar="K", help="only the K likeliest tokens (default: 0, all)"
    )
    for flag, metavar, text in _NUMBERS[1:]:
        answer.add_argument(flag, type=finite_number, metavar=metavar, help=text)
    answer.add_argument("--seed", type=whole_number(0), metavar="S", help="repeats a sampled answer (default: drawn)")
    answer.add_argument("--max-tokens", type=whole_number(1), metavar="N", help="longest answer (default: 512)")
    answer.add_argument(
        "--stop",
        action="append",
        type=_stop_string,
        metavar="TEXT",
        help=r"end before this text; \n is a line break; may be given several times",
    )
    answer.add_argument(
        "--logit-bias",
        action="append",
        type=_bias,
        metavar="TOKEN=BIAS",
        help="add -100 to 100 to the logit of the token with this id; may be given several times",
    )
    _add_medusa_options(parser)


def _add_medusa_options(parser: argparse.ArgumentParser) -> None:
    medusa = parser.add_argument_group("Medusa")
    medusa.add_argument("--medusa", choices=("on", "off"), help="draft with Medusa heads (default: on)")
    medusa.add_argument(
        "--heads", default="auto", metavar="auto|none|PATH", help="draft heads (default: those made for the model)"
    )
    medusa.add_argument(
        "--tree-nodes",
        type=auto_or_whole_number(1),
        metavar="auto|N",
        help="drafted tokens a step, without the root (default: auto)",
    )
    medusa.add_argument(
        "--acceptance",
        choices=("exact", "typical"),
        help="exact: the text of plain decoding; typical: more accepted, other text (default: exact)",
    )
    for flag, metavar, text in _THRESHOLDS:
        medusa.add_argument(flag, type=finite_number, metavar=metavar, help=text)


def given_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return what was asked for by name, as the engine's settings call it, `preset` among them."""
    given = {name: getattr(args, name) for name in _NAMES if getattr(args, name) is not None}
    if "medusa" in given:
        given["medusa"] = given["medusa"] == "on"
    return given


def answer_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings: the preset's, and over them what was asked for one by one."""
    given = given_options(args)
    preset = given.pop("preset", None)
    name = next((name for name in PRESETS if name.lower() == preset), None)
    return {**(with_preset({}, name) if name else {}), **given}


def _stop_string(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("a stop string is empty; write the text to end before")
    return text.replace("\\n", "\n").replace("\\t", "\t")


def _bias(text: str) -> tuple[int, float]:
    token, separator, bias = text.partition("=")
    if not separator or not token.strip().isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a token id and a bias such as 42=-1.5")
    return int(token), finite_number(bias)
