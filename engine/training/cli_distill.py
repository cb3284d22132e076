"""The `distill` subcommand: let a model write its own training data. Arguments in, shards of a data folder out."""

import argparse
import sys
from pathlib import Path
from random import Random

import torch

from engine.errors import InvalidParameterError
from engine.training.batch_decoder import BatchDecoder
from engine.training.chat_format import ChatFormat, read_chat_format
from engine.training.cli_options import Report, add_base_options, at_least, open_model, reporter, told_in_a_sentence
from engine.training.dense import TrainingModel
from engine.training.dialogues import DialoguePlan, GivenPrompt, Script
from engine.training.distill import DistillGoal, distill, remember_queries
from engine.training.evaluate import evaluation_prompts
from engine.training.filters import QueryFilter
from engine.training.prompt_file import PromptFile, read_prompt_file
from engine.training.shards import ShardWriter, read_documents

__all__ = ["EPILOG", "add_arguments", "run"]

EPILOG = """\
The model writes questions and answers them; no data set is needed. With --prompts it answers the prompts of a file
instead: plain text, one a line, or .jsonl with {"prompt": "...", "system": "..."} a line ("system" may be left out).
Stop it whenever you like: the same command goes on after the last finished shard.

example:
  python launcher.py distill --out data --tokens 30000000"""

SLOTS = {"cuda": 3072, "cpu": 16}
SHARD_TOKENS = {"cuda": 1_000_000, "cpu": 10_000}  # about half a minute to two minutes of work that a kill can cost


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `distill` takes."""
    add_base_options(parser)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="data folder, new or to be continued")
    parser.add_argument("--tokens", type=at_least(1), metavar="N", help="tokens to keep, earlier runs included")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="answer these instead of invented questions")
    parser.add_argument("--time-limit", type=at_least(0, float), metavar="SECONDS", help="stop after this time")
    parser.add_argument(
        "--max-answer", type=at_least(8), default=320, metavar="N", help="longest answer in tokens (default: 320)"
    )
    parser.add_argument(
        "--slots", type=at_least(1), metavar="N", help="conversations written at once (default: by memory)"
    )
    parser.add_argument(
        "--shard-tokens", type=at_least(1), metavar="N", help="tokens a file (default: 1000000 on a GPU, else 10000)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="another seed gives other questions")


@told_in_a_sentence
def run(args: argparse.Namespace) -> int:
    """Fill the data folder; returns the exit code."""
    if args.tokens is None and args.prompts is None:
        raise InvalidParameterError("distill needs --tokens N or --prompts FILE: how much is to be written?")
    given = read_prompt_file(args.prompts) if args.prompts is not None else None
    report = reporter()
    model = open_model(args.model, args.device, report)
    writer = ShardWriter(
        args.out, {"model": model.name, "prompts": given.digest if given else None}, _shard_tokens(args, model)
    )
    _check_same_prompts(writer, given, args.out)
    goal = DistillGoal(args.tokens or sys.maxsize, float("inf") if args.time_limit is None else args.time_limit)
    if writer.num_tokens < goal.tokens:
        _fill(args, model, writer, given, goal, report)
    documents = sum(shard["documents"] for shard in writer.index["shards"])
    totals = f"{documents:,} conversations, {writer.num_tokens:,} tokens, {writer.num_labels:,} answered"
    print(f"{args.out} holds {totals}.")
    return 0


def _fill(
    args: argparse.Namespace,
    model: TrainingModel,
    writer: ShardWriter,
    given: PromptFile | None,
    goal: DistillGoal,
    report: Report,
) -> None:
    plan = DialoguePlan(max_answer=args.max_answer)
    queries, random = QueryFilter(evaluation_prompts()), Random(args.seed * 100_003 + writer.num_shards)
    if given is None:
        chat, prompts = read_chat_format(model.tokenizer), None
        capacity = 512 + args.max_answer
        if writer.num_shards:
            remember_queries(args.out, queries, model.tokenizer, chat)
    else:
        chat, prompts = _end_token_only(model), _open_prompts(args.out, model, given, writer.num_shards > 0)
        if not prompts:
            report("every prompt of the file is answered")
            return
        capacity = max(len(prompt.tokens) for prompt in prompts) + args.max_answer + 1
    slots = _slots(args, model, capacity)
    slots = slots if prompts is None else min(slots, len(prompts))
    decoder = BatchDecoder(
        model.backbone, slots, capacity, sorted(model.tokenizer.end_token_ids), chat.default_opening
    )
    decoder.capture()
    report(f"{slots} conversations at once of up to {capacity} tokens")
    source = None if prompts is None else iter(prompts)
    script = Script(model.tokenizer, chat, plan, queries, capacity, random, source)
    try:
        distill(decoder, script, writer, goal, report)
    except KeyboardInterrupt:
        writer.flush()  # what is complete is not given away
        raise


def _open_prompts(folder: Path, model: TrainingModel, given: PromptFile, has_data: bool) -> list[GivenPrompt]:
    """Return the prompts that no finished shard answers."""
    answered = {document.source for document in read_documents(folder)} if has_data else set()
    tokenizer = model.tokenizer
    return [
        GivenPrompt(tokenizer.encode_chat(messages), number)
        for number, messages in enumerate(given.prompts)
        if number not in answered
    ]


def _check_same_prompts(writer: ShardWriter, given: PromptFile | None, folder: Path) -> None:
    digest = given.digest if given else None
    if writer.index["about"].get("prompts") != digest:
        raise InvalidParameterError(
            f"{folder} was begun with other prompts (or none) than are given now; give another --out."
        )


def _end_token_only(model: TrainingModel) -> ChatFormat:
    """Return a format for answering alone, which works with any chat template."""
    return ChatFormat(min(model.tokenizer.end_token_ids), (), (), (), (), ())


def _shard_tokens(args: argparse.Namespace, model: TrainingModel) -> int:
    return args.shard_tokens or SHARD_TOKENS[model.device.type]


def _slots(args: argparse.Namespace, model: TrainingModel, capacity: int) -> int:
    """Return the slots asked for, or as many as half the GPU's free memory holds."""
    most = args.slots or SLOTS[model.device.type]
    if model.device.type == "cpu" or args.slots:
        return most
    config = model.backbone.config
    slot_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * capacity * 2
    return max(1, min(most, torch.cuda.mem_get_info()[0] // 2 // slot_bytes))
