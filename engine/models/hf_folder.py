"""Read and write a model folder in Hugging Face's layout: config.json, safetensors shards, the tokenizer's files.

Weights stay views of the mapped files until a layer is built from them, so that a model needs no more memory to read
than its largest layer. The tokenizer comes back as raw pieces; what they mean is not known here.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.backbone import BackboneConfig, BackboneWeights, LayerWeights
from engine.block_weights import DenseWeight
from engine.errors import ModelNotFoundError
from engine.models.hf_config import from_hf_config, to_hf_config
from engine.models.hf_shards import ShardWriter
from engine.models.tensor_files import MODEL_FILES, TensorFiles, read_json, some_names

__all__ = ["HFFolder", "TokenizerPieces", "save_hf_folder"]

_EMBEDDING, _NORM, _LM_HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
_MATRICES = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "attention_output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


@dataclass(frozen=True)
class TokenizerPieces:
    """What a folder says about its tokenizer.

    `special_tokens` maps names such as "bos_token" to texts, for the chat template, which may use them.
    """

    tokenizer_json: Path
    chat_template: str
    end_token_ids: tuple[int, ...]
    special_tokens: dict[str, str] = field(default_factory=dict)


class HFFolder:
    """One model folder, opened for reading; raises ModelNotFoundError for what cannot be used, with the reason."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / "config.json").is_file():
            raise ModelNotFoundError(f"{path} has no config.json; name a folder with a downloaded model.")
        self._fields = read_json(path / "config.json", ModelNotFoundError)
        self._files: TensorFiles | None = None

    def config(self) -> BackboneConfig:
        """Return the model's shape, or refuse what the backbone cannot compute."""
        return from_hf_config(self._fields, str(self.path / "config.json"))

    def weights(self) -> BackboneWeights:
        """Return all weights as dense matrices in their stored type, still views of the files."""
        config = self.config()
        self._refuse_biases()
        embedding = self._matrix(_EMBEDDING, config.vocab_size, config.hidden_size)
        return BackboneWeights(
            embedding=embedding,
            layers=[self._layer(index, config) for index in range(config.num_layers)],
            norm=self._vector(_NORM, config.hidden_size),
            lm_head=embedding if self._is_tied() else self._matrix(_LM_HEAD, config.vocab_size, config.hidden_size),
        )

    def lm_head(self) -> DenseWeight:
        """Return the output matrix alone."""
        config = self.config()
        name = _EMBEDDING if self._is_tied() else _LM_HEAD
        return self._matrix(name, config.vocab_size, config.hidden_size)

    def tokenizer_pieces(self) -> TokenizerPieces:
        """Return the tokenizer's file, chat template and end tokens."""
        tokenizer_json = self.path / "tokenizer.json"
        if not tokenizer_json.is_file():
            raise ModelNotFoundError(
                f"{self.path} has no tokenizer.json; open the tokenizer in transformers and save_pretrained it there."
            )
        settings = self._optional_json("tokenizer_config.json")
        tokens = {**self._optional_json("special_tokens_map.json"), **settings}
        return TokenizerPieces(
            tokenizer_json=tokenizer_json,
            chat_template=self._chat_template(settings),
            end_token_ids=self._end_token_ids(),
            special_tokens={name: text for name in tokens if (text := _token_text(name, tokens[name])) is not None},
        )

    @property
    def _tensors(self) -> TensorFiles:
        if self._files is None:
            found = [self.path / name for name in MODEL_FILES if (self.path / name).is_file()]
            if not found:
                raise ModelNotFoundError(
                    f"{self.path} holds none of {', '.join(MODEL_FILES)}; download the model again."
                )
            self._files = TensorFiles(found[0], ModelNotFoundError)
        return self._files

    def _is_tied(self) -> bool:
        """Whether the embedding is the output matrix: told so, or nothing said and no matrix there."""
        return bool(self._fields.get("tie_word_embeddings", _LM_HEAD not in self._tensors.names))

    def _refuse_biases(self) -> None:
        biases = [name for name in self._tensors.names if name.startswith("model.") and name.endswith(".bias")]
        if biases:
            raise ModelNotFoundError(
                f"{self.path} holds a {self._fields.get('model_type')} model with {len(biases)} bias vectors "
                f"({some_names(biases, 2)}); this app computes linears without bias only. Choose another model."
            )

    def _layer(self, index: int, config: BackboneConfig) -> LayerWeights:
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        hidden, inner = config.hidden_size, config.intermediate_size
        shapes = {
            "query": (queries, hidden),
            "key": (keys, hidden),
            "value": (keys, hidden),
            "attention_output": (hidden, queries),
            "gate": (inner, hidden),
            "up": (inner, hidden),
            "down": (hidden, inner),
        }
        parts: dict[str, Any] = {
            part: self._matrix(_layer_name(index, name), *shapes[part]) for part, name in _MATRICES.items()
        }
        parts |= {part: self._vector(_layer_name(index, name), hidden) for part, name in _NORMS.items()}
        return LayerWeights(**parts)

    def _matrix(self, name: str, rows: int, columns: int) -> DenseWeight:
        return DenseWeight(self._checked(name, (rows, columns)))

    def _vector(self, name: str, size: int) -> Tensor:
        return self._checked(name, (size,))

    def _checked(self, name: str, shape: tuple[int, ...]) -> Tensor:
        found = self._tensors.shape(name)
        if found != shape:
            raise ModelNotFoundError(
                f"{name} in {self.path} has shape {list(found)}, but config.json makes it {list(shape)}; "
                "download the model again."
            )
        tensor = self._tensors.tensor(name)
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise ModelNotFoundError(
                f"{name} in {self.path} is stored as {tensor.dtype}; choose a copy in bfloat16, float16 or float32."
            )
        return tensor

    def _optional_json(self, name: str) -> dict[str, Any]:
        path = self.path / name
        return read_json(path, ModelNotFoundError) if path.is_file() else {}

    def _chat_template(self, settings: Mapping[str, Any]) -> str:
        """Return the template from its own file, else from the settings, else nothing."""
        own_file = self.path / "chat_template.jinja"
        if own_file.is_file():
            return own_file.read_text("utf-8")
        template = settings.get("chat_template") or ""
        if isinstance(template, list):  # several by name
            named = {entry.get("name"): entry.get("template", "") for entry in template}
            template = named.get("default") or next(iter(named.values()), "")
        return template

    def _end_token_ids(self) -> tuple[int, ...]:
        for fields in (self._optional_json("generation_config.json"), self._fields):
            ids = fields.get("eos_token_id")
            if ids is not None:
                return tuple(ids) if isinstance(ids, list) else (ids,)
        return ()


