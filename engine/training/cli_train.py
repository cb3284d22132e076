"""The `train` subcommand: draft heads, or a model together with its heads, from a data folder.

Arguments in; one heads file or one model folder, and the checkpoint, out.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch

from engine.backbone import BackboneConfig
from engine.build import choose_device
from engine.errors import InvalidParameterError
from engine.heads import OUTPUTS, SEES, HeadsConfig, MedusaHeads, parameter_count
from engine.kernels.fused_ops import MAX_MIDDLE
from engine.models.heads_file import STORAGES, save_heads
from engine.prefix_attention import PrefixConfig
from engine.training.checkpoint import saved_settings
from engine.training.cli_options import (
    Report,
    add_base_options,
    add_quantize_option,
    at_least,
    existing_folder,
    open_heads,
    open_model,
    reporter,
    told_in_a_sentence,
)
from engine.training.dataset import TextSet, hold_back, load_text, most_used_tokens
from engine.training.dense import TrainingModel
from engine.training.joint_result import train_jointly
from engine.training.medusa1 import PREFIX_WINDOW, HeadTrainer, TrainingPlan, Vocabulary, build_heads
from engine.training.medusa2 import JointPlan
from engine.training.processes import Processes, open_processes
from engine.training.shards import read_index
from engine.training.windows import build_lanes

__all__ = ["EPILOG", "add_arguments", "run"]

EPILOG = """\
With the recipe medusa1 the model stays as it is and only the heads learn; afterwards run calibrate, which chooses the
candidate tree. With medusa2 the model learns too, through adapters that are held to what it said before; the result is
a new model folder with its heads and their tree, which the app opens with --model FOLDER. Give it trained heads to
start from (--start-heads); without, the heads learn alone first.

Progress is saved beside the result (.ckpt): the same command goes on where a stopped one was.

For several GPUs start it through accelerate from .venv, one process a GPU (processes on a CPU: --multi_gpu there too,
and --device cpu here). Every step's text is shared out; a stopped run may go on with another number of processes.

examples:
  python launcher.py train --data data --out heads.safetensors --sees path --epochs 4
  python launcher.py train --data data --out tuned --recipe medusa2 --start-heads heads.safetensors
  .venv/bin/accelerate launch --multi_gpu --num_processes 2 launcher.py train --data data --out heads.safetensors"""

EPOCHS = {"medusa1": 4.0, "medusa2": 1.0}
RATES = {"medusa1": TrainingPlan.learning_rate, "medusa2": JointPlan.learning_rate}
HEADS_ALONE = 0.3  # of a joint training that starts with fresh heads

BATCH_TOKENS = {"cuda": 16384, "cpu": 2048}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `train` takes."""
    add_base_options(parser)
    add_quantize_option(parser)
    parser.add_argument("--data", required=True, type=existing_folder, metavar="DIR", help="data of `distill`")
    parser.add_argument(
        "--out", required=True, type=Path, metavar="PATH", help="the .safetensors file to write; medusa2: the folder"
    )
    parser.add_argument(
        "--recipe", choices=("medusa1", "medusa2"), default="medusa1", help="heads alone (default), or the model too"
    )
    parser.add_argument(
        "--start-heads", type=Path, metavar="HEADS", help="go on from these heads; their shape and vocabulary stay"
    )
    _add_shape(parser)
    _add_learning(parser)
    _add_joint(parser)


def _add_shape(parser: argparse.ArgumentParser) -> None:
    shape = parser.add_argument_group("heads")
    shape.add_argument("--heads", type=at_least(1), default=4, metavar="N", help="number of heads (default: 4)")
    shape.add_argument("--layers", type=at_least(1), default=2, metavar="N", help="blocks a head (default: 2)")
    shape.add_argument(
        "--width", type=_width, default=2048, metavar="N|none", help="inner width; none: the paper's block"
    )
    shape.add_argument("--sees", choices=SEES, default="path", help="tokens seen beside the state (default: path)")
    shape.add_argument(
        "--prefix-layers",
        type=_layers,
        default="auto",
        metavar="auto|none|N,N",
        help="layers, from 0, that a prefix attention reads too (default: two in the middle; with --width none, none)",
    )
    shape.add_argument("--output", choices=OUTPUTS, default="truncated", help="output matrix (default: truncated)")
    shape.add_argument(
        "--draft-vocab", type=at_least(1), default=16384, metavar="N", help="tokens of a truncated output"
    )


def _add_learning(parser: argparse.ArgumentParser) -> None:
    learn = parser.add_argument_group("learning")
    learn.add_argument("--epochs", type=at_least(0, float), metavar="N", help="default: 4; medusa2: 1")
    learn.add_argument("--time-limit", type=at_least(1, float), metavar="SECONDS", help="of all starts together")
    learn.add_argument(
        "--learning-rate",
        type=at_least(0, float),
        metavar="R",
        help="default: 0.0015; medusa2: 0.0005 for the model, and four times that for the heads",
    )
    learn.add_argument(
        "--batch-tokens", type=at_least(1), metavar="N", help="tokens a step, of all processes (default: by device)"
    )
    learn.add_argument("--max-tokens", type=at_least(1), metavar="N", help="tokens of data used (default: by memory)")
    learn.add_argument(
        "--save-every", type=at_least(0, float), default=60.0, metavar="SECONDS", help="checkpoint (default: 60)"
    )
    learn.add_argument("--storage", choices=list(STORAGES), default="int8", help="numbers in the file (default: int8)")


