"""`train` and heads that look back: what is asked for is made and gone on from, what cannot be is refused."""

from pathlib import Path

import pytest
import torch
from test_training_commands import command
from test_training_processes import write_data

from engine.heads import HeadsConfig, MedusaHeads
from engine.models.heads_file import load_heads, save_heads
from engine.prefix_attention import PrefixConfig

ONE_STEP = "--epochs 0 --heads 2 --draft-vocab 256 --batch-tokens 256 --device cpu"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


@pytest.mark.parametrize(
    ("asked", "layers"),
    [
        ("--width 64", (9, 19)),
        ("--width 64 --prefix-layers 9,3", (3, 9)),
        ("--width 64 --prefix-layers none", None),
        ("--width none --sees hidden", None),  # other programs serve such heads, without a prefix
        ("--width none --sees hidden --prefix-layers 3", (3,)),
    ],
)
def test_heads_read_the_layers_that_were_asked_for(
    data: Path, tmp_path: Path, asked: str, layers: tuple[int, ...] | None
) -> None:
    out = tmp_path / "h.safetensors"
    assert command(f"train --data {data} --out {out} {ONE_STEP} {asked}") == 0
    prefix = load_heads(out).config.prefix
    assert (prefix and prefix.layers) == layers


def test_heads_that_are_gone_on_from_keep_theirs(data: Path, tmp_path: Path) -> None:
    start, out = tmp_path / "start.safetensors", tmp_path / "h.safetensors"
    assert command(f"train --data {data} --out {start} {ONE_STEP} --width 64 --prefix-layers 3") == 0
    assert command(f"train --data {data} --out {out} {ONE_STEP} --start-heads {start}") == 0
    before, after = load_heads(start), load_heads(out)
    assert after.config == before.config
    was, became = (heads.state_dict()["prefix.query_key_value.weight"] for heads in (before, after))
    assert not torch.equal(became, was)
    torch.testing.assert_close(became, was, atol=0.02, rtol=0)  # one step away, not made anew


@pytest.mark.parametrize("layers", ["30", "1,2,3,4"])
def test_layers_that_cannot_be_read_are_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, layers: str
) -> None:
    assert command(f"train --data {data} --out {tmp_path}/h.safetensors {ONE_STEP} --prefix-layers {layers}") == 2
    said = capsys.readouterr().err
    assert f"names {layers.replace(',', ', ')}; up to 3 layers from 0 to 29 can be read." in said


@pytest.mark.parametrize("name", ["train", "calibrate"])
def test_heads_of_a_model_of_the_same_sizes_are_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, name: str
) -> None:
    shape = HeadsConfig(576, 49152, 2, 1, 64, output="truncated", draft_vocab=64, prefix=PrefixConfig((9,), 8, 4, 64))
    heads = tmp_path / "other.safetensors"
    save_heads(heads, MedusaHeads(shape, torch.arange(64)))
    train = f"train --data {data} --out {tmp_path}/h.safetensors {ONE_STEP} --start-heads {heads}"
    assert command(train if name == "train" else f"calibrate --data {data} --heads {heads} --device cpu") == 2
    assert "has 8 heads, 4 of keys, of 64; the model has 9, 3, of 64" in capsys.readouterr().err