def save_hf_folder(
    path: Path,
    config: BackboneConfig,
    weights: BackboneWeights,
    *,
    tokenizer: TokenizerPieces | None = None,
    dtype: torch.dtype = torch.bfloat16,
    extra_tensors: Mapping[str, Tensor] | None = None,
    extra_config: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 4 << 30,
) -> None:
    """Write a Llama folder that this app, transformers and vLLM load; config.json comes last, so it marks completion.

    Quantised weights are written as the values they stand for, in `dtype`. `extra_tensors` and `extra_config` are for
    what lives beside the backbone, such as the heads of a full MEDUSA-2 model.
    """
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").unlink(missing_ok=True)
    is_tied = weights.lm_head is weights.embedding
    writer = ShardWriter(path, max_shard_bytes)
    writer.add(_EMBEDDING, weights.embedding.dequantize().to(dtype))
    for index, layer in enumerate(weights.layers):
        for part, name in _MATRICES.items():
            writer.add(_layer_name(index, name), getattr(layer, part).dequantize().to(dtype))
        for part, name in _NORMS.items():
            writer.add(_layer_name(index, name), getattr(layer, part).to(dtype))
    writer.add(_NORM, weights.norm.to(dtype))
    if not is_tied:
        writer.add(_LM_HEAD, weights.lm_head.dequantize().to(dtype))
    for name, tensor in (extra_tensors or {}).items():
        writer.add(name, tensor)
    writer.finish()
    fields = to_hf_config(config, is_tied=is_tied, dtype=dtype) | dict(extra_config or {})
    if tokenizer is not None:
        _save_tokenizer(path, tokenizer)
        fields["eos_token_id"] = list(tokenizer.end_token_ids)
    _write_json(path / "config.json", fields)


def _save_tokenizer(path: Path, tokenizer: TokenizerPieces) -> None:
    target = path / "tokenizer.json"
    if tokenizer.tokenizer_json.resolve() != target.resolve():
        shutil.copyfile(tokenizer.tokenizer_json, target)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": tokenizer.chat_template}
    _write_json(path / "tokenizer_config.json", settings | tokenizer.special_tokens)
    _write_json(path / "generation_config.json", {"eos_token_id": list(tokenizer.end_token_ids)})


def _write_json(path: Path, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _layer_name(index: int, part: str) -> str:
    return f"model.layers.{index}.{part}.weight"


def _token_text(name: str, value: object) -> str | None:
    """Return a special token's text where `name` is one's name; they come as text or as {"content": text}."""
    if not name.endswith("_token"):
        return None
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None
