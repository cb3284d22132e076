"""Training over quantised linears on the CPU: what a format stands for, what learns and what does not, refusals."""

import copy
import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from small_decoder import CONFIG, random_weights
from test_training_commands import command
from test_training_medusa2 import hidden_states, random_text, shake

from engine.block_weights import DenseWeight
from engine.bnb_linear import BnbInt8Linear, NF4Linear
from engine.errors import InvalidParameterError, UnsupportedDeviceError
from engine.heads import HeadsConfig
from engine.linear import DenseLinear
from engine.models.heads_file import load_heads
from engine.nested_tree import NestedTree
from engine.training.checkpoint import saved_settings
from engine.training.dataset import build_cache
from engine.training.dense import TrainingModel, dense_backbone
from engine.training.joint_result import merged_model
from engine.training.loop import TrainingPlan
from engine.training.lora import LoraAdapters
from engine.training.medusa1 import HeadTrainer, Vocabulary, build_heads
from engine.training.medusa2 import JointPlan, JointTrainer
from engine.training.quantized import plain_matrix
from engine.training.shards import Document, ShardWriter
from engine.training.windows import build_lanes

bnb = pytest.importorskip("bitsandbytes")
FORMATS = {"nf4": NF4Linear, "int8": BnbInt8Linear}
# Rows of a multiple of 64, which NF4 needs on a CPU.
WIDE = dataclasses.replace(CONFIG, hidden_size=128, num_heads=4, intermediate_size=192)


def small_model(quantize: str) -> TrainingModel:
    torch.manual_seed(5)
    backbone = dense_backbone(WIDE, random_weights(WIDE), "cpu", torch.float32, quantize)
    return TrainingModel("small", backbone, None, Path("small"), quantize)  # type: ignore[arg-type] # no text is made


def small_heads(vocabulary: Vocabulary) -> HeadsConfig:
    return HeadsConfig(WIDE.hidden_size, WIDE.vocab_size, num_heads=2, width=64, sees="path", output="shared")


@pytest.mark.parametrize(("quantize", "error"), [("nf4", 0.09), ("int8", 0.008)])
def test_plain_matrix_is_what_a_linear_computes_with(quantize: str, error: float) -> None:
    values = torch.randn(96, 128)
    linear = FORMATS[quantize](DenseWeight(values), device="cpu", dtype=torch.float32)
    matrix = plain_matrix(linear, 128, "cpu", torch.float32)
    assert 0 < float((matrix - values).abs().mean()) < error
    x = torch.randn(5, 128)
    torch.testing.assert_close(linear(x), x @ matrix.T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("quantize", FORMATS)
def test_heads_learn_over_a_frozen_quantised_backbone(quantize: str) -> None:
    model, text = small_model(quantize), random_text()
    assert isinstance(model.backbone.layers[0].down, FORMATS[quantize])
    assert isinstance(model.backbone.lm_head, DenseLinear)
    vocabulary = Vocabulary(model, None)
    heads = build_heads(small_heads(vocabulary), vocabulary)
    assert all(item.dtype is torch.float32 for item in heads.parameters())
    before = copy.deepcopy(model.backbone.state_dict())
    plan = TrainingPlan(epochs=30, batch_tokens=256, window=32, warmup_steps=5, report_steps=5)
    figures: list[float] = []
    trainer = HeadTrainer(heads, vocabulary, build_lanes(model, text, plan.window), plan)
    report = trainer.report

    def remember(*args: object) -> dict[str, float]:
        told = report(*args)  # type: ignore[arg-type]
        figures.append(told["loss"])
        return told

    trainer.report = remember  # type: ignore[method-assign]
    trainer.run(lambda line: None)
    assert figures[-1] < figures[0] - 0.5
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.backbone.state_dict().items())


def test_hidden_states_differ_as_much_as_the_format_does() -> None:
    plain, text = build_cache(small_model("none"), random_text()), random_text()
    apart = {
        quantize: float((build_cache(small_model(quantize), text).hidden - plain.hidden).abs().mean())
        for quantize in FORMATS
    }
    assert 0 < apart["int8"] < apart["nf4"] / 3 < 0.2


@pytest.mark.parametrize("quantize", FORMATS)
def test_merging_keeps_what_adapters_over_quantised_linears_compute(quantize: str) -> None:
    model = small_model(quantize)
    shake(LoraAdapters(model.backbone, rank=4))
    tokens = torch.randint(0, WIDE.vocab_size, (2, 9))
    merged = merged_model(model)
    assert merged.quantize == "none"
    expected = hidden_states(model.backbone, tokens)
    torch.testing.assert_close(hidden_states(merged.backbone, tokens), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("quantize", FORMATS)
def test_adapters_learn_through_quantised_linears(quantize: str) -> None:
    model = small_model(quantize)
    vocabulary = Vocabulary(model, None)
    plan = JointPlan(epochs=4, batch_tokens=600, warmup_steps=2, lambda0=1.0, ramp=0.0)
    trainer = JointTrainer(model, build_heads(small_heads(vocabulary), vocabulary), vocabulary, random_text(), plan)
    trainer.run(lambda line: None)
    ups = [adapters[part].up for adapters in trainer.adapters.layers for part in adapters]
    assert all(bool(up.isfinite().all()) and bool(up.any()) for up in ups)


def test_a_format_that_does_not_work_here_is_refused_in_a_sentence() -> None:
    # bitsandbytes on a CPU mixes up the scales of NF4 rows that are no multiple of 64 long.
    with pytest.raises(UnsupportedDeviceError, match=r"--quantize nf4 does not work on cpu here .* 96 columns"):
        dense_backbone(CONFIG, random_weights(CONFIG), "cpu", torch.float32, "nf4")


def test_a_missing_bitsandbytes_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UnsupportedDeviceError, match=r"launcher\.py --repair"):
        small_model("int8")


def test_a_run_does_not_go_on_over_another_format(tmp_path: Path) -> None:
    def trainer(quantize: str) -> HeadTrainer:
        model = small_model(quantize)
        vocabulary = Vocabulary(model, None)
        plan = TrainingPlan(epochs=1, batch_tokens=256, window=32, warmup_steps=5)
        heads = build_heads(small_heads(vocabulary), vocabulary)
        lanes = build_lanes(model, random_text(), plan.window)
        return HeadTrainer(heads, vocabulary, lanes, plan, tmp_path / "run.ckpt")

    trainer("int8").run(lambda line: None)
    assert saved_settings(tmp_path / "run.ckpt")["quantize"] == "int8"
    with pytest.raises(InvalidParameterError, match="another quantize"):
        trainer("none")


@pytest.mark.slow
def test_train_command_over_the_quantised_bundled_model(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data, out = tmp_path / "data", tmp_path / "h.safetensors"
    writer = ShardWriter(data, {"model": "SmolLM2-135M-Instruct.Q4_1"}, 1000)
    for number in range(6):
        writer.add(Document(list(range(number, number + 14)), [(4, 14)], is_greedy=True, source=number))
    writer.flush()
    tiny = "--epochs 2 --width 64 --draft-vocab 256 --batch-tokens 64 --device cpu --quantize nf4"
    assert command(f"train --data {data} --out {out} {tiny}") == 0
    assert "linears in nf4" in capsys.readouterr().err and load_heads(out).config.width == 64
    assert command(f"calibrate --heads {out} --answers 2 --max-answer 8 --device cpu --quantize nf4") == 0
    assert "linears in nf4" in capsys.readouterr().err and len(NestedTree.beside(out).expected) > 1
