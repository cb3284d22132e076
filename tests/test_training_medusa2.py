"""Joint training: adapters, its losses against autograd, a small model trained and merged, killed work resumed."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from small_decoder import CONFIG, random_weights
from torch.nn import functional as F

from engine.backbone import Backbone
from engine.errors import InvalidParameterError
from engine.heads import HeadsConfig
from engine.training.dataset import TextSet, build_cache
from engine.training.dense import TrainingModel, attend_causal, dense_backbone
from engine.training.joint_batches import DocumentBatches
from engine.training.joint_loss import divergence
from engine.training.joint_quality import compare
from engine.training.joint_result import merged_model
from engine.training.loop import TrainingPlan
from engine.training.lora import LoraAdapters
from engine.training.medusa1 import HeadTrainer, Vocabulary, build_heads
from engine.training.medusa2 import JointPlan, JointTrainer
from engine.training.ranks import measure_ranks


def small_model() -> TrainingModel:
    torch.manual_seed(5)
    backbone = dense_backbone(CONFIG, random_weights(CONFIG), "cpu", torch.float32)
    return TrainingModel("small", backbone, None, Path("small"))  # type: ignore[arg-type] # no text is made here


def random_text(documents: int = 40, seed: int = 1) -> TextSet:
    """Documents of two to forty tokens in which every label is a function of the token before it."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(6, 40, (documents,), generator=generator)
    tokens, labels = [], []
    for length in lengths.tolist():
        row = torch.randint(0, CONFIG.vocab_size, (length,), generator=generator)
        for place in range(3, length):
            row[place] = (row[place - 1] * 7 + 3) % CONFIG.vocab_size
        tokens.append(row)
        labels.append(torch.tensor([0] * 3 + [1] * (length - 3), dtype=torch.uint8))
    return TextSet(torch.cat(tokens).int(), torch.cat(labels), lengths, torch.ones(documents, dtype=torch.bool))


def small_heads(vocabulary: Vocabulary) -> HeadsConfig:
    return HeadsConfig(
        CONFIG.hidden_size, CONFIG.vocab_size, num_heads=2, width=64, sees="path", output="truncated", draft_vocab=150
    )


def trainer(plan: JointPlan, checkpoint: Path | None = None) -> JointTrainer:
    model = small_model()
    vocabulary = Vocabulary(model, torch.arange(0, 150))
    return JointTrainer(
        model, build_heads(small_heads(vocabulary), vocabulary), vocabulary, random_text(), plan, checkpoint
    )


def hidden_states(backbone: Backbone, tokens: torch.Tensor) -> torch.Tensor:
    return backbone(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), attend_causal)


def shake(adapters: LoraAdapters) -> None:
    for parameter in adapters.parameters():
        torch.nn.init.normal_(parameter, std=0.05)


def test_fresh_or_switched_off_adapters_change_nothing() -> None:
    model = small_model()
    tokens = torch.randint(0, CONFIG.vocab_size, (2, 9))
    before = hidden_states(model.backbone, tokens)
    scores = model.backbone.lm_head(before)
    adapters = LoraAdapters(model.backbone, rank=4)
    assert torch.equal(hidden_states(model.backbone, tokens), before)
    shake(adapters)
    assert not torch.allclose(hidden_states(model.backbone, tokens), before, atol=1e-2)
    with adapters.switched_off():
        assert torch.equal(model.backbone.lm_head(hidden_states(model.backbone, tokens)), scores)
    adapters.take_out(model.backbone)
    assert torch.equal(hidden_states(model.backbone, tokens), before)


def test_merged_model_computes_what_the_adapted_one_does() -> None:
    model = small_model()
    shake(LoraAdapters(model.backbone, rank=4))
    tokens = torch.randint(0, CONFIG.vocab_size, (2, 9))
    merged = merged_model(model)
    expected = hidden_states(model.backbone, tokens)
    torch.testing.assert_close(hidden_states(merged.backbone, tokens), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        merged.backbone.lm_head(expected), model.backbone.lm_head(expected), rtol=1e-3, atol=1e-3
    )
    assert merged.backbone.lm_head.weight is not merged.backbone.embed.weight


def test_divergence_equals_autograd_on_the_formula() -> None:
    hidden, teacher = torch.randn(2, 11, 8, dtype=torch.float64)
    output, teacher_output = torch.randn(2, 31, 8, dtype=torch.float64)
    hidden, output = hidden.requires_grad_(), output.requires_grad_()
    target = (teacher @ teacher_output.T).log_softmax(-1)
    expected = F.kl_div((hidden @ output.T).log_softmax(-1), target, reduction="sum", log_target=True)
    wanted = torch.autograd.grad(expected, [hidden, output])
    total, same = divergence(hidden, output, teacher, teacher_output, chunk=4)
    torch.testing.assert_close(total.double(), expected, rtol=1e-4, atol=1e-4)
    for grad, other in zip(torch.autograd.grad(3 * total, [hidden, output]), wanted, strict=True):
        torch.testing.assert_close(grad.double(), 3 * other, rtol=1e-4, atol=1e-4)
    assert same == ((hidden @ output.T).argmax(-1) == (teacher @ teacher_output.T).argmax(-1)).sum()


