"""Draft heads from every public layout: what is loaded equals what was stored, and what does not fit is refused."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.errors import CheckpointMismatchError
from engine.heads import HeadsConfig, MedusaHeads
from engine.models.head_formats import Target, load_any_heads, read_heads
from engine.models.heads_file import save_heads

HIDDEN, VOCAB, HEADS, LAYERS, DRAFT = 8, 24, 3, 2, 10
LOADS = {"hidden_size": HIDDEN, "vocab_size": VOCAB}


def random_tensor(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) * 7919 + random_tensor.count()))


def _counter():
    state = {"next": 0}

    def count() -> int:
        state["next"] += 1
        return state["next"]

    return count


random_tensor.count = _counter()


def medusa_tensors(heads: int = HEADS, layers: int = LAYERS, prefix: str = "", outputs: bool = True) -> dict:
    tensors = {}
    for head in range(heads):
        for layer in range(layers):
            tensors[f"{prefix}{head}.{layer}.linear.weight"] = random_tensor(HIDDEN, HIDDEN)
            tensors[f"{prefix}{head}.{layer}.linear.bias"] = random_tensor(HIDDEN)
        if outputs:
            tensors[f"{prefix}{head}.{layers}.weight"] = random_tensor(VOCAB, HIDDEN)
    return tensors


def vllm_tensors(prefix: str = "", bias: bool = True, shared: bool = False, rows: int = VOCAB) -> dict:
    tensors = {}
    for head in range(HEADS):
        for layer in range(LAYERS):
            tensors[f"{prefix}blocks.{head}.layers.{layer}.weight"] = random_tensor(HIDDEN, HIDDEN)
            if bias:
                tensors[f"{prefix}blocks.{head}.layers.{layer}.bias"] = random_tensor(HIDDEN)
        if not shared:
            tensors[f"{prefix}lm_heads.{head}.weight"] = random_tensor(rows, HIDDEN)
    if shared:
        tensors[f"{prefix}lm_head.weight"] = random_tensor(rows, HIDDEN)
    return tensors


def token_map() -> Tensor:
    return torch.randperm(VOCAB, generator=torch.Generator().manual_seed(5))[:DRAFT]


def write(folder: Path, name: str, tensors: dict, **settings: object) -> Path:
    folder.mkdir(exist_ok=True)
    if name.endswith(".safetensors"):
        save_file(tensors, folder / name)
    else:
        torch.save(tensors, folder / name)
    if settings:
        (folder / "config.json").write_text(json.dumps(settings))
    return folder


def literal_logits(hidden: Tensor, blocks: list[tuple[Tensor, Tensor]], output: Tensor) -> Tensor:
    """The paper's head as a formula, in float64: W2 (x + SiLU(W1 x + b)) with the block repeated."""
    x = hidden.double()
    for weight, bias in blocks:
        inner = x @ weight.double().T + bias.double()
        x = x + inner / (1 + torch.exp(-inner))
    return x @ output.double().T


def check_head(heads: MedusaHeads, head: int, blocks: list[tuple[Tensor, Tensor]], output: Tensor) -> None:
    hidden = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(head))
    logits = heads.logits(head, heads.features(head, hidden), None)
    torch.testing.assert_close(logits.double(), literal_logits(hidden, blocks, output), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["medusa_lm_head.pt", "medusa_lm_head.safetensors"])
def test_official_layout_trusts_tensors_over_config(tmp_path: Path, name: str) -> None:
    tensors = medusa_tensors(heads=5, layers=1)
    folder = write(
        tmp_path, name, tensors, medusa_num_heads=2, medusa_num_layers=1, base_model_name_or_path="lmsys/vicuna-7b-v1.3"
    )
    checkpoint = read_heads(folder, Target(HIDDEN, VOCAB, "vicuna-7b-v1.3"))
    heads = checkpoint.heads
    assert heads.config == HeadsConfig(HIDDEN, VOCAB, num_heads=5, num_layers=1, output="own")
    assert checkpoint.format == "medusa"
    assert len(checkpoint.notes) == 1 and "says 2 heads, the tensors hold 5" in checkpoint.notes[0]
    for head in range(5):
        blocks = [(tensors[f"{head}.0.linear.weight"], tensors[f"{head}.0.linear.bias"])]
        assert torch.equal(heads.heads[head].blocks[0].linear.weight, blocks[0][0])
        assert torch.equal(heads.heads[head].blocks[0].linear.bias, blocks[0][1])
        assert torch.equal(heads.outputs[head].weight, tensors[f"{head}.1.weight"])
        check_head(heads, head, blocks, tensors[f"{head}.1.weight"])


