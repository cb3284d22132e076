"""The `calibrate` subcommand: measure draft heads and choose their candidate trees, as JSON beside the heads."""

import argparse
from pathlib import Path
from random import Random

from engine.errors import InvalidParameterError
from engine.native_drafter import FREQUENT_TOKENS
from engine.nested_tree import tree_file
from engine.training.calibrate import calibrate, expected_worth, write_calibration
from engine.training.chat_format import read_chat_format
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
from engine.training.dataset import TextSet, build_cache, hold_back, load_text
from engine.training.dense import TrainingModel
from engine.training.evaluate import calibration_prompts, greedy_answers, kept_out_prompts
from engine.training.filters import QueryFilter
from engine.training.medusa1 import Vocabulary
from engine.training.pruned_worth import with_pruned
from engine.training.ranks import measure_ranks
from engine.training.topics import draw_request

__all__ = ["EPILOG", "add_arguments", "run"]

EPILOG = """\
Where each head ranks the tokens that really follow decides which guesses are worth a place in the tree. Without --data
the model answers prompts made for this; with it, the conversations that `train` held back from the same folder serve.

example:
  python launcher.py calibrate --heads heads.safetensors"""

ANSWERS = {"cuda": 64, "cpu": 24}
SEED = 77  # of what is asked beyond the written prompts: other requests than distillation draws first


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `calibrate` takes."""
    add_base_options(parser)
    add_quantize_option(parser)
    parser.add_argument("--heads", required=True, type=Path, metavar="HEADS", help="heads in any layout this app loads")
    parser.add_argument("--data", type=existing_folder, metavar="DIR", help="use the conversations held back there")
    parser.add_argument("--answers", type=at_least(2), metavar="N", help="prompts to answer (default: by device)")
    parser.add_argument(
        "--max-answer", type=at_least(8), default=256, metavar="N", help="longest of these answers (default: 256)"
    )


@told_in_a_sentence
def run(args: argparse.Namespace) -> int:
    """Measure, choose, write the calibration; returns the exit code."""
    if not args.heads.exists():
        raise InvalidParameterError(f"There are no heads at {args.heads}; train some or check the path.")
    report = reporter()
    text = hold_back(load_text(args.data))[1] if args.data is not None else None
    model = open_model(args.model, args.device, report, args.quantize)
    heads = open_heads(args.heads, model, report)
    text = _own_answers(args, model, report) if text is None else text
    cache, vocabulary = build_cache(model, text, heads=heads), Vocabulary(model, heads.token_map)
    measured = measure_ranks(heads, cache, vocabulary)
    if measured.num_answers < 2:
        raise InvalidParameterError(f"{measured.num_answers} answers are too few to calibrate on; leave --data out.")
    report("having the heads fill whole trees")
    calibration = with_pruned(calibrate(measured), measured, heads, cache, vocabulary, FREQUENT_TOKENS)
    path = tree_file(args.heads)
    write_calibration(path, calibration, {"heads": args.heads.name, "model": model.name})
    print(f"Wrote {path}: {expected_worth(calibration)}.")
    return 0


def _own_answers(args: argparse.Namespace, model: TrainingModel, report: Report) -> TextSet:
    wanted = args.answers or ANSWERS[model.device.type]
    queries, random, prompts = QueryFilter(kept_out_prompts()), Random(SEED), calibration_prompts()[:wanted]
    while len(prompts) < wanted:
        request = draw_request(random)
        if queries.accept(request):
            prompts.append(request)
    report(f"answering {wanted} prompts to measure on")
    return greedy_answers(model, read_chat_format(model.tokenizer), prompts, args.max_answer)
