"""Heads that guess among the most used draft tokens alone: what that brings is measured, kept, and chosen by."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_training_medusa2 import random_text, small_heads, small_model

from engine.nested_tree import NestedTree, tree_file
from engine.training.calibrate import calibrate, write_calibration
from engine.training.dataset import build_cache
from engine.training.evaluate import calibration_prompts, evaluation_prompts, kept_out_prompts
from engine.training.filters import QueryFilter
from engine.training.loop import TrainingPlan
from engine.training.losses import IGNORED
from engine.training.medusa1 import HeadTrainer, Vocabulary, build_heads
from engine.training.pruned_worth import with_pruned
from engine.training.ranks import measure_ranks


@pytest.mark.parametrize("frequent", [0, 60, 150])
def test_a_calibration_knows_what_a_cut_vocabulary_brings(tmp_path: Path, frequent: int) -> None:
    model = small_model()
    vocabulary = Vocabulary(model, torch.arange(0, 150))
    heads = build_heads(replace(small_heads(vocabulary), frequent_first=True), vocabulary)
    cache = build_cache(model, random_text())
    plan = TrainingPlan(epochs=30, batch_tokens=256, window=32, warmup_steps=5)
    HeadTrainer(heads, vocabulary, cache, plan).run(lambda line: None)
    ranks = measure_ranks(heads, cache, vocabulary)
    calibration = with_pruned(calibrate(ranks), ranks, heads, cache, vocabulary, frequent)
    path = tmp_path / "heads.safetensors"
    write_calibration(tree_file(path), calibration)
    whole, cut = NestedTree.beside(path).expected, NestedTree.beside(path, frequent).expected
    assert whole == tuple(tuple(round(value, 4) for value in row) for row in calibration.by_depth)
    if frequent == 60:  # of 150: most true tokens cannot be guessed
        assert [len(row) for row in cut] == [len(row) for row in whole]
        assert 1.0 < cut[-1][-1] < whole[-1][-1] - 0.1
        assert NestedTree.beside(path, 61).expected == whole
    else:
        assert cut == whole and json.loads(tree_file(path).read_text())["frequent_tokens"] == 0


def test_a_cut_vocabulary_is_the_beginning_of_the_whole() -> None:
    model = small_model()
    whole = Vocabulary(model, torch.arange(149, -1, -1))
    cut = whole.first(20)
    assert torch.equal(cut.rows, whole.rows[:20]) and cut.token_map.tolist() == list(range(149, 129, -1))
    assert cut.place[149] == 0 and cut.place[130] == 19 and cut.place[129] == IGNORED and whole.place[129] == 20


def test_no_training_text_comes_near_the_prompts_that_heads_are_chosen_and_judged_by() -> None:
    prompts = kept_out_prompts()
    assert len(prompts) == len(set(prompts)) == len(evaluation_prompts()) + len(calibration_prompts())
    queries = QueryFilter(prompts)
    assert not any(queries.accept(prompt) for prompt in prompts)
