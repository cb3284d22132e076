"""Prefix attention of draft heads: what heads read, on the torch runner and in training, and that it pays."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from small_decoder import CONFIG
from test_training_medusa2 import random_text, small_heads, small_model

from engine.attention import attend_prefill
from engine.errors import CheckpointMismatchError, InvalidParameterError
from engine.heads import MedusaHeads
from engine.kv_cache import KVCache
from engine.models.heads_file import heads_config_of, load_heads, save_heads
from engine.prefix_attention import PrefixAttention, PrefixConfig, feature
from engine.torch_runner import TorchRunner
from engine.training.dataset import TextSet, build_cache
from engine.training.loop import TrainingPlan
from engine.training.medusa1 import HeadTrainer, Vocabulary, build_heads
from engine.training.medusa2 import JointPlan, JointTrainer
from engine.training.prefix_states import begin_scaled, end_scaled
from engine.training.processes import Processes
from engine.training.ranks import measure_ranks
from engine.training.windows import build_lanes
from engine.tree import CandidateTree

PREFIX = PrefixConfig.of(CONFIG)
TREE = CandidateTree.from_choices([(0,), (1,), (0, 0), (0, 1), (0, 0, 0)])


def random_prefix(seed: int = 3) -> PrefixAttention:
    torch.manual_seed(seed)
    prefix = PrefixAttention(PREFIX, CONFIG.hidden_size)
    torch.nn.init.normal_(prefix.output.weight, std=0.1)
    return prefix


def torch_runner(prefix: PrefixAttention | None) -> TorchRunner:
    runner = TorchRunner(small_model().backbone, device="cpu", dtype=torch.float32, weights="", exact=True)
    if prefix is not None:
        runner.attach(prefix)
    return runner


def whole_text(prefix: PrefixAttention, tokens: list[int]) -> torch.Tensor:
    """What heads read behind every token of a text, in one forward."""
    backbone, positions = small_model().backbone, torch.arange(len(tokens))
    cache = KVCache(CONFIG, "cpu", torch.float32, num_layers=CONFIG.num_layers + 1)
    cache.reserve(len(tokens))
    attend = attend_prefill(cache)
    with torch.inference_mode():
        hidden, *left = backbone.states(torch.tensor(tokens), positions, attend, PREFIX.layers)
        features = torch.cat([hidden, *map(feature, left)], dim=-1)
        return prefix(features, *backbone.angles(positions), attend, CONFIG.num_layers)


def test_a_fresh_one_leaves_the_hidden_state_to_the_heads() -> None:
    runner = torch_runner(PrefixAttention(PREFIX, CONFIG.hidden_size))
    torch.testing.assert_close(runner.prefill([5, 9, 2]), runner.heads_state())


def test_heads_read_the_same_in_prompts_in_trees_and_after_a_commit() -> None:
    prefix, prompt, tokens = random_prefix(), [5, 9, 2, 40], [7, 8, 9, 11, 12, 13]
    runner, plain = torch_runner(prefix), torch_runner(None)
    assert torch.equal(runner.prefill(prompt), plain.prefill(prompt))
    torch.testing.assert_close(runner.heads_state(), whole_text(prefix, prompt)[-1])
    assert torch.equal(runner.verify(tokens, TREE), plain.verify(tokens, TREE))
    path = TREE.path_to(TREE.num_nodes - 1)
    runner.commit(path)
    text = [*prompt, *(tokens[node] for node in path)]
    torch.testing.assert_close(runner.heads_state(), whole_text(prefix, text)[-1])
    assert runner.num_prefixed == runner.num_committed == len(text)
    runner.verify([3], CandidateTree(()))
    runner.commit([0])
    torch.testing.assert_close(runner.heads_state(), whole_text(prefix, [*text, 3])[-1])


def test_plain_steps_are_not_seen_and_a_new_prompt_fills_the_gap() -> None:
    prefix = random_prefix()
    runner = torch_runner(prefix)
    runner.prefill([5, 9, 2])
    runner.verify([7], CandidateTree(()), for_heads=False)
    runner.commit([0])
    assert (runner.num_prefixed, runner.num_committed) == (3, 4)
    runner.prefill([8])
    assert (runner.num_prefixed, runner.num_committed) == (3, 5)  # what follows a gap does not count
    runner.truncate(runner.num_prefixed)
    runner.prefill([7, 8])
    assert runner.num_prefixed == 5
    torch.testing.assert_close(runner.heads_state(), whole_text(prefix, [5, 9, 2, 7, 8])[-1])
    runner.truncate(2)
    assert runner.num_prefixed == 2


@pytest.mark.parametrize(("change", "message"), [({"num_heads": 7}, "has 7 heads"), ({"layers": (99,)}, "read layers")])
def test_one_for_another_model_is_refused(change: dict, message: str) -> None:
    with pytest.raises(CheckpointMismatchError, match=message):
        replace(PREFIX, **change).check_fits(CONFIG)


def looking_back(documents: int = 600, seed: int = 1) -> TextSet:
    """Documents that say the same few tokens, of their own, again and again: what follows is known from before."""
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = [], []
    for _ in range(documents):
        phrase = torch.randperm(20, generator=generator)[:6]
        tokens.append(phrase.repeat(6))
        labels.append(torch.tensor([0] * 8 + [1] * 28, dtype=torch.uint8))
    lengths = torch.full((documents,), 36)
    return TextSet(torch.cat(tokens).int(), torch.cat(labels), lengths, torch.ones(documents, dtype=torch.bool))


def untrained(prefix: PrefixConfig | None, checkpoint: Path | None = None, epochs: float = 10) -> HeadTrainer:
    model = small_model()
    vocabulary = Vocabulary(model, torch.arange(0, 150))
    heads = build_heads(replace(small_heads(vocabulary), prefix=prefix), vocabulary)
    plan = TrainingPlan(
        epochs=epochs, batch_tokens=720, window=36, learning_rate=8e-3, warmup_steps=10, checkpoint_seconds=0
    )
    layers = () if prefix is None else prefix.layers
    lanes = build_lanes(model, looking_back(), plan.window, layers=layers)
    return HeadTrainer(heads, vocabulary, lanes, plan, checkpoint)


def trained(prefix: PrefixConfig | None) -> HeadTrainer:
    trainer = untrained(prefix)
    trainer.run(lambda line: None)
    return trainer


def top1(heads: MedusaHeads) -> float:
    model = small_model()
    cache = build_cache(model, looking_back(20, seed=7), heads=heads)
    ranks = measure_ranks(heads, cache, Vocabulary(model, torch.arange(0, 150))).ranks
    return float((ranks[:, 0] < 1).float().mean())


def test_heads_that_look_back_learn_what_others_cannot(tmp_path: Path) -> None:
    with_prefix, without = trained(PREFIX).heads, trained(None).heads
    path = tmp_path / "heads.safetensors"
    save_heads(path, with_prefix, {"base_model": "small"}, storage="int8")
    read = load_heads(path)
    assert read.config == with_prefix.config
    assert top1(read) > top1(without) + 0.1
    torch.testing.assert_close(top1(read), top1(with_prefix), atol=0.05, rtol=0)


def test_a_stopped_training_goes_on_where_it_was(tmp_path: Path) -> None:
    """The channels' scale is part of the checkpoint: the matrix is learnt in units of it."""
    whole, begun = untrained(PREFIX, epochs=1), untrained(PREFIX, tmp_path / "run.ckpt", epochs=1)
    whole.run(lambda line: None)
    learn = begun.train_step

    def stop_at_five(share: float) -> bool:
        if begun.step == 5:
            raise KeyboardInterrupt
        return learn(share)

    begun.train_step = stop_at_five  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        begun.run(lambda line: None)
    again = untrained(PREFIX, tmp_path / "run.ckpt", epochs=1)
    assert again.step == 5 < again.total_steps
    again.run(lambda line: None)
    torch.testing.assert_close(again.heads.state_dict(), whole.heads.state_dict(), rtol=1e-4, atol=1e-5)


