"""What the training commands share: value checks, the progress line, and errors as one sentence with exit code 2."""

import argparse
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from engine.build import choose_device
from engine.errors import EngineError
from engine.heads import MedusaHeads
from engine.models.head_formats import Target, read_heads
from engine.training.dense import TrainingModel, load_model
from engine.training.kernel_checks import check_kernels
from engine.training.processes import is_first_of_launch
from engine.training.quantized import QUANTIZE

__all__ = [
    "Report",
    "add_base_options",
    "add_quantize_option",
    "at_least",
    "existing_folder",
    "open_heads",
    "open_model",
    "reporter",
    "told_in_a_sentence",
]

BAD_INPUT = 2
Report = Callable[[str], None]
Command = Callable[..., int]


def add_base_options(parser: argparse.ArgumentParser) -> None:
    """Add --model and --device."""
    parser.add_argument(
        "--model", default="bundled", metavar="NAME|PATH", help="bundled (default), a model folder or a .gguf file"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute (default: auto)"
    )


def add_quantize_option(parser: argparse.ArgumentParser) -> None:
    """Add --quantize, as `train` and `calibrate` have it."""
    parser.add_argument(
        "--quantize",
        choices=QUANTIZE,
        default="none",
        help="format of the frozen model's linears: bfloat16 (none), or bitsandbytes' nf4 or int8",
    )


def at_least(low: float, kind: type = int) -> Callable[[str], float]:
    """Return an argparse type for numbers of `kind` not below `low`."""

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not value >= low:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} of {low} or more")
        return value

    return convert


def reporter() -> Report:
    """Return a function that writes lines with the seconds since now to standard error."""
    start = time.monotonic()
    return lambda line: print(f"[{time.monotonic() - start:7.1f} s] {line}", file=sys.stderr, flush=True)


def open_model(model: str, device: str, report: Report, quantize: str = "none") -> TrainingModel:
    """Load a model for training on the chosen device, its linears in the format `quantize`."""
    chosen = choose_device(device)
    torch.set_float32_matmul_precision("highest")
    loaded = load_model(model, chosen, quantize=quantize)
    report(f"{loaded.name} loaded on {chosen}{'' if quantize == 'none' else f', linears in {quantize}'}")
    if chosen == "cuda":
        check_kernels(report)
    return loaded


def open_heads(path: Path, model: TrainingModel, report: Report) -> MedusaHeads:
    """Load heads of any layout that belong to `model`, in float32 on its device.

    Raises CheckpointMismatchError for another model's.
    """
    config = model.backbone.config
    target = Target(config.hidden_size, config.vocab_size, model.name, lambda: model.lm_head_weight.cpu())
    checkpoint = read_heads(path, target)
    for note in checkpoint.notes:
        report(note)
    prefix = checkpoint.heads.config.prefix
    if prefix is not None:
        prefix.check_fits(config)
    return checkpoint.heads.float().to(model.device)


def told_in_a_sentence(command: Command) -> Command:
    """Wrap a command: what a person can act on becomes one line on standard error and exit code 2.

    Of several processes the first speaks where all refuse the same, and each of what happens to it alone.
    """

    @wraps(command)
    def run(*given: Any) -> int:
        try:
            return command(*given)
        except EngineError as error:
            sentence = str(error) if is_first_of_launch() else ""
        except OSError as error:
            sentence = str(error)
        except torch.OutOfMemoryError as error:
            sentence = f"The device ran out of memory ({error}); close other programs or lower the limits in --help."
        if sentence:
            print(" ".join(sentence.split()), file=sys.stderr)
        return BAD_INPUT

    return run


def existing_folder(text: str) -> Path:
    """Convert as an argparse type; the folder has to be there."""
    path = Path(text).expanduser()
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path}")
    return path