def test_official_layout_with_several_layers_in_half_precision(tmp_path: Path) -> None:
    tensors = {name: tensor.half() for name, tensor in medusa_tensors().items()}
    heads = load_any_heads(write(tmp_path, "medusa_lm_head.pt", tensors) / "medusa_lm_head.pt", **LOADS)
    assert heads.config.num_layers == LAYERS
    assert all(parameter.dtype == torch.float16 for parameter in heads.parameters())
    blocks = [(tensors[f"1.{layer}.linear.weight"], tensors[f"1.{layer}.linear.bias"]) for layer in range(LAYERS)]
    check_head(heads.float(), 1, blocks, tensors[f"1.{LAYERS}.weight"])


def test_files_from_before_torch_1_6_and_trainer_wrappers_load(tmp_path: Path) -> None:
    tensors = medusa_tensors()
    path = tmp_path / "heads.pt"
    torch.save({"state_dict": tensors, "epoch": 3}, path, _use_new_zipfile_serialization=False)
    heads = load_any_heads(path, **LOADS)
    assert torch.equal(heads.outputs[2].weight, tensors[f"2.{LAYERS}.weight"])


def test_version_2_uses_the_backbones_output(tmp_path: Path) -> None:
    tensors = medusa_tensors(layers=1, outputs=False)
    checkpoint = read_heads(write(tmp_path, "medusa_lm_head.safetensors", tensors), Target(HIDDEN, VOCAB))
    heads, lm_head = checkpoint.heads, torch.nn.Linear(HIDDEN, VOCAB, bias=False)
    assert checkpoint.format == "medusa-v2" and heads.config.output == "shared"
    hidden = random_tensor(4, HIDDEN)
    for head in range(HEADS):
        blocks = [(tensors[f"{head}.0.linear.weight"], tensors[f"{head}.0.linear.bias"])]
        logits = heads.logits(head, heads.features(head, hidden), lm_head)
        expected = literal_logits(hidden, blocks, lm_head.weight)
        torch.testing.assert_close(logits.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_full_medusa_2_model_reads_only_the_heads(tmp_path: Path, kind: str) -> None:
    """The shards of the backbone need not even exist, so they cannot have been read."""
    tensors = medusa_tensors(prefix="medusa_head.")
    stem = "model" if kind == "safetensors" else "pytorch_model"
    names = list(tensors)
    shards = {f"{stem}-00002-of-00003.{kind}": names[: len(names) // 2]}
    shards[f"{stem}-00003-of-00003.{kind}"] = names[len(names) // 2 :]
    weight_map = dict.fromkeys(
        ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"],
        f"{stem}-00001-of-00003.{kind}",
    )
    for shard, part in shards.items():
        write(tmp_path, shard, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, shard)
    (tmp_path / f"{stem}.{kind}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = read_heads(tmp_path, Target(HIDDEN, VOCAB))
    assert checkpoint.format == "medusa-2"
    for head in range(HEADS):
        blocks = [
            (tensors[f"medusa_head.{head}.{layer}.linear.weight"], tensors[f"medusa_head.{head}.{layer}.linear.bias"])
            for layer in range(LAYERS)
        ]
        check_head(checkpoint.heads, head, blocks, tensors[f"medusa_head.{head}.{LAYERS}.weight"])


@pytest.mark.parametrize("prefix", ["", "medusa_heads."])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_vllm_layout(tmp_path: Path, prefix: str, bias: bool, shared: bool) -> None:
    tensors = vllm_tensors(prefix, bias, shared)
    checkpoint = read_heads(write(tmp_path, "model.safetensors", tensors, num_heads=HEADS), Target(HIDDEN, VOCAB))
    assert checkpoint.format == "vllm" and checkpoint.notes == []
    assert checkpoint.heads.config == HeadsConfig(HIDDEN, VOCAB, num_heads=HEADS, num_layers=LAYERS, output="own")
    for head in range(HEADS):
        place = f"{prefix}blocks.{head}.layers."
        zero = torch.zeros(HIDDEN)
        blocks = [(tensors[f"{place}{layer}.weight"], tensors.get(f"{place}{layer}.bias", zero)) for layer in range(2)]
        output = tensors[f"{prefix}lm_head.weight" if shared else f"{prefix}lm_heads.{head}.weight"]
        check_head(checkpoint.heads, head, blocks, output)


def test_vllm_heads_that_share_an_output_share_its_memory(tmp_path: Path) -> None:
    heads = load_any_heads(write(tmp_path, "model.safetensors", vllm_tensors(shared=True)), **LOADS)
    assert len({output.weight.data_ptr() for output in heads.outputs}) == 1


def test_vllm_lone_first_output_serves_all_heads(tmp_path: Path) -> None:
    tensors = vllm_tensors(shared=True)
    tensors["lm_heads.0.weight"] = tensors.pop("lm_head.weight")
    heads = load_any_heads(write(tmp_path, "model.safetensors", tensors), **LOADS)
    assert all(torch.equal(output.weight, tensors["lm_heads.0.weight"]) for output in heads.outputs)


@pytest.mark.parametrize("rows", [DRAFT, VOCAB])
@pytest.mark.parametrize("shared", [True, False])
def test_vllm_token_map_gives_a_draft_vocabulary(tmp_path: Path, rows: int, shared: bool) -> None:
    """Matrices come cut to the map's rows, or whole, to be cut on loading as vLLM does."""
    tensors = vllm_tensors(rows=rows, shared=shared) | {"token_map": token_map().int()}
    heads = load_any_heads(write(tmp_path, "model.safetensors", tensors), **LOADS)
    assert heads.config.output == "own_truncated" and heads.config.draft_vocab == DRAFT
    assert torch.equal(heads.to_token_ids(torch.arange(DRAFT)), token_map())
    for head in range(HEADS):
        stored = tensors["lm_head.weight" if shared else f"lm_heads.{head}.weight"]
        assert torch.equal(heads.outputs[head].weight, stored if rows == DRAFT else stored[token_map()])


@pytest.mark.parametrize("truncated", [True, False])
def test_outputs_that_are_the_backbones_become_shared(tmp_path: Path, truncated: bool) -> None:
    lm_head = random_tensor(VOCAB, HIDDEN)
    tensors = vllm_tensors(shared=True)
    tensors["lm_head.weight"] = (lm_head[token_map()] if truncated else lm_head).bfloat16()
    tensors |= {name: tensor.bfloat16() for name, tensor in tensors.items() if tensor.is_floating_point()}
    if truncated:
        tensors["token_map"] = token_map()
    folder = write(tmp_path, "model.safetensors", tensors)
    same = read_heads(folder, Target(HIDDEN, VOCAB, lm_head=lambda: lm_head)).heads
    other = read_heads(folder, Target(HIDDEN, VOCAB, lm_head=lambda: lm_head + 1)).heads
    assert same.config.output == ("truncated" if truncated else "shared")
    assert other.config.output == ("own_truncated" if truncated else "own")


def test_native_file_is_recognised(tmp_path: Path) -> None:
    config = HeadsConfig(HIDDEN, VOCAB, num_heads=2, width=16, output="truncated", draft_vocab=DRAFT)
    heads = MedusaHeads(config, token_map())
    torch.nn.init.normal_(heads.heads[1].blocks[0].down.weight)
    save_heads(tmp_path / "heads.safetensors", heads, {"base_model": "tiny"}, storage="float32")
    checkpoint = read_heads(tmp_path, Target(HIDDEN, VOCAB, "tiny"))
    assert checkpoint.format == "native" and checkpoint.heads.config == config and checkpoint.notes == []
    for name, tensor in heads.state_dict().items():
        assert torch.equal(checkpoint.heads.state_dict()[name], tensor)


def test_another_base_models_name_is_noted_not_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, "medusa_lm_head.pt", medusa_tensors(), base_model_name_or_path="lmsys/vicuna-7b-v1.3")
    notes = read_heads(folder, Target(HIDDEN, VOCAB, "SmolLM2-135M")).notes
    assert len(notes) == 1 and "lmsys/vicuna-7b-v1.3" in notes[0] and "SmolLM2-135M" in notes[0]


def test_config_that_cannot_be_read_is_noted(tmp_path: Path) -> None:
    folder = write(tmp_path, "medusa_lm_head.pt", medusa_tensors())
    (folder / "config.json").write_text("{")
    assert "config.json" in read_heads(folder, Target(HIDDEN, VOCAB)).notes[0]


def refused(path: Path, *parts: str, hidden: int = HIDDEN, vocab: int = VOCAB, name: str | None = None) -> None:
    """Check that loading is refused with a sentence that holds all `parts`."""
    with pytest.raises(CheckpointMismatchError) as caught:
        load_any_heads(path, hidden_size=hidden, vocab_size=vocab, base_name=name)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert message.endswith(".") and "\n" not in message


def every_layout(tmp_path: Path) -> list[Path]:
    native = tmp_path / "native.safetensors"
    save_heads(native, MedusaHeads(HeadsConfig(HIDDEN, VOCAB, output="own")), {"base_model": "other/model"})
    name = "other/model"
    return [
        native,
        write(tmp_path / "a", "medusa_lm_head.pt", medusa_tensors(), base_model_name_or_path=name),
        write(tmp_path / "c", "model.safetensors", medusa_tensors(prefix="medusa_head."), _name_or_path=name),
        write(tmp_path / "d", "model.safetensors", vllm_tensors(), base_model_name_or_path=name),
    ]


def test_sizes_that_do_not_fit_are_refused_with_both_numbers(tmp_path: Path) -> None:
    for path in every_layout(tmp_path):
        refused(path, "hidden size of 8 (other/model)", "mine has 16", "Load the model", hidden=16, name="mine")
        refused(path, "vocabulary of 24 (other/model)", "mine has 32", "Load the model", vocab=32, name="mine")
    shared = write(tmp_path / "b", "medusa_lm_head.pt", medusa_tensors(layers=1, outputs=False))
    refused(shared, "hidden size of 8", "16", hidden=16)


@pytest.mark.parametrize(
    "missing", ["1.0.linear.weight", "1.1.linear.bias", f"1.{LAYERS}.weight", f"2.{LAYERS - 1}.linear.weight"]
)
def test_missing_tensors_are_refused(tmp_path: Path, missing: str) -> None:
    tensors = medusa_tensors()
    del tensors[missing]
    refused(write(tmp_path, "medusa_lm_head.pt", tensors), "lack", "incomplete")


@pytest.mark.parametrize("missing", ["blocks.0.layers.1.weight", "lm_heads.1.weight", "blocks.1.layers.0.bias"])
def test_missing_vllm_tensors_are_refused(tmp_path: Path, missing: str) -> None:
    tensors = vllm_tensors()
    del tensors[missing]
    refused(write(tmp_path, "model.safetensors", tensors), "lack", "incomplete")


def test_vllm_heads_without_any_output_are_refused(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in vllm_tensors().items() if "lm_head" not in name}
    refused(write(tmp_path, "model.safetensors", tensors), "no output matrix")


def test_output_matrices_alone_are_refused(tmp_path: Path) -> None:
    refused(write(tmp_path, "medusa_lm_head.pt", {"0.1.weight": random_tensor(VOCAB, HIDDEN)}), "residual blocks")


def test_an_absurd_head_number_is_refused_at_once(tmp_path: Path) -> None:
    tensors = medusa_tensors() | {"4000000000.0.linear.weight": random_tensor(HIDDEN, HIDDEN)}
    refused(write(tmp_path, "medusa_lm_head.pt", tensors), "lack", "(3, 0)")


@pytest.mark.parametrize(
    "extra",
    [
        {"blocks.0.layers.0.weight": torch.ones(HIDDEN, HIDDEN)},
        {"medusa_head.0.0.linear.weight": torch.ones(HIDDEN, HIDDEN)},
        {"fc.weight": torch.ones(HIDDEN, HIDDEN)},
    ],
)
def test_mixed_layouts_are_refused(tmp_path: Path, extra: dict) -> None:
    refused(write(tmp_path, "medusa_lm_head.safetensors", medusa_tensors() | extra), "mixes")


def test_mixed_vllm_outputs_and_prefixes_are_refused(tmp_path: Path) -> None:
    both = vllm_tensors() | {"lm_head.weight": random_tensor(VOCAB, HIDDEN)}
    refused(write(tmp_path / "outputs", "model.safetensors", both), "mixes a shared lm_head.weight")
    both = vllm_tensors() | {"medusa_heads.blocks.0.layers.0.weight": random_tensor(HIDDEN, HIDDEN)}
    refused(write(tmp_path / "prefixes", "model.safetensors", both), "mixes two layouts")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["0.0.linear.weight", "2.1.linear.bias", f"1.{LAYERS}.weight"])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, name: str, bad: float) -> None:
    tensors = medusa_tensors()
    tensors[name].view(-1)[3] = bad
    refused(write(tmp_path, "medusa_lm_head.safetensors", tensors), name, "NaN or infinite")


def test_native_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    heads = MedusaHeads(HeadsConfig(HIDDEN, VOCAB))
    heads.heads[0].blocks[0].linear.bias.data[0] = float("nan")
    save_heads(tmp_path / "heads.safetensors", heads)
    refused(tmp_path, "NaN or infinite")


@pytest.mark.parametrize(
    ("tokens", "part"),
    [
        (torch.tensor([0, 1, VOCAB]), f"from 0 to {VOCAB}, but the loaded model has {VOCAB}"),
        (torch.tensor([0, -1, 2]), "from -1 to 2"),
        (torch.tensor([0, 1, 1]), "twice"),
        (torch.tensor([0.0, 1.0, 2.0]), "not token ids"),
        (torch.zeros(0, dtype=torch.long), "not token ids"),
    ],
)
def test_token_maps_that_make_no_sense_are_refused(tmp_path: Path, tokens: Tensor, part: str) -> None:
    tensors = vllm_tensors(rows=3) | {"token_map": tokens}
    refused(write(tmp_path, "model.safetensors", tensors), part)


@pytest.mark.parametrize(
    ("name", "tensor", "part"),
    [
        ("0.0.linear.weight", torch.ones(HIDDEN), "not a matrix"),
        ("1.0.linear.weight", torch.ones(HIDDEN, HIDDEN - 1), "[8, 7], but [8, 8]"),
        ("1.0.linear.bias", torch.ones(HIDDEN + 1), "[9], but [8]"),
        ("1.0.linear.weight", torch.ones(HIDDEN, HIDDEN, dtype=torch.int8), "torch.int8"),
        (f"0.{LAYERS}.weight", torch.tensor(1.0), "not a matrix"),
    ],
)
def test_tensors_of_the_wrong_shape_or_type_are_refused(tmp_path: Path, name: str, tensor: Tensor, part: str) -> None:
    refused(write(tmp_path, "medusa_lm_head.pt", medusa_tensors() | {name: tensor}), part)


class RunsCode:
    """Pickles into a call that leaves a file behind when it is run."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.witness),)


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    torch.save(medusa_tensors() | {"trap": RunsCode(witness)}, tmp_path / "medusa_lm_head.pt")
    refused(tmp_path, "asks to run code", "mkdir", "Nothing was run", ".safetensors")
    assert not witness.exists()


@pytest.mark.parametrize("name", ["medusa_lm_head.pt", "medusa_lm_head.safetensors"])
@pytest.mark.parametrize("keep", [0, 1, 300, -1])
def test_damaged_files_are_refused(tmp_path: Path, name: str, keep: int) -> None:
    path = write(tmp_path, name, medusa_tensors()) / name
    path.write_bytes(path.read_bytes()[:keep])
    refused(tmp_path, "damaged", "again")


@pytest.mark.parametrize("name", ["medusa_lm_head.pt", "medusa_lm_head.safetensors"])
def test_files_of_something_else_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"<!DOCTYPE html><html>Not found</html>" * 40)
    refused(tmp_path, "damaged")


def test_pickles_without_tensors_are_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"0.0.linear.weight": 1.5}, tmp_path / "number.pt")
    refused(tmp_path / "list.pt", "holds a list")
    refused(tmp_path / "number.pt", "no tensors (0.0.linear.weight)")


def test_an_index_that_lies_is_refused(tmp_path: Path) -> None:
    tensors = medusa_tensors(prefix="medusa_head.")
    write(tmp_path, "part.safetensors", {name: tensors[name] for name in list(tensors)[1:]})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "part.safetensors")}))
    refused(tmp_path, "lacks the tensor medusa_head.0.0.linear.weight", "promises")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "gone.safetensors")}))
    refused(tmp_path, "gone.safetensors does not exist")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "../part.safetensors")}))
    refused(tmp_path, "outside its folder")
    index.write_text(json.dumps([1]))
    refused(tmp_path, "JSON list")
    index.write_text(json.dumps({"weight_map": 1}))
    refused(tmp_path, "no weight_map")


def test_places_without_heads_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "gone", "no such file")
    refused(tmp_path, "holds 0 checkpoint files")
    for name in ("one.safetensors", "two.safetensors"):
        write(tmp_path, name, medusa_tensors())
    refused(tmp_path, "holds 2 checkpoint files")
    backbone = write(tmp_path / "plain", "model.safetensors", {"model.norm.weight": torch.ones(HIDDEN)})
    refused(backbone, "no draft heads", "model.norm.weight")


def test_loading_leaves_no_hold_on_the_file(tmp_path: Path) -> None:
    """Heads live in memory of their own: the file may be overwritten while they are in use."""
    path = write(tmp_path, "medusa_lm_head.safetensors", medusa_tensors()) / "medusa_lm_head.safetensors"
    heads = load_any_heads(path, **LOADS)
    before = {name: tensor.clone() for name, tensor in heads.state_dict().items()}
    path.write_bytes(b"\0" * path.stat().st_size)
    assert all(torch.equal(tensor, before[name]) for name, tensor in heads.state_dict().items())
