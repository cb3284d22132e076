"""The `train` subcommand: draft heads from a data folder. Arguments in, one heads file and its checkpoint out."""

import argparse
import math
from pathlib import Path

import torch

from engine.errors import InvalidParameterError
from engine.heads import OUTPUTS, SEES, HeadsConfig, parameter_count
from engine.models.heads_file import STORAGES, save_heads
from engine.training.cli_options import (
    Report,
    add_base_options,
    at_least,
    existing_folder,
    open_model,
    reporter,
    told_in_a_sentence,
)
from engine.training.dataset import TextSet, build_cache, hold_back, load_text, most_used_tokens
from engine.training.dense import TrainingModel
from engine.training.medusa1 import HeadTrainer, TrainingPlan, Vocabulary, build_heads
from engine.training.shards import read_index

__all__ = ["EPILOG", "add_arguments", "run"]

EPILOG = """\
The backbone stays as it is; only the heads learn. Progress is saved beside the heads (.ckpt): the same command goes on
where a stopped one was. Afterwards run calibrate, which chooses the candidate tree.

example:
  python launcher.py train --data data --out heads.safetensors --sees path --epochs 4"""

BATCH_TOKENS = {"cuda": 16384, "cpu": 2048}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `train` takes."""
    add_base_options(parser)
    parser.add_argument("--data", required=True, type=existing_folder, metavar="DIR", help="data of `distill`")
    parser.add_argument("--out", required=True, type=Path, metavar="HEADS", help="the .safetensors file to write")
    parser.add_argument(
        "--recipe", choices=("medusa1", "medusa2"), default="medusa1", help="only medusa1 exists in this version"
    )
    shape = parser.add_argument_group("heads")
    shape.add_argument("--heads", type=at_least(1), default=4, metavar="N", help="number of heads (default: 4)")
    shape.add_argument("--layers", type=at_least(1), default=2, metavar="N", help="blocks a head (default: 2)")
    shape.add_argument(
        "--width", type=_width, default=2048, metavar="N|none", help="inner width; none: the paper's block"
    )
    shape.add_argument("--sees", choices=SEES, default="path", help="tokens seen beside the state (default: path)")
    shape.add_argument("--output", choices=OUTPUTS, default="truncated", help="output matrix (default: truncated)")
    shape.add_argument(
        "--draft-vocab", type=at_least(1), default=16384, metavar="N", help="tokens of a truncated output"
    )
    learn = parser.add_argument_group("learning")
    learn.add_argument("--epochs", type=at_least(0, float), default=4.0, metavar="N", help="default: 4")
    learn.add_argument("--time-limit", type=at_least(1, float), metavar="SECONDS", help="of all starts together")
    learn.add_argument("--learning-rate", type=at_least(0, float), default=1.5e-3, metavar="R", help="default: 0.0015")
    learn.add_argument("--batch-tokens", type=at_least(1), metavar="N", help="tokens a step (default: by device)")
    learn.add_argument("--max-tokens", type=at_least(1), metavar="N", help="tokens of data used (default: by memory)")
    learn.add_argument(
        "--save-every", type=at_least(0, float), default=60.0, metavar="SECONDS", help="checkpoint (default: 60)"
    )
    learn.add_argument("--storage", choices=list(STORAGES), default="int8", help="numbers in the file (default: int8)")


def _width(text: str) -> int | None:
    return None if text == "none" else int(at_least(1)(text))


@told_in_a_sentence
def run(args: argparse.Namespace) -> int:
    """Train and write the heads; returns the exit code."""
    checkpoint = args.out.with_suffix(".ckpt")
    _check(args, checkpoint)
    report = reporter()
    text = load_text(args.data)
    model = open_model(args.model, args.device, report)
    _check_model(args, model)
    train, held = hold_back(text)
    if not train.num_documents:
        raise InvalidParameterError(f"{args.data} holds too little; let distill write at least 20 conversations.")
    train = _limited(args, train, model, report)
    report(f"{train.num_documents:,} conversations, {train.num_tokens:,} tokens; {held.num_documents:,} held back")
    vocabulary = Vocabulary(model, _token_map(args, train, model))
    heads = build_heads(_shape(args, model, vocabulary), vocabulary)
    report(f"{args.heads} heads, {parameter_count(heads):,} parameters")
    cache = build_cache(model, train, report=report)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    trainer = HeadTrainer(heads, vocabulary, cache, _plan(args, train, model), checkpoint)
    if trainer.step:
        report(f"going on at step {trainer.step} of {trainer.total_steps}")
    figures = trainer.run(report)
    save_heads(args.out, heads, {"base_model": model.name}, storage=args.storage)
    loss = f", loss {figures['loss']:.4f}" if figures else ""
    print(f"Wrote {args.heads} heads to {args.out} after {trainer.step} steps{loss}.")
    return 0


def _check(args: argparse.Namespace, checkpoint: Path) -> None:
    if args.recipe == "medusa2":
        raise InvalidParameterError("The recipe medusa2 (training the backbone too) is not available; use medusa1.")
    if args.out.suffix != ".safetensors":
        raise InvalidParameterError(f"--out is {args.out}; a heads file ends in .safetensors.")
    if args.out.exists() and not checkpoint.exists():
        raise InvalidParameterError(f"{args.out} exists and has no checkpoint to go on from; give another --out.")


def _check_model(args: argparse.Namespace, model: TrainingModel) -> None:
    made_by = (read_index(args.data) or {"about": {}})["about"].get("model")
    if made_by not in (None, model.name):
        raise InvalidParameterError(f"{args.data} holds data of {made_by}, not of {model.name}; give its own model.")


def _shape(args: argparse.Namespace, model: TrainingModel, vocabulary: Vocabulary) -> HeadsConfig:
    config = model.backbone.config
    return HeadsConfig(
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        num_heads=args.heads,
        num_layers=args.layers,
        width=args.width,
        sees=args.sees,
        output=args.output,
        draft_vocab=0 if vocabulary.token_map is None else vocabulary.rows.shape[0],
    )


def _token_map(args: argparse.Namespace, train: TextSet, model: TrainingModel) -> torch.Tensor | None:
    vocab = model.backbone.config.vocab_size
    if "truncated" not in args.output:
        return None
    return most_used_tokens(train, min(args.draft_vocab, vocab), vocab)


def _plan(args: argparse.Namespace, train: TextSet, model: TrainingModel) -> TrainingPlan:
    batch = args.batch_tokens or BATCH_TOKENS[model.device.type]
    steps = math.ceil(args.epochs * train.num_tokens / batch)
    return TrainingPlan(
        epochs=args.epochs,
        seconds=float("inf") if args.time_limit is None else args.time_limit,
        batch_tokens=batch,
        learning_rate=args.learning_rate,
        warmup_steps=max(1, min(100, steps // 10)),
        checkpoint_seconds=args.save_every,
    )


def _limited(args: argparse.Namespace, train: TextSet, model: TrainingModel, report: Report) -> TextSet:
    """Return as much of the text as was asked for, or as its hidden states leave room for."""
    row_bytes = 2 * model.backbone.config.hidden_size + 9
    room = int(torch.cuda.mem_get_info()[0] * 0.6) if model.device.type == "cuda" else 4 * 2**30
    limit = args.max_tokens or room // row_bytes
    if train.num_tokens <= limit:
        return train
    fitting = int((train.lengths.cumsum(0) <= limit).sum())
    if not fitting:
        raise InvalidParameterError(f"{limit:,} tokens hold not one conversation; give a larger --max-tokens.")
    report(f"the first {fitting:,} of {train.num_documents:,} conversations are used: {limit:,} tokens is the limit")
    return train.select(torch.arange(fitting))
