"""Launches measured in passes: what is chosen, and that the step in the making does not notice."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from test_cuda_runner import TREES, device, make_runner, random_heads, weights  # noqa: F401

from engine.backbone import BackboneWeights
from engine.cuda_drafter import CudaDrafter
from engine.cuda_linear import choose_default, shape_key
from engine.cuda_pass_tuning import Launch, PassTuner
from engine.cuda_runner import CudaRunner
from engine.decode import PLAIN
from engine.kernels.linear_config import LinearConfig, default_config, rows_measured, token_tiles_for
from engine.kernels.measured_configs import MeasuredConfigs
from engine.kernels.small_batch_linear import PackedLinear

SPLIT = (1, 1, 4, 1, 1)  # sums meet in the workspace


def tries(weight: PackedLinear, rows: int) -> list[LinearConfig]:
    """What would be chosen unmeasured, a launch of another kind, and one that is wrong."""
    default = default_config(weight.n, weight.k, rows, weight.decode)
    split = LinearConfig(weight.decode, token_tiles_for(rows), *SPLIT)
    return [default, split, LinearConfig(**{**split.to_dict(), "ablate": 1})]


class Clock:
    """Runs launches and gives them the same times by turns."""

    def __init__(self, *times: float) -> None:
        self.times, self.calls = times, 0

    def __call__(self, launches: Sequence[Launch]) -> list[float]:
        for launch in launches:
            launch()
        self.calls += 1
        return [self.times[place % len(self.times)] for place in range(len(launches))]


def tuned(weights: BackboneWeights, device: str, path: Path, *times: float) -> tuple[CudaRunner, Clock]:  # noqa: F811
    runner = make_runner(weights, device)
    clock = Clock(*times)
    runner.linear.choose = PassTuner(
        runner._forward, runner.memory, runner.linear, runner._packed.matrices,
        kept=MeasuredConfigs(path), tries=tries, time=clock,
    )  # fmt: skip
    return runner, clock


def test_the_fastest_launch_of_equal_bits_is_chosen(weights: BackboneWeights, device: str, tmp_path: Path) -> None:  # noqa: F811
    runner, clock = tuned(weights, device, tmp_path / "kept.json", 3.0, 2.0, 1.0)  # the wrong one is the fastest
    for tree in (PLAIN, TREES[1]):
        runner.plan(tree, None)
    shapes = {shape_key(matrix, 1)[:-1] for matrix in runner._packed.matrices}
    chosen = {key: config for key, config in runner.linear._configs.items() if key[:-1] in shapes}
    assert {key[-1] for key in chosen} == {1, 8}
    for key, config in chosen.items():
        assert config == LinearConfig(key[0], token_tiles_for(max(1, key[-1])), *SPLIT)
    assert clock.calls == len(chosen)


def test_what_was_measured_is_kept(weights: BackboneWeights, device: str, tmp_path: Path) -> None:  # noqa: F811
    path = tmp_path / "new" / "kept.json"
    first, clock = tuned(weights, device, path, 1.0, 2.0, 3.0)
    first.plan(PLAIN, None)
    assert clock.calls > 0
    again, clock = tuned(weights, device, path, 1.0)
    again.plan(PLAIN, None)
    assert clock.calls == 0 and again.linear._configs == first.linear._configs
    for content in ("", "{", "[]", '{"a": 1}', '{"a": {"speed": 9}}'):
        path.write_text(content)
        assert MeasuredConfigs(path).get(again._packed.lm_head, 1) is None
    (tmp_path / "file").write_text("in the way")
    unwritable = MeasuredConfigs(tmp_path / "file" / "kept.json")
    unwritable.put(again._packed.lm_head, 1, first.linear.config(first._packed.lm_head, 1))
    assert unwritable.get(again._packed.lm_head, rows_measured(1)) is not None


def test_a_step_under_way_goes_on(weights: BackboneWeights, device: str, tmp_path: Path) -> None:  # noqa: F811
    runner, clock = tuned(weights, device, tmp_path / "kept.json", 1.0)
    measured, runner.linear.choose = runner.linear.choose, choose_default
    runner.prefill([5, 3, 80])
    runner.set_root(7)
    runner.memory.tokens[1:4] = torch.tensor([9, 8, 7])
    outbox, state, runner.linear.choose = runner.memory.outbox.clone(), runner.memory.state.clone(), measured
    rows = [part.clone() for part in runner.committed_rows(0)]
    held = runner.memory_bytes()
    runner.plan(TREES[1], None)
    assert clock.calls > 0
    assert torch.equal(runner.memory.outbox, outbox) and torch.equal(runner.memory.state, state)
    assert all(torch.equal(*pair) for pair in zip(runner.committed_rows(0), rows, strict=True))
    assert runner.memory_bytes() == held


def test_other_matrices_are_measured_by_themselves(weights: BackboneWeights, device: str, tmp_path: Path,  # noqa: F811
                                                   monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    asked: list[int] = []

    def alone(weight: PackedLinear, rows: int, *memory: object) -> LinearConfig:
        asked.append(rows)
        return default_config(weight.n, weight.k, rows, weight.decode)

    monkeypatch.setattr("engine.cuda_pass_tuning.choose_config", alone)
    runner, clock = tuned(weights, device, tmp_path / "kept.json", 1.0)
    drafter = CudaDrafter(random_heads(), runner, weights.lm_head, is_fused=False)
    runner.linear.prepare(drafter._heads[0].block_matrices, 3)
    assert set(asked) == {8} and clock.calls == 0
