"""Model folders in Hugging Face's layout: read as transformers reads them, written so that transformers reads them."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from engine.backbone import Backbone, BackboneConfig, BackboneWeights, LayerWeights
from engine.block_weights import DenseWeight, Q8Symmetric
from engine.errors import ModelNotFoundError
from engine.heads import HeadsConfig
from engine.linear import DenseLinear
from engine.models.head_formats import Target, read_heads
from engine.models.hf_folder import HFFolder, TokenizerPieces, save_hf_folder

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


def save_random(folder: Path, model: PreTrainedModel, **options: object) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    model.save_pretrained(folder, **options)
    return model.eval()


def attend_causal(_: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend to what came before, spelled out: [tokens, heads, head_dim] in and out."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query, key) / query.shape[-1] ** 0.5
    future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(future, float("-inf")).softmax(-1), value)


def our_logits(config: BackboneConfig, weights: BackboneWeights, tokens: Tensor) -> Tensor:
    backbone = Backbone(
        config,
        weights,
        embed=nn.Embedding.from_pretrained(weights.embedding.dequantize()),
        linear=lambda weight: DenseLinear(weight, torch.float32),
        lm_head=DenseLinear(weights.lm_head, torch.float32),
        dtype=torch.float32,
    )
    return backbone.lm_head(backbone(tokens, torch.arange(len(tokens)), attend_causal))


def check_logits(folder: Path, model: PreTrainedModel) -> None:
    tokens = torch.randint(SHAPE["vocab_size"], (24,), generator=torch.Generator().manual_seed(1))
    opened = HFFolder(folder)
    with torch.no_grad():
        expected = model(tokens[None]).logits[0]
        actual = our_logits(opened.config(), opened.weights(), tokens)
    assert expected.std() > 0.1  # a model that says nothing would agree with anything
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_transformers_llama(tmp_path: Path, tied: bool) -> None:
    config = LlamaConfig(**SHAPE, tie_word_embeddings=tied, rope_parameters={"rope_theta": 500.0})
    model = save_random(tmp_path, LlamaForCausalLM(config))
    weights = HFFolder(tmp_path).weights()
    assert (weights.lm_head is weights.embedding) == tied
    assert HFFolder(tmp_path).config().rope_theta == 500.0
    check_logits(tmp_path, model)


def test_shards_with_an_index_and_a_head_dim_of_its_own(tmp_path: Path) -> None:
    model = save_random(tmp_path, LlamaForCausalLM(LlamaConfig(**SHAPE, head_dim=16)), max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert HFFolder(tmp_path).config().head_dim == 16
    check_logits(tmp_path, model)


def test_mistral_is_used_up_to_its_sliding_window(tmp_path: Path) -> None:
    model = save_random(tmp_path, MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=32)))
    assert HFFolder(tmp_path).config().max_positions == 32
    check_logits(tmp_path, model)


def test_config_of_transformers_4(tmp_path: Path) -> None:
    """Before version 5 rope_theta stood alone, and several fields were left out at their defaults."""
    model = save_random(tmp_path, LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters={"rope_theta": 1e5})))
    fields = {**SHAPE, "model_type": "llama", "rope_theta": 1e5, "rope_scaling": None, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    check_logits(tmp_path, model)


def test_torch_checkpoints_load_too(tmp_path: Path) -> None:
    model = save_random(tmp_path, LlamaForCausalLM(LlamaConfig(**SHAPE)))
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    check_logits(tmp_path, model)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what a piece of memory is mapped from")
def test_weights_are_views_of_the_file_in_their_stored_type(tmp_path: Path) -> None:
    """Reading a model takes no memory of its own."""
    save_random(tmp_path, LlamaForCausalLM(LlamaConfig(**SHAPE)).bfloat16())
    values = HFFolder(tmp_path).weights().layers[1].gate.values
    assert values.dtype == torch.bfloat16
    assert mapped_file(values.data_ptr()) == str(tmp_path / "model.safetensors")


def mapped_file(address: int) -> str:
    for line in Path("/proc/self/maps").read_text().splitlines():
        region, *_, name = line.split(maxsplit=5)
        start, end = (int(edge, 16) for edge in region.split("-"))
        if start <= address < end:
            return name
    return ""


def test_qwen2_biases_are_refused(tmp_path: Path) -> None:
    save_random(tmp_path, Qwen2ForCausalLM(Qwen2Config(**SHAPE)))
    with pytest.raises(ModelNotFoundError, match=r"qwen2 model with 9 bias vectors.*q_proj\.bias|9 bias vectors"):
        HFFolder(tmp_path).weights()


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"model_type": "gemma2"}, "model_type 'gemma2'; this app knows llama or mistral or qwen2"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope type 'linear'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "rope type 'llama3'"),
        ({"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization 'gptq'"),
        ({"hidden_size": None}, "hidden_size None, not a positive number"),
    ],
)
def test_what_the_backbone_cannot_compute_is_refused_with_its_value(tmp_path: Path, change: dict, part: str) -> None:
    fields = {**SHAPE, "model_type": "llama"} | change
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ModelNotFoundError, match=re.escape(part)) as caught:
        HFFolder(tmp_path).config()
    assert str(tmp_path / "config.json") in str(caught.value)


def test_folders_that_are_no_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        HFFolder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**SHAPE, "model_type": "llama"}))
    with pytest.raises(ModelNotFoundError, match=r"holds none of model\.safetensors\.index\.json"):
        HFFolder(tmp_path).weights()
    (tmp_path / "model.safetensors").write_bytes(b"<html>")
    with pytest.raises(ModelNotFoundError, match="damaged"):
        HFFolder(tmp_path).weights()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelNotFoundError, match="cannot be read as JSON"):
        HFFolder(tmp_path)


def test_weights_that_do_not_fit_the_config_are_refused(tmp_path: Path) -> None:
    save_random(tmp_path, LlamaForCausalLM(LlamaConfig(**SHAPE)))
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    for tensor, part in (
        (torch.ones(48, 31), "[48, 31], but config.json makes it [48, 32]"),
        (torch.ones(48, 32, dtype=torch.int8), "torch.int8"),
        (torch.ones(48, 32).to(torch.float8_e4m3fn), "torch.float8_e4m3fn"),
    ):
        save_file(tensors | {name: tensor}, tmp_path / "model.safetensors")
        with pytest.raises(ModelNotFoundError, match=re.escape(part)):
            HFFolder(tmp_path).weights()
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelNotFoundError, match=f"lacks the tensor {re.escape(name)}"):
        HFFolder(tmp_path).weights()


def write_tokenizer(folder: Path) -> Path:
    words = {f"w{index}": index for index in range(SHAPE["vocab_size"])}
    Tokenizer(WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def tokenizer_pieces(folder: Path, **files: object) -> TokenizerPieces:
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text)
    return HFFolder(folder).tokenizer_pieces()


def test_tokenizer_pieces(tmp_path: Path) -> None:
    settings = {
        "chat_template": "{{ bos_token }}old",
        "bos_token": {"content": "<s>", "special": True},
        "eos_token": "</s>",
        "pad_token": None,
        "add_bos_token": True,
    }
    pieces = tokenizer_pieces(tmp_path, tokenizer_config__json=settings)
    assert pieces.tokenizer_json == tmp_path / "tokenizer.json"
    assert pieces.chat_template == "{{ bos_token }}old"
    assert pieces.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert pieces.end_token_ids == (7,)


def test_newer_files_win(tmp_path: Path) -> None:
    pieces = tokenizer_pieces(
        tmp_path,
        tokenizer_config__json={"chat_template": "old"},
        chat_template__jinja="new",
        generation_config__json={"eos_token_id": [5, 6]},
        special_tokens_map__json={"bos_token": "<b>"},
    )
    assert (pieces.chat_template, pieces.end_token_ids) == ("new", (5, 6))
    assert pieces.special_tokens == {"bos_token": "<b>"}


def test_the_default_of_several_templates_is_taken(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert tokenizer_pieces(tmp_path, tokenizer_config__json={"chat_template": named}).chat_template == "plain"


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelNotFoundError, match=r"no tokenizer\.json"):
        HFFolder(tmp_path).tokenizer_pieces()


def random_weights(tied: bool = False) -> tuple[BackboneConfig, BackboneWeights]:
    """Return a small backbone of mixed weight formats."""
    config = BackboneConfig(32, 2, 4, 2, 16, 64, 40, 777.0, 1e-5, 64)
    generator = torch.Generator().manual_seed(3)

    def dense(*shape: int) -> DenseWeight:
        return DenseWeight(torch.randn(shape, generator=generator) / 4)

    def blocks(rows: int, columns: int) -> Q8Symmetric:
        codes = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, generator=generator)
        return Q8Symmetric(codes, torch.rand(rows, columns // 32, generator=generator).half() / 300)

    layers = [
        LayerWeights(
            query=blocks(64, 32),
            key=dense(32, 32),
            value=dense(32, 32),
            attention_output=blocks(32, 64),
            gate=dense(64, 32),
            up=dense(64, 32),
            down=blocks(32, 64),
            attention_norm=torch.rand(32, generator=generator),
            mlp_norm=torch.rand(32, generator=generator),
        )
        for _ in range(2)
    ]
    embedding = dense(40, 32)
    lm_head = embedding if tied else dense(40, 32)
    return config, BackboneWeights(embedding, layers, torch.rand(32, generator=generator), lm_head)


def flat(weights: BackboneWeights) -> list[Tensor]:
    matrices = [weights.embedding.dequantize(), weights.lm_head.dequantize(), weights.norm]
    for layer in weights.layers:
        values = vars(layer).values()
        matrices += [value if isinstance(value, Tensor) else value.dequantize() for value in values]
    return matrices


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_bytes", [1 << 30, 20_000])
def test_saved_folder_round_trips_and_transformers_agrees(tmp_path: Path, tied: bool, shard_bytes: int) -> None:
    config, weights = random_weights(tied)
    save_hf_folder(tmp_path, config, weights, dtype=torch.float32, max_shard_bytes=shard_bytes)
    opened = HFFolder(tmp_path)
    back = opened.weights()
    assert opened.config() == config and (back.lm_head is back.embedding) == tied
    assert all(torch.equal(ours, stored) for ours, stored in zip(flat(weights), flat(back), strict=True))
    shards = [load_file(path) for path in tmp_path.glob("*.safetensors")]
    assert len(shards) == 1 if shard_bytes > 1 << 20 else len(shards) > 2
    for shard in shards:
        assert len(shard) == 1 or sum(tensor.nbytes for tensor in shard.values()) <= shard_bytes
    assert not list(tmp_path.glob("*.part"))
    check_logits(tmp_path, AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))


def test_saved_values_are_rounded_once_to_the_given_type(tmp_path: Path) -> None:
    config, weights = random_weights()
    save_hf_folder(tmp_path, config, weights)
    back = HFFolder(tmp_path).weights()
    assert back.norm.dtype == back.layers[0].query.values.dtype == torch.bfloat16
    for ours, stored in zip(flat(weights), flat(back), strict=True):
        assert torch.equal(ours.bfloat16(), stored.bfloat16())


def test_saving_again_replaces_the_earlier_shards(tmp_path: Path) -> None:
    config, weights = random_weights()
    save_hf_folder(tmp_path, config, weights, max_shard_bytes=10_000)
    save_hf_folder(tmp_path, config, HFFolder(tmp_path).weights(), dtype=torch.float32)  # even over its own source
    assert [file.name for file in tmp_path.glob("model*")] == ["model.safetensors"]
    for ours, stored in zip(flat(weights), flat(HFFolder(tmp_path).weights()), strict=True):
        assert torch.equal(ours.bfloat16().float(), stored)


def test_saved_tokenizer_comes_back(tmp_path: Path) -> None:
    config, weights = random_weights()
    (tmp_path / "from").mkdir()
    pieces = TokenizerPieces(write_tokenizer(tmp_path / "from"), "{{ bos_token }}ä", (2, 5), {"bos_token": "<s>"})
    save_hf_folder(tmp_path / "to", config, weights, tokenizer=pieces)
    back = HFFolder(tmp_path / "to").tokenizer_pieces()
    assert back.tokenizer_json.read_bytes() == pieces.tokenizer_json.read_bytes()
    assert (back.chat_template, back.end_token_ids, back.special_tokens) == (
        "{{ bos_token }}ä",
        (2, 5),
        {"bos_token": "<s>"},
    )
    save_hf_folder(tmp_path / "to", config, weights, tokenizer=back)  # the tokenizer may already be in place
    assert HFFolder(tmp_path / "to").tokenizer_pieces() == back


def test_a_full_medusa_2_model_can_be_saved_and_read(tmp_path: Path) -> None:
    """The backbone and its heads in one folder, each read without the other."""
    config, weights = random_weights()
    heads = {}
    for head in range(2):
        heads[f"medusa_head.{head}.0.linear.weight"] = torch.randn(32, 32)
        heads[f"medusa_head.{head}.0.linear.bias"] = torch.randn(32)
        heads[f"medusa_head.{head}.1.weight"] = torch.randn(40, 32)
    extra = {"medusa_num_heads": 2, "medusa_num_layers": 1}
    save_hf_folder(tmp_path, config, weights, dtype=torch.float32, extra_tensors=heads, extra_config=extra)
    checkpoint = read_heads(tmp_path, Target(32, 40))
    assert checkpoint.format == "medusa-2" and checkpoint.notes == []
    assert checkpoint.heads.config == HeadsConfig(32, 40, num_heads=2, output="own")
    assert torch.equal(checkpoint.heads.outputs[1].weight, heads["medusa_head.1.1.weight"])
    assert all(torch.equal(*pair) for pair in zip(flat(weights), flat(HFFolder(tmp_path).weights()), strict=True))
