"""What the command `distill` does: a model, or a server, answers invented or given questions into a data folder."""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from random import Random

import torch

from engine.errors import InvalidParameterError
from engine.models.loader import open_model as open_weights
from engine.training.batch_decoder import BatchDecoder
from engine.training.chat_format import ChatFormat, read_chat_format
from engine.training.cli_options import Report, open_model, reporter, told_in_a_sentence
from engine.training.dense import TrainingModel
from engine.training.dialogues import DialoguePlan, GivenPrompt, Script
from engine.training.distill import DistillGoal, distill, remember_queries
from engine.training.evaluate import kept_out_prompts
from engine.training.filters import QueryFilter
from engine.training.prompt_file import Message, PromptFile, read_prompt_file
from engine.training.server_answers import ChatServer
from engine.training.server_distill import ServerDistiller
from engine.training.shards import ShardWriter, read_documents

__all__ = ["run"]

SLOTS = {"cuda": 3072, "cpu": 16}
SHARD_TOKENS = {"cuda": 1_000_000, "cpu": 10_000}  # about half a minute to two minutes of work that a kill can cost


@told_in_a_sentence
def run(args: argparse.Namespace, conversations: Sequence[list[Message]] | None = None) -> int:
    """Fill the data folder; returns the exit code. `conversations` are prompts from elsewhere than a file."""
    given = _given(args, conversations)
    if args.tokens is None and given is None:
        raise InvalidParameterError("distill needs --tokens N or --prompts FILE: how much is to be written?")
    report = reporter()
    goal = DistillGoal(args.tokens or sys.maxsize, float("inf") if args.time_limit is None else args.time_limit)
    writer = _from_server(args, given, goal, report) if args.server else _from_model(args, given, goal, report)
    documents = sum(shard["documents"] for shard in writer.index["shards"])
    totals = f"{documents:,} conversations, {writer.num_tokens:,} tokens, {writer.num_labels:,} answered"
    print(f"{args.out} holds {totals}.")
    return 0


def _given(args: argparse.Namespace, conversations: Sequence[list[Message]] | None) -> PromptFile | None:
    if conversations is not None:
        content = json.dumps(list(conversations))
        return PromptFile(list(conversations), hashlib.sha256(content.encode()).hexdigest()[:16])
    if args.prompts is not None:
        return read_prompt_file(args.prompts)
    if args.server:
        raise InvalidParameterError("--server answers given questions; add --prompts FILE or --conversations.")
    return None


def _from_model(args: argparse.Namespace, given: PromptFile | None, goal: DistillGoal, report: Report) -> ShardWriter:
    model = open_model(args.model, args.device, report)
    about = {"model": model.name, "prompts": given.digest if given else None, "server": None}
    writer = ShardWriter(args.out, about, args.shard_tokens or SHARD_TOKENS[model.device.type])
    if writer.num_tokens < goal.tokens:
        _fill(args, model, writer, given, goal, report)
    return writer


def _from_server(args: argparse.Namespace, given: PromptFile | None, goal: DistillGoal, report: Report) -> ShardWriter:
    assert given is not None, "checked with the arguments"
    server = ChatServer(args.server, args.server_model or "", _key(args.api_key_env)).named()
    source = open_weights(args.model)  # its tokenizer; weights stay on the disk until they are used
    about = {"model": source.name, "prompts": given.digest, "server": f"{server.url} {server.model}"}
    writer = ShardWriter(args.out, about, args.shard_tokens or SHARD_TOKENS["cpu"])
    prompts = _open_prompts(writer, given, report)
    report(f"{server.model} at {server.url}: {len(prompts):,} prompts to answer")
    plan = DialoguePlan(max_answer=args.max_answer)
    if prompts and writer.num_tokens < goal.tokens:
        distiller = ServerDistiller(server, source.tokenizer, plan, at_once=args.slots or 8, seed=args.seed)
        distiller.run(prompts, writer, goal, report)
    return writer


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    if not os.environ.get(variable):
        raise InvalidParameterError(f"The environment variable {variable} is empty; put the server's key into it.")
    return os.environ[variable]


def _fill(
    args: argparse.Namespace,
    model: TrainingModel,
    writer: ShardWriter,
    given: PromptFile | None,
    goal: DistillGoal,
    report: Report,
) -> None:
    plan = DialoguePlan(max_answer=args.max_answer)
    queries, random = QueryFilter(kept_out_prompts()), Random(args.seed * 100_003 + writer.num_shards)
    if given is None:
        chat, prompts = read_chat_format(model.tokenizer), None
        capacity = 512 + args.max_answer
        if writer.num_shards:
            remember_queries(args.out, queries, model.tokenizer, chat)
    else:
        tokenizer = model.tokenizer
        chat = _end_token_only(model)
        prompts = [
            GivenPrompt(tokenizer.encode_chat(messages), number)
            for number, messages in _open_prompts(writer, given, report)
        ]
        if not prompts:
            report("every prompt of the file is answered")
            return
        capacity = max(len(prompt.tokens) for prompt in prompts) + args.max_answer + 1
    slots = _slots(args, model, capacity)
    slots = slots if prompts is None else min(slots, len(prompts))
    decoder = BatchDecoder(model.backbone, slots, capacity, sorted(model.tokenizer.end_token_ids), chat.default_opening)
    decoder.capture()
    report(f"{slots} conversations at once of up to {capacity} tokens")
    source = None if prompts is None else iter(prompts)
    script = Script(model.tokenizer, chat, plan, queries, capacity, random, source, reject=writer.reject)
    try:
        distill(decoder, script, writer, goal, report)
    except KeyboardInterrupt:
        writer.flush()  # what is complete is not given away
        raise


def _open_prompts(writer: ShardWriter, given: PromptFile, report: Report) -> list[tuple[int, list[Message]]]:
    """Return the prompts, with their numbers, that nothing in the folder settles and nobody is judged by."""
    settled = set(writer.rejected)
    if writer.num_shards:
        settled |= {document.source for document in read_documents(writer.folder)}
    queries = QueryFilter(kept_out_prompts())
    held_out = {number for number, messages in enumerate(given.prompts) if queries.is_held_out(messages[-1]["content"])}
    if held_out:
        report(f"{len(held_out):,} prompts are left out: heads are judged by these, or by nearly the same ones")
    return [
        (number, messages)
        for number, messages in enumerate(given.prompts)
        if number not in settled and number not in held_out
    ]


def _end_token_only(model: TrainingModel) -> ChatFormat:
    """Return a format for answering alone, which works with any chat template."""
    return ChatFormat(min(model.tokenizer.end_token_ids), (), (), (), (), ())


def _slots(args: argparse.Namespace, model: TrainingModel, capacity: int) -> int:
    """Return the slots asked for, or as many as half the GPU's free memory holds."""
    most = args.slots or SLOTS[model.device.type]
    if model.device.type == "cpu" or args.slots:
        return most
    config = model.backbone.config
    slot_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * capacity * 2
    return max(1, min(most, torch.cuda.mem_get_info()[0] // 2 // slot_bytes))