def _add_joint(parser: argparse.ArgumentParser) -> None:
    joint = parser.add_argument_group("medusa2")
    joint.add_argument(
        "--lambda0",
        type=at_least(0, float),
        default=JointPlan.lambda0,
        metavar="X",
        help=f"weight of the heads' loss beside the model's; more moves the model more (default: {JointPlan.lambda0})",
    )
    joint.add_argument(
        "--heads-first",
        type=at_least(0, float),
        metavar="SHARE",
        help=f"part in which only the heads learn (default: 0 with --start-heads, else {HEADS_ALONE})",
    )
    joint.add_argument(
        "--ramp",
        type=at_least(0, float),
        default=JointPlan.ramp,
        metavar="SHARE",
        help=f"part over which lambda0 rises to its value (default: {JointPlan.ramp})",
    )


def _width(text: str) -> int | None:
    return None if text == "none" else int(at_least(1)(text))


def _layers(text: str) -> str | tuple[int, ...]:
    return text if text in ("auto", "none") else tuple(sorted({int(at_least(0)(part)) for part in text.split(",")}))


@told_in_a_sentence
def run(args: argparse.Namespace) -> int:
    """Train and write the result; returns the exit code."""
    is_joint = args.recipe == "medusa2"
    checkpoint = args.out.with_name(args.out.name + ".ckpt") if is_joint else args.out.with_suffix(".ckpt")
    _check(args, checkpoint)
    text = load_text(args.data)
    processes = open_processes(choose_device(args.device))
    report = processes.spoken(reporter())
    model = open_model(args.model, args.device, report, args.quantize)
    _check_model(args, model)
    train, held = hold_back(text)
    if not train.num_documents:
        raise InvalidParameterError(f"{args.data} holds too little; let distill write at least 20 conversations.")
    _adopt(args, saved_settings(checkpoint))
    given = None if args.start_heads is None else open_heads(args.start_heads, model, report)
    prefix = _prefix(args, model.backbone.config) if given is None else given.config.prefix
    layers = () if prefix is None else prefix.layers
    train = _limited(args, train, model, len(layers), processes, report)
    report(f"{train.num_documents:,} conversations, {train.num_tokens:,} tokens; {held.num_documents:,} held back")
    heads, vocabulary = _heads(args, train, model, given, prefix)
    report(f"{heads.config.num_heads} heads, {parameter_count(heads):,} parameters")
    plan = _plan(args, train, model, processes, heads)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if not processes.is_alone:
        report(f"{processes.count} processes share every step of {plan.batch_tokens:,} tokens")
    torch.manual_seed(plan.seed + processes.index)  # the heads are made, and alike; nothing random need be alike now
    if isinstance(plan, JointPlan):
        line = train_jointly(
            model, heads, vocabulary, train, held, plan, checkpoint, args.out, args.storage, report, processes
        )
    else:
        lanes = build_lanes(model, train, plan.window, processes, report, layers)
        trainer = HeadTrainer(heads, vocabulary, lanes, plan, checkpoint, processes)
        line = _train_heads(args, model, trainer, report)
    if line:
        print(line)
    return 0


def _train_heads(args: argparse.Namespace, model: TrainingModel, trainer: HeadTrainer, report: Report) -> str:
    """Train heads alone; the first process writes them and returns the line that says so."""
    figures = trainer.run_reported(report)
    trainer.processes.close()
    if not trainer.processes.is_first:
        return ""
    heads = trainer.heads
    save_heads(args.out, heads, {"base_model": model.name}, storage=args.storage)
    loss = f", loss {figures['loss']:.4f}" if figures else ""
    return f"Wrote {heads.config.num_heads} heads to {args.out} after {trainer.step} steps{loss}."


def _check(args: argparse.Namespace, checkpoint: Path) -> None:
    is_file = args.out.suffix == ".safetensors"
    if args.recipe == "medusa1" and not is_file:
        raise InvalidParameterError(f"--out is {args.out}; a heads file ends in .safetensors.")
    if args.recipe == "medusa2" and is_file:
        raise InvalidParameterError(f"--out is {args.out}; medusa2 writes a model, so name a folder.")
    if args.out.exists() and not checkpoint.exists():
        raise InvalidParameterError(f"{args.out} exists and has no checkpoint to go on from; give another --out.")
    if args.start_heads is not None and not args.start_heads.exists():
        raise InvalidParameterError(f"There are no heads at {args.start_heads}; check --start-heads.")