def test_batches_hold_every_document_once_an_epoch() -> None:
    text = random_text()
    batches = DocumentBatches(text, 100, torch.device("cpu"))
    ends = text.lengths.cumsum(0)
    documents = sorted(
        text.tokens[start:stop].tolist()
        for start, stop in zip((ends - text.lengths).tolist(), ends.tolist(), strict=True)
    )
    orders = []
    for epoch in (0, 1):
        seen = []
        for place in range(batches.num_batches):
            batch = batches.batch(epoch, place)
            assert batch.tokens.numel() <= 100
            rows = [row[keep].tolist() for row, keep in zip(batch.tokens, batch.is_text, strict=True)]
            seen += rows
            # The first two tokens' next is no label; then come labels to the end, and none after it.
            runs = batch.run.split([len(row) for row in rows])
            assert all(run.tolist()[:3] == [0, 0, min(32, len(run) - 3)] and run[-1] == 0 for run in runs)
        assert sorted(seen) == documents
        orders.append(seen)
    assert orders[0] != orders[1]


def test_heads_loss_is_that_of_medusa1_on_the_same_documents() -> None:
    """Heads learn alone first: then a live forward and the cache of MEDUSA-1 are the same thing."""
    joint = trainer(JointPlan(epochs=1, batch_tokens=4000, heads_first=0.5))
    batch = joint.batches.batch(0, 0)
    assert batch.is_text.sum() == joint.batches.num_tokens  # one batch holds all
    joint._heads_loss(batch, joint._states(batch, learns=False), None)
    model = small_model()
    vocabulary = Vocabulary(model, torch.arange(0, 150))
    cache = build_cache(model, random_text())
    plan = TrainingPlan(epochs=1, batch_tokens=10**6, window=cache.num_tokens)
    single = HeadTrainer(build_heads(small_heads(vocabulary), vocabulary), vocabulary, cache, plan)
    single.train_step(0.0)
    torch.testing.assert_close(joint._sums.count, single._sums.count)
    torch.testing.assert_close(joint._sums.loss, single._sums.loss, rtol=1e-2, atol=1e-2)


def test_joint_training_helps_the_heads_and_keeps_the_backbone() -> None:
    plan = JointPlan(epochs=60, batch_tokens=600, heads_first=0.2, warmup_steps=10, lambda0=0.5, learning_rate=2e-3)
    joint = trainer(plan)
    original, lines = small_model(), []
    joint.run(lines.append)
    tuned, held = merged_model(joint.model), random_text(12, seed=9)
    figures = compare(original, tuned, held)
    assert 0 < figures.kl < 1.0 and figures.same_best > 0.5
    assert "KL" in lines[-1] and "top-1/top-5" in lines[-1]

    def top1(model: TrainingModel) -> float:
        ranks = measure_ranks(joint.heads, build_cache(model, held), Vocabulary(model, torch.arange(0, 150))).ranks
        return (ranks[:, 0] == 0).float().mean().item()

    # The heads know the tuned backbone's states, not the original's.
    assert top1(tuned) > top1(original)
    unadapted = compare(original, original, held)
    assert unadapted.kl == pytest.approx(0, abs=1e-6) and unadapted.same_best == 1


def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    plan = JointPlan(epochs=3, batch_tokens=300, heads_first=0.3, warmup_steps=2, checkpoint_seconds=0)
    whole = trainer(plan)
    whole.run(lambda line: None)

    class Stopped(Exception):
        pass

    first = trainer(plan, tmp_path / "run.ckpt")
    step = first.train_step

    def stop_at_seven(share: float) -> bool:
        if first.step == 7:
            raise Stopped
        return step(share)

    first.train_step = stop_at_seven  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        first.run(lambda line: None)
    second = trainer(plan, tmp_path / "run.ckpt")
    assert second.step == 7
    second.run(lambda line: None)
    for name, tensor in whole.module.state_dict().items():
        torch.testing.assert_close(second.module.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
    with pytest.raises(InvalidParameterError, match="lambda0"):
        trainer(dataclasses.replace(plan, lambda0=0.3), tmp_path / "run.ckpt")


def test_text_without_labels_teaches_nothing_and_is_no_nan() -> None:
    joint = trainer(JointPlan(epochs=1, batch_tokens=300))
    before = copy.deepcopy(joint.module.state_dict())
    joint.batches._run.zero_()
    joint.run(lambda line: None)
    assert all(torch.equal(tensor, before[name]) for name, tensor in joint.module.state_dict().items())


def test_lambda_rises_along_a_quarter_of_a_sine() -> None:
    plan = JointPlan(lambda0=0.2, heads_first=0.2, ramp=0.4)
    assert [round(plan.lambda_at(share), 4) for share in (0.2, 0.4, 0.6, 1.0)] == [0.0, 0.1414, 0.2, 0.2]
    with pytest.raises(InvalidParameterError, match="heads_first is 1"):
        JointPlan(heads_first=1.0)
