"""What of the GPU bench can be told without a GPU: which parts it has, and how they are left out."""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.bench import gpu_engine
from engine.bench.gpu_linears import in_turn
from engine.bench.gpu_loaded import EngineOnGpu
from engine.bench.gpu_report import or_error
from engine.bench.gpu_step import again


def test_every_part_but_loading_can_be_left_out() -> None:
    bench = EngineOnGpu(argparse.Namespace())
    names = [name for name, _ in gpu_engine._parts(bench, "int8", main=True, until=1.0)]
    assert names[0] == "load"
    assert {*names[1:], "load again", "tests", "transformers"} == set(gpu_engine.CAN_SKIP)


def test_a_part_that_is_left_out_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def part(name: str, *_: Any) -> str:
        ran.append(name)
        return name

    parts = ["load", "toggle", "steps"]
    monkeypatch.setattr(gpu_engine, "environment", partial(part, "environment"))
    monkeypatch.setattr(gpu_engine, "gpu_tests", partial(part, "tests"))
    monkeypatch.setattr(gpu_engine, "transformers", partial(part, "transformers"))
    monkeypatch.setattr(EngineOnGpu, "load", lambda self, quantize: partial(part, "load again"))
    monkeypatch.setattr(gpu_engine, "_parts", lambda *_, **__: [(name, partial(part, name)) for name in parts])
    words = ["--out", str(tmp_path), "--formats", "nf4", "--skip", "tests", "toggle"]
    gpu_engine.main(words)
    assert ran == ["environment", "load", "steps", "load again", "transformers"]
    with pytest.raises(SystemExit):
        gpu_engine.main([*words, "load"])


def test_launches_take_the_weights_in_turn_or_stay_the_same() -> None:
    asked: list[tuple[int, str]] = []
    launch = in_turn(partial(lambda x, weight: asked.append((x, weight)), 7), ["a", "b"])
    for number in range(3):
        launch(number)
    assert asked == [(7, "a"), (7, "b"), (7, "a")]
    assert torch.equal(torch.ones(2), again(torch.add, torch.ones(2), 0)(5))  # type: ignore[arg-type]


def test_a_peer_that_fails_is_told_in_its_place() -> None:
    assert or_error(lambda: 1 / 0) == "ZeroDivisionError: division by zero"
    assert or_error(lambda: 2.5) == 2.5