def test_channels_are_scaled_by_the_rows_of_all_processes() -> None:
    width = PREFIX.num_features * CONFIG.hidden_size
    rows = torch.randn(50, width) * 10 ** torch.linspace(-1, 1, width)

    class Beside(Processes):
        """One of two processes, which has no rows."""

        def add_up(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor + torch.cat([rows.double().pow(2).sum(0), torch.tensor([len(rows)])])

    alone, beside = PrefixAttention(PREFIX, CONFIG.hidden_size), PrefixAttention(PREFIX, CONFIG.hidden_size)
    begin_scaled(alone, rows.split(16))
    begin_scaled(beside, [], Beside(1, 2, torch.device("cpu")))
    factor, same = (prefix.query_key_value.parametrizations["weight"][0].factor for prefix in (alone, beside))
    torch.testing.assert_close(factor, same)
    scale = rows.pow(2).mean(0).sqrt()
    large = scale > scale.median()
    torch.testing.assert_close((rows * factor).pow(2).mean(0).sqrt()[large], torch.ones(int(large.sum())))
    assert float(factor.max()) == pytest.approx(2 / float(scale.median()), rel=1e-3)  # small channels are not raised
    before = alone.query_key_value.weight.detach().clone()
    end_scaled(alone)
    assert torch.equal(alone.query_key_value.weight, before)


def test_learnt_weights_are_the_same_when_they_are_scaled_again() -> None:
    """Training may start from heads that have learnt: what they compute is kept."""
    prefix = random_prefix()
    before = prefix.query_key_value.weight.detach().clone()
    begin_scaled(prefix, [torch.randn(50, before.shape[1]) * 10])
    torch.testing.assert_close(prefix.query_key_value.weight.detach(), before)


def test_a_shape_from_a_later_version_is_refused(tmp_path: Path) -> None:
    config = {"hidden_size": 96, "vocab_size": 211, "prefix": {**asdict(PREFIX), "layers": [0], "gate": "sigmoid"}}
    with pytest.raises(CheckpointMismatchError, match=r"gate.*update this app"):
        heads_config_of({"heads_config": json.dumps(config)}, tmp_path / "heads.safetensors")


def test_lanes_without_middle_layers_are_refused() -> None:
    model = small_model()
    vocabulary = Vocabulary(model, torch.arange(0, 150))
    heads = build_heads(replace(small_heads(vocabulary), prefix=PREFIX), vocabulary)
    with pytest.raises(InvalidParameterError, match="middle layers"):
        HeadTrainer(heads, vocabulary, build_lanes(model, looking_back(), 36), TrainingPlan())


def test_joint_training_reaches_the_prefix_and_through_it_the_backbone() -> None:
    model = small_model()
    vocabulary = Vocabulary(model, torch.arange(0, 150))
    heads = build_heads(replace(small_heads(vocabulary), prefix=PREFIX), vocabulary)
    torch.nn.init.normal_(heads.prefix.output.weight, std=0.05)
    plan = JointPlan(epochs=2, batch_tokens=600, warmup_steps=1, lambda0=0.5, heads_first=0.3, ramp=0.0)
    joint = JointTrainer(model, heads, vocabulary, random_text(), plan)
    before = {name: value.clone() for name, value in heads.prefix.state_dict().items()}
    joint.run(lambda line: None)
    after = heads.prefix.state_dict()
    assert set(after) == {"query_key_value.weight", "output.weight"}
    assert not torch.equal(after["output.weight"], before["output.weight"])
    assert all(torch.isfinite(value).all() for value in after.values())


def test_a_loss_that_is_no_number_ends_the_training() -> None:
    model = small_model()
    vocabulary = Vocabulary(model, torch.arange(0, 150))
    heads = build_heads(small_heads(vocabulary), vocabulary)
    torch.nn.init.constant_(heads.heads[0].blocks[0].down.weight, float("nan"))
    trainer = HeadTrainer(heads, vocabulary, build_lanes(model, random_text(), 32), TrainingPlan(epochs=1, window=32))
    with pytest.raises(InvalidParameterError, match="lower --learning-rate"):
        trainer.run(lambda line: None)
