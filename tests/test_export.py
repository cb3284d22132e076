"""Exported heads: what other programs read back is what the heads were, and what a layout cannot say is refused."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.errors import CheckpointMismatchError, InvalidParameterError
from engine.heads import HeadsConfig, MedusaHeads
from engine.models.cli_export import add_arguments, run
from engine.models.export import export_heads
from engine.models.head_formats import Target, read_heads
from engine.models.heads_file import save_heads
from engine.prefix_attention import PrefixConfig

HIDDEN, VOCAB, DRAFT = 8, 24, 10
TOKEN_MAP = torch.tensor([3, 0, 7, 23, 11, 5, 20, 1, 2, 9])


@pytest.fixture
def lm_head() -> Tensor:
    return torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(1))


def make_heads(
    output: str,
    num_layers: int = 1,
    width: int | None = None,
    sees: str = "hidden",
    prefix: PrefixConfig | None = None,
) -> MedusaHeads:
    """Return random heads; their matrices start at zero or as copies, which would hide mistakes."""
    draft_vocab = DRAFT if "truncated" in output else 0
    config = HeadsConfig(HIDDEN, VOCAB, 3, num_layers, width, sees, output, draft_vocab, prefix=prefix)
    heads = MedusaHeads(config, TOKEN_MAP if draft_vocab else None)
    generator = torch.Generator().manual_seed(2)
    for parameter in heads.parameters():
        nn.init.normal_(parameter, generator=generator)
    return heads


def full_logits(heads: MedusaHeads, lm_head: Tensor) -> Tensor:
    """Return every head's scores over the whole vocabulary, -inf outside its draft vocabulary: [heads, rows, vocab]."""
    hidden = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(3))
    shared = nn.Linear(HIDDEN, heads.config.output_size, bias=False)
    shared.weight = nn.Parameter(lm_head if heads.token_map is None else lm_head[heads.token_map])
    scores = torch.full((heads.config.num_heads, 6, VOCAB), float("-inf"))
    for head in range(heads.config.num_heads):
        draft = heads.logits(head, heads.features(head, hidden), shared)
        scores[head, :, heads.to_token_ids(torch.arange(heads.config.output_size))] = draft
    return scores.detach()


EXPRESSIBLE = [
    ("medusa", "own", 2),
    ("medusa", "shared", 1),
    ("medusa-v2", "shared", 1),
    ("vllm", "own", 2),
    ("vllm", "shared", 2),
    ("vllm", "truncated", 1),
    ("vllm", "own_truncated", 1),
]


@pytest.mark.parametrize(("file_format", "output", "layers"), EXPRESSIBLE)
@pytest.mark.parametrize("knows_lm_head", [True, False])
def test_round_trip_gives_the_same_scores(
    tmp_path: Path, lm_head: Tensor, file_format: str, output: str, layers: int, knows_lm_head: bool
) -> None:
    heads = make_heads(output, layers)
    export_heads(heads, file_format, tmp_path, base_name="x/y", lm_head=lambda: lm_head, dtype=torch.float32)
    target = Target(HIDDEN, VOCAB, "x/y", (lambda: lm_head) if knows_lm_head else None)
    back = read_heads(tmp_path, target)
    assert back.format == file_format and back.base_name == "x/y" and back.notes == []
    assert back.heads.config.num_heads == 3 and back.heads.config.num_layers == layers
    assert torch.equal(full_logits(back.heads, lm_head), full_logits(heads, lm_head))
    if knows_lm_head:  # and nothing was lost on the way: the very same state
        assert back.heads.config == heads.config
        assert back.heads.state_dict().keys() == heads.state_dict().keys()
        for name, tensor in heads.state_dict().items():
            assert torch.equal(back.heads.state_dict()[name], tensor), name


def test_medusa_files_hold_the_official_names(tmp_path: Path, lm_head: Tensor) -> None:
    heads = make_heads("own", 2)
    notes = export_heads(heads, "medusa", tmp_path, base_name="x/y", lm_head=lambda: lm_head)
    stored = torch.load(tmp_path / "medusa_lm_head.pt", weights_only=True)
    state = heads.state_dict()
    expected = {}
    for head in range(3):
        for layer in range(2):
            for part in ("weight", "bias"):
                expected[f"{head}.{layer}.linear.{part}"] = state[f"heads.{head}.blocks.{layer}.linear.{part}"]
        expected[f"{head}.2.weight"] = state[f"outputs.{head}.weight"]
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], expected[name].bfloat16()) for name in expected)
    safe = load_file(tmp_path / "medusa_lm_head.safetensors")
    assert safe.keys() == stored.keys() and all(torch.equal(safe[name], stored[name]) for name in safe)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings == {"base_model_name_or_path": "x/y", "medusa_num_heads": 3, "medusa_num_layers": 2}
    assert "5 heads" in notes[0] and "3" in notes[0]


