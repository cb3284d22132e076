"""A Hugging Face config.json of the Llama family, to and from `BackboneConfig`.

Whatever the backbone cannot compute (biases, scaled rotary positions, quantised weights, other activations) is refused
with the value found; nothing is silently ignored.
"""

from collections.abc import Mapping
from typing import Any

import torch

from engine.backbone import BackboneConfig
from engine.errors import ModelNotFoundError

__all__ = ["MODEL_TYPES", "from_hf_config", "to_hf_config"]

MODEL_TYPES = ("llama", "mistral", "qwen2")


def from_hf_config(fields: Mapping[str, Any], where: str) -> BackboneConfig:
    """Return the backbone's shape; `where` names the file in errors. Raises ModelNotFoundError."""
    _refuse_unsupported(fields, where)
    hidden = _number(fields, "hidden_size", where)
    heads = _number(fields, "num_attention_heads", where)
    return BackboneConfig(
        hidden_size=hidden,
        num_layers=_number(fields, "num_hidden_layers", where),
        num_heads=heads,
        num_kv_heads=int(fields.get("num_key_value_heads") or heads),
        head_dim=int(fields.get("head_dim") or hidden // heads),
        intermediate_size=_number(fields, "intermediate_size", where),
        vocab_size=_number(fields, "vocab_size", where),
        rope_theta=float(_rope(fields).get("rope_theta") or fields.get("rope_theta") or 10000.0),
        rms_norm_eps=float(fields.get("rms_norm_eps", 1e-6)),
        max_positions=_max_positions(fields, where),
    )


def to_hf_config(config: BackboneConfig, *, is_tied: bool, dtype: torch.dtype) -> dict[str, Any]:
    """Return config.json for a Llama model of this shape, readable by transformers 4 and 5 and by vLLM."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_positions,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": is_tied,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def _refuse_unsupported(fields: Mapping[str, Any], where: str) -> None:
    rope = _rope(fields)
    partial = rope.get("partial_rotary_factor", fields.get("partial_rotary_factor", 1))
    quantization = (fields.get("quantization_config") or {}).get("quant_method", "none")
    for name, value, supported in (
        ("model_type", fields.get("model_type"), MODEL_TYPES),
        ("hidden_act", fields.get("hidden_act", "silu"), ("silu",)),
        ("rope type", rope.get("rope_type", rope.get("type", "default")), ("default",)),
        ("partial_rotary_factor", partial, (1,)),
        ("attention_bias", fields.get("attention_bias", False), (False,)),
        ("mlp_bias", fields.get("mlp_bias", False), (False,)),
        ("quantization", quantization, ("none",)),
    ):
        if value not in supported:
            allowed = " or ".join(map(str, supported))
            raise ModelNotFoundError(
                f"{where} has {name} {value!r}; this app knows {allowed} only. Choose another model."
            )


def _rope(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what is said about rotary positions: `rope_parameters` since transformers 5, before it `rope_scaling`."""
    return fields.get("rope_parameters") or fields.get("rope_scaling") or {}


def _max_positions(fields: Mapping[str, Any], where: str) -> int:
    """Return the longest context in which full attention is what the model computes.

    Up to the length of a sliding window the two are the same, so a model with one is used up to there.
    """
    positions = _number(fields, "max_position_embeddings", where)
    window = fields.get("sliding_window")
    is_sliding = fields.get("use_sliding_window", fields["model_type"] == "mistral")
    return min(positions, int(window)) if window and is_sliding else positions


def _number(fields: Mapping[str, Any], name: str, where: str) -> int:
    value = fields.get(name)
    if not isinstance(value, int) or value < 1:
        raise ModelNotFoundError(f"{where} has {name} {value!r}, not a positive number; download the model again.")
    return value
