"""Read a Llama-family GGUF file without dequantising it: shape, block weights and the tokenizer's raw fields.

The blocks keep their codes and scales. GGUF stores the rows of the query and key projections interleaved for its own
rotary layout; they come back here in the half-split order, which only permutes rows.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, dequantize
from torch import Tensor

from engine.backbone import BackboneConfig, BackboneWeights, LayerWeights
from engine.block_weights import BLOCK, DenseWeight, Q4Affine, Q8Symmetric, Weight
from engine.errors import ModelNotFoundError
from engine.models.gguf_reader import read_gguf

__all__ = ["GGUFModel", "TokenizerFields"]


@dataclass(frozen=True)
class TokenizerFields:
    """What the file says about its tokenizer."""

    tokens: list[str]
    token_types: list[int]
    merges: list[str]
    pre_tokenizer: str
    chat_template: str
    end_token_id: int


class GGUFModel:
    """One GGUF file, opened for reading."""

    def __init__(self, path: Path) -> None:
        try:
            header = read_gguf(path)
        except (OSError, ValueError) as error:
            raise ModelNotFoundError(f"{path} cannot be read as a GGUF file ({error}); download it again.") from error
        self._fields, self._tensors = header.fields, header.tensors
        architecture = self._field("general.architecture")
        if architecture != "llama":
            raise ModelNotFoundError(f"{path.name} holds a {architecture} model; this reader knows llama only.")

    def config(self) -> BackboneConfig:
        """Return the model's shape."""
        hidden = int(self._field("llama.embedding_length"))
        heads = int(self._field("llama.attention.head_count"))
        return BackboneConfig(
            hidden_size=hidden,
            num_layers=int(self._field("llama.block_count")),
            num_heads=heads,
            num_kv_heads=int(self._field("llama.attention.head_count_kv", heads)),
            head_dim=int(self._field("llama.attention.key_length", hidden // heads)),
            intermediate_size=int(self._field("llama.feed_forward_length")),
            vocab_size=self._tensors["token_embd.weight"].data.shape[0],
            rope_theta=float(self._field("llama.rope.freq_base", 10000.0)),
            rms_norm_eps=float(self._field("llama.attention.layer_norm_rms_epsilon")),
            max_positions=int(self._field("llama.context_length")),
        )

    def weight_format(self) -> str:
        """Return the block type of most of the layers' matrices, for people: "Q4_1"."""
        kinds = [
            tensor.kind.name
            for name, tensor in self._tensors.items()
            if name.startswith("blk.") and tensor.data.ndim > 1
        ]
        return max(set(kinds), key=kinds.count)

    def weights(self) -> BackboneWeights:
        """Return all weights in their own block formats."""
        config = self.config()
        embedding = self.weight("token_embd.weight")
        return BackboneWeights(
            embedding=embedding,
            layers=[self._layer(index, config) for index in range(config.num_layers)],
            norm=self._vector("output_norm.weight"),
            lm_head=self.weight("output.weight") if "output.weight" in self._tensors else embedding,
        )

    def tokenizer_fields(self) -> TokenizerFields:
        """Return the vocabulary, merges and chat template."""
        return TokenizerFields(
            tokens=self._field("tokenizer.ggml.tokens"),
            token_types=self._field("tokenizer.ggml.token_type"),
            merges=self._field("tokenizer.ggml.merges"),
            pre_tokenizer=self._field("tokenizer.ggml.pre", "default"),
            chat_template=self._field("tokenizer.chat_template", ""),
            end_token_id=int(self._field("tokenizer.ggml.eos_token_id")),
        )

    def weight(self, name: str) -> Weight:
        """Return one matrix: Q4_1, Q4_0 and Q8_0 as blocks, every other type as dense float32."""
        tensor = self._tensors[name]
        kind = tensor.kind
        if kind == GGMLQuantizationType.Q4_1:
            return _read_q4(tensor.data, has_minimum=True)
        if kind == GGMLQuantizationType.Q4_0:
            return _read_q4(tensor.data, has_minimum=False)
        if kind == GGMLQuantizationType.Q8_0:
            return _read_q8(tensor.data)
        return DenseWeight(torch.from_numpy(dequantize(tensor.data, kind)))

    def _layer(self, index: int, config: BackboneConfig) -> LayerWeights:
        def matrix(part: str) -> Weight:
            return self.weight(f"blk.{index}.{part}.weight")

        return LayerWeights(
            query=matrix("attn_q").permute_rows(_half_split(config.num_heads, config.head_dim)),
            key=matrix("attn_k").permute_rows(_half_split(config.num_kv_heads, config.head_dim)),
            value=matrix("attn_v"),
            attention_output=matrix("attn_output"),
            gate=matrix("ffn_gate"),
            up=matrix("ffn_up"),
            down=matrix("ffn_down"),
            attention_norm=self._vector(f"blk.{index}.attn_norm.weight"),
            mlp_norm=self._vector(f"blk.{index}.ffn_norm.weight"),
        )

    def _vector(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        return torch.from_numpy(dequantize(tensor.data, tensor.kind).astype(np.float32))

    def _field(self, key: str, default: Any = None) -> Any:  # the file decides the type
        return self._fields.get(key, default)


def _read_q4(data: np.ndarray, has_minimum: bool) -> Q4Affine:
    header = 4 if has_minimum else 2
    blocks = data.reshape(data.shape[0], -1, header + BLOCK // 2)
    scale = blocks[..., :2].copy().view(np.float16)[..., 0]
    minimum = blocks[..., 2:4].copy().view(np.float16)[..., 0] if has_minimum else -8 * scale
    packed = blocks[..., header:]
    codes = np.concatenate([packed & 15, packed >> 4], axis=-1).reshape(data.shape[0], -1)
    return Q4Affine(torch.from_numpy(codes), torch.from_numpy(scale), torch.from_numpy(minimum))


def _read_q8(data: np.ndarray) -> Q8Symmetric:
    blocks = data.reshape(data.shape[0], -1, 2 + BLOCK)
    scale = blocks[..., :2].copy().view(np.float16)[..., 0]
    codes = blocks[..., 2:].copy().view(np.int8).reshape(data.shape[0], -1)
    return Q8Symmetric(torch.from_numpy(codes), torch.from_numpy(scale))


def _half_split(num_heads: int, head_dim: int) -> Tensor:
    """Row order that turns GGUF's interleaved rotary pairs (2i, 2i+1) into (i, i + head_dim / 2)."""
    rows = torch.arange(num_heads * head_dim).view(num_heads, head_dim // 2, 2)
    return rows.transpose(1, 2).reshape(-1)