def test_version_2_files(tmp_path: Path) -> None:
    def lm_head() -> Tensor:
        raise AssertionError("version 2 needs no rows of lm_head")

    export_heads(make_heads("shared"), "medusa-v2", tmp_path / "new", base_name="x/y", lm_head=lm_head)
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["config.json", "medusa_lm_head.safetensors"]
    names = load_file(tmp_path / "new" / "medusa_lm_head.safetensors").keys()
    assert names == {f"{head}.0.linear.{part}" for head in range(3) for part in ("weight", "bias")}
    assert json.loads((tmp_path / "new" / "config.json").read_text())["version"] == "2"


@pytest.mark.parametrize("output", ["own", "shared", "truncated", "own_truncated"])
def test_vllm_files(tmp_path: Path, lm_head: Tensor, output: str) -> None:
    export_heads(make_heads(output), "vllm", tmp_path, base_name="x/y", lm_head=lambda: lm_head, dtype=torch.float16)
    stored = load_file(tmp_path / "model.safetensors")
    is_own, is_truncated = output.startswith("own"), "truncated" in output
    expected = {f"blocks.{head}.layers.0.{part}" for head in range(3) for part in ("weight", "bias")}
    expected |= {f"lm_heads.{head}.weight" for head in range(3)} if is_own else {"lm_head.weight"}
    assert stored.keys() == expected | ({"token_map"} if is_truncated else set())
    assert stored["blocks.2.layers.0.weight"].dtype == torch.float16
    if is_truncated:
        assert stored["token_map"].dtype == torch.int64 and torch.equal(stored["token_map"], TOKEN_MAP)
    if not is_own:
        assert torch.equal(stored["lm_head.weight"], (lm_head[TOKEN_MAP] if is_truncated else lm_head).half())
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["model_type"] == "medusa" and settings["architectures"] == ["MedusaModel"]
    assert (settings["hidden_size"], settings["vocab_size"]) == (HIDDEN, VOCAB)
    assert settings["truncated_vocab_size"] == (DRAFT if is_truncated else VOCAB)
    assert settings["original_lm_head"] is not is_own and settings["medusa_fc_bias"] is True
    # vLLM renames every key with "num" and "heads" or "layers"; a second one would overwrite the first.
    assert [name for name in settings if "num" in name] == ["num_heads", "num_hidden_layers"]
    assert (settings["num_heads"], settings["num_hidden_layers"]) == (3, 1)


@pytest.mark.parametrize(
    ("file_format", "options", "reason"),
    [
        ("medusa", {"output": "own", "width": 16}, "wide blocks (width 16)"),
        ("vllm", {"output": "own", "width": 16, "sees": "path"}, "wide blocks (width 16)"),
        ("medusa-v2", {"output": "shared", "width": 16, "sees": "root"}, "wide blocks (width 16)"),
        ("vllm", {"output": "own", "prefix": PrefixConfig((1,), 2, 1, 8)}, "a prefix attention"),
        ("medusa", {"output": "truncated"}, "10 of 24 tokens"),
        ("medusa-v2", {"output": "own_truncated"}, "10 of 24 tokens"),
        ("medusa-v2", {"output": "own"}, "output matrices of their own"),
        ("medusa-v2", {"output": "shared", "num_layers": 2}, "2 residual layers"),
    ],
)
def test_what_a_layout_cannot_say_is_refused(
    tmp_path: Path, lm_head: Tensor, file_format: str, options: dict, reason: str
) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        out = tmp_path / "out"
        export_heads(make_heads(**options), file_format, out, base_name="x/y", lm_head=lambda: lm_head)
    message = str(caught.value)
    assert reason in message and "`train --width none --sees hidden --output" in message
    assert ("--format vllm" in message) == (not {"width", "prefix"} & set(options))
    assert not (tmp_path / "out").exists()


def test_files_may_be_read_by_a_server_of_another_user(tmp_path: Path, lm_head: Tensor) -> None:
    export_heads(make_heads("own"), "vllm", tmp_path, base_name="x/y", lm_head=lambda: lm_head)
    (tmp_path / "any").write_text("")
    assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1


