"""The `export` subcommand: write draft heads for another program. Arguments in, files and a few sentences out."""

import argparse
import sys
from pathlib import Path

import torch

from engine.errors import EngineError
from engine.models.base_output import open_base
from engine.models.export import FORMATS, export_heads
from engine.models.head_formats import Target, read_heads

__all__ = ["add_arguments", "run"]

DESCRIPTION = """Write trained heads in a layout that other programs load, for example to serve them with vLLM."""

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `export` takes."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    readers = "\n".join(f"  {name:<10} {reader}" for name, reader in FORMATS.items())
    parser.description = DESCRIPTION
    parser.epilog = (
        f"formats and who reads them:\n{readers}\n\n"
        "Only heads trained with `--width none --sees hidden` can be exported; a truncated output fits vllm alone.\n"
        "Heads that a format cannot express are refused, never approximated."
    )
    parser.add_argument("--heads", required=True, help="heads to export: a file or folder in any layout this app loads")
    parser.add_argument("--format", required=True, choices=list(FORMATS), help="the layout to write (see below)")
    parser.add_argument("--out", required=True, type=Path, help="folder to write, new or empty")
    parser.add_argument(
        "--model", default="bundled", help="the model the heads belong to: bundled (default), a folder or a .gguf file"
    )
    parser.add_argument(
        "--base-name",
        help="name or path by which the reader will find that model, written to config.json (default: the model's own)",
    )
    parser.add_argument("--dtype", default="bfloat16", choices=list(_DTYPES), help="float type of the tensors")


def run(args: argparse.Namespace) -> int:
    """Export as told; notes go to standard error. Returns the exit status."""
    try:
        base = open_base(args.model)
        checkpoint = read_heads(args.heads, Target(base.hidden_size, base.vocab_size, base.name, base.lm_head))
        notes = export_heads(
            checkpoint.heads,
            args.format,
            args.out,
            base_name=args.base_name or base.name,
            lm_head=base.lm_head,
            dtype=_DTYPES[args.dtype],
        )
    except EngineError as error:
        print(error, file=sys.stderr)
        return 2
    for note in [*checkpoint.notes, *notes]:
        print(note, file=sys.stderr)
    print(f"Wrote {checkpoint.heads.config.num_heads} heads as {args.format} to {args.out}.")
    return 0