def _heads(
    args: argparse.Namespace,
    train: TextSet,
    model: TrainingModel,
    given: MedusaHeads | None,
    prefix: PrefixConfig | None,
) -> tuple[MedusaHeads, Vocabulary]:
    """Return the heads to train, given or fresh with this prefix attention, and their vocabulary."""
    if given is not None:
        return given, Vocabulary(model, given.token_map)
    vocabulary = Vocabulary(model, _token_map(args, train, model))
    return build_heads(_shape(args, model, vocabulary, prefix), vocabulary), vocabulary


def _check_model(args: argparse.Namespace, model: TrainingModel) -> None:
    made_by = (read_index(args.data) or {"about": {}})["about"].get("model")
    if made_by not in (None, model.name):
        raise InvalidParameterError(f"{args.data} holds data of {made_by}, not of {model.name}; give its own model.")


def _shape(
    args: argparse.Namespace, model: TrainingModel, vocabulary: Vocabulary, prefix: PrefixConfig | None
) -> HeadsConfig:
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
        frequent_first=vocabulary.token_map is not None,
        prefix=prefix,
    )


def _prefix(args: argparse.Namespace, config: BackboneConfig) -> PrefixConfig | None:
    """Return the shape of the prefix attention that was asked for; raises InvalidParameterError for other layers.

    The paper's heads get none by themselves: other programs have no words for it, and serve heads of that kind.
    """
    if args.prefix_layers == "none" or (args.prefix_layers == "auto" and args.width is None):
        return None
    if args.prefix_layers == "auto":
        return PrefixConfig.of(config)
    layers = args.prefix_layers
    if len(layers) > MAX_MIDDLE or layers[-1] >= config.num_layers:
        raise InvalidParameterError(
            f"--prefix-layers names {', '.join(map(str, layers))}; up to {MAX_MIDDLE} layers from 0 to "
            f"{config.num_layers - 1} can be read."
        )
    return PrefixConfig.of(config, layers)


def _token_map(args: argparse.Namespace, train: TextSet, model: TrainingModel) -> torch.Tensor | None:
    vocab = model.backbone.config.vocab_size
    if "truncated" not in args.output:
        return None
    return most_used_tokens(train, min(args.draft_vocab, vocab), vocab)


def _adopt(args: argparse.Namespace, saved: dict[str, Any]) -> None:
    """Let a run that goes on keep what depends on the machine: its tokens a step and its part of the data."""
    args.batch_tokens = args.batch_tokens or saved.get("batch_tokens")
    args.max_tokens = args.max_tokens or saved.get("tokens")


def _plan(
    args: argparse.Namespace, train: TextSet, model: TrainingModel, processes: Processes, heads: MedusaHeads
) -> TrainingPlan:
    batch = args.batch_tokens or BATCH_TOKENS[model.device.type] * processes.count
    epochs = EPOCHS[args.recipe] if args.epochs is None else args.epochs
    steps = math.ceil(epochs * train.num_tokens / batch)
    plan = TrainingPlan(
        epochs=epochs,
        seconds=float("inf") if args.time_limit is None else args.time_limit,
        batch_tokens=batch,
        window=TrainingPlan.window if heads.prefix is None else _prefix_window(batch, model, heads),
        learning_rate=RATES[args.recipe] if args.learning_rate is None else args.learning_rate,
        warmup_steps=max(1, min(100, steps // 10)),
        checkpoint_seconds=args.save_every,
    )
    if args.recipe == "medusa1":
        return plan
    alone = args.heads_first
    if alone is None:
        alone = HEADS_ALONE if args.start_heads is None else 0.0
    return JointPlan(**vars(plan), lambda0=args.lambda0, heads_first=alone, ramp=args.ramp)


def _prefix_window(batch: int, model: TrainingModel, heads: MedusaHeads) -> int:
    """Return how far a prefix attention learns to look back: with the tokens guessed, no further than positions go."""
    room = model.backbone.config.max_positions - heads.config.num_heads - 1
    return min(PREFIX_WINDOW, batch, room)


def _limited(
    args: argparse.Namespace,
    train: TextSet,
    model: TrainingModel,
    num_middle: int,
    processes: Processes,
    report: Report,
) -> TextSet:
    """Return as much of the text as was asked for, or as what all processes keep of it leaves room for."""
    kept = 0 if args.recipe == "medusa2" else model.backbone.config.hidden_size
    row_bytes = (2 + num_middle) * kept + 9  # hidden states in 16 bits, and the features of middle layers in 8
    room = int(torch.cuda.mem_get_info()[0] * 0.6) if model.device.type == "cuda" else 4 * 2**30
    shares = processes.count if kept else 1  # states are shared out, text is not
    limit = args.max_tokens or processes.smallest(room) * shares // row_bytes
    if train.num_tokens <= limit:
        return train
    fitting = int((train.lengths.cumsum(0) <= limit).sum())
    if not fitting:
        raise InvalidParameterError(f"{limit:,} tokens hold not one conversation; give a larger --max-tokens.")
    report(f"the first {fitting:,} of {train.num_documents:,} conversations are used: {limit:,} tokens is the limit")
    return train.select(torch.arange(fitting))