def test_unknown_formats_and_used_folders_are_refused(tmp_path: Path, lm_head: Tensor) -> None:
    heads = make_heads("own")
    with pytest.raises(InvalidParameterError, match=r"'onnx'.*medusa, medusa-v2, vllm"):
        export_heads(heads, "onnx", tmp_path, base_name="x/y", lm_head=lambda: lm_head)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InvalidParameterError, match="not an empty folder"):
        export_heads(heads, "vllm", tmp_path, base_name="x/y", lm_head=lambda: lm_head)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_an_output_matrix_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointMismatchError, match=r"24 x 8.*32 x 8.*--model"):
        export_heads(make_heads("shared"), "medusa", tmp_path, base_name="x/y", lm_head=lambda: torch.ones(32, HIDDEN))


def tiny_model(folder: Path, lm_head: Tensor) -> Path:
    """Write what export needs of a model folder: its description and its output matrix."""
    folder.mkdir()
    fields = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": VOCAB,
        "max_position_embeddings": 32,
    }
    (folder / "config.json").write_text(json.dumps(fields))
    save_file({"lm_head.weight": lm_head}, folder / "model.safetensors")
    return folder


def command(*arguments: str) -> int:
    parser = argparse.ArgumentParser(prog="export")
    add_arguments(parser)
    return run(parser.parse_args(arguments))


def test_command_exports_native_heads(tmp_path: Path, lm_head: Tensor, capsys: pytest.CaptureFixture) -> None:
    model, heads = tiny_model(tmp_path / "model", lm_head), make_heads("shared")
    save_heads(tmp_path / "heads.safetensors", heads, storage="float32")
    common = ["--heads", str(tmp_path / "heads.safetensors"), "--model", str(model), "--dtype", "float32"]
    assert command(*common, "--format", "vllm", "--out", str(tmp_path / "d"), "--base-name", "x/y") == 0
    captured = capsys.readouterr()
    assert "Wrote 3 heads as vllm" in captured.out and '"num_speculative_tokens": 3' in captured.err
    # From one public layout to another, through the same command.
    again = ["--heads", str(tmp_path / "d"), "--model", str(model), "--dtype", "float32"]
    assert command(*again, "--format", "medusa", "--out", str(tmp_path / "a")) == 0
    back = read_heads(tmp_path / "a", Target(HIDDEN, VOCAB, lm_head=lambda: lm_head))
    assert back.base_name == str(model) and back.heads.config == heads.config
    assert torch.equal(full_logits(back.heads, lm_head), full_logits(heads, lm_head))


def test_command_tells_errors_in_one_line(tmp_path: Path, lm_head: Tensor, capsys: pytest.CaptureFixture) -> None:
    model = tiny_model(tmp_path / "model", lm_head)
    save_heads(tmp_path / "heads.safetensors", make_heads("own", width=16))
    common = ["--format", "vllm", "--out", str(tmp_path / "out")]
    assert command("--heads", str(tmp_path / "heads.safetensors"), "--model", str(model), *common) == 2
    assert "wide blocks" in capsys.readouterr().err
    assert command("--heads", str(tmp_path / "gone"), "--model", str(model), *common) == 2
    assert "no such file" in capsys.readouterr().err
    assert command("--heads", str(tmp_path / "heads.safetensors"), "--model", "some/hub-name", *common) == 2
    captured = capsys.readouterr().err
    assert captured.count("\n") == 1 and "some/hub-name" in captured


def test_help_names_formats_and_their_readers(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        command("--help")
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert all(word in text for word in ("medusa-v2", "text-generation-inference", "vLLM", "--width none"))


def test_bundled_model_gives_its_output_matrix(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from engine.models.base_output import open_base

    base = open_base("bundled")
    assert (base.hidden_size, base.vocab_size) == (576, 49152)
    config = HeadsConfig(576, 49152, num_heads=2, output="truncated", draft_vocab=DRAFT)
    heads = MedusaHeads(config, TOKEN_MAP)
    export_heads(heads, "vllm", tmp_path, base_name=base.name, lm_head=base.lm_head, dtype=torch.float32)
    rows = load_file(tmp_path / "model.safetensors")["lm_head.weight"]
    assert torch.equal(rows, base.lm_head()[TOKEN_MAP]) and rows.std() > 0
    assert json.loads((tmp_path / "config.json").read_text())["base_model_name_or_path"].startswith("HuggingFaceTB/")
