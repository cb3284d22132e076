"""The layout that vLLM serves: `blocks.{head}.layers.{layer}.weight` with output matrices in the same file.

Outputs are `lm_heads.{head}.weight`, or one `lm_head.weight` for all heads (config `original_lm_head`). With
`token_map` they cover a draft vocabulary; matrices of the full vocabulary are cut to its rows. Every name may carry
the prefix `medusa_heads.`. Biases are there only with `medusa_fc_bias`.
"""

import re
from collections.abc import Iterable

from engine.errors import CheckpointMismatchError
from engine.heads import HeadsConfig
from engine.models.head_layout import HeadLayout, build_layout

__all__ = ["has_vllm_names", "vllm_config", "vllm_layout"]

_PREFIX = "medusa_heads."
_BLOCK = re.compile(r"(?:medusa_heads\.)?blocks\.(\d+)\.layers\.(\d+)\.(weight|bias)")
_OUTPUT = re.compile(r"(?:medusa_heads\.)?lm_heads\.(\d+)\.weight")
_SHARED_OUTPUT = re.compile(r"(?:medusa_heads\.)?lm_head\.weight")
_TOKEN_MAP = re.compile(r"(?:medusa_heads\.)?token_map")


def has_vllm_names(names: Iterable[str]) -> bool:
    """Whether any tensor is a residual block named as in vLLM."""
    return any(_BLOCK.fullmatch(name) for name in names)


def vllm_layout(names: list[str]) -> HeadLayout:
    """Read the layout from tensor names of which at least one is a vLLM block."""
    blocks = [match for name in names if (match := _BLOCK.fullmatch(name))]
    weights = {(int(match[1]), int(match[2])): match[0] for match in blocks if match[3] == "weight"}
    biases = {(int(match[1]), int(match[2])): match[0] for match in blocks if match[3] == "bias"}
    outputs = {int(match[1]): name for name in names if (match := _OUTPUT.fullmatch(name))}
    shared = [name for name in names if _SHARED_OUTPUT.fullmatch(name)]
    token_maps = [name for name in names if _TOKEN_MAP.fullmatch(name)]
    if len({name.startswith(_PREFIX) for name in [*weights.values(), *biases.values()]}) > 1:
        raise CheckpointMismatchError(
            f"The checkpoint mixes two layouts: blocks with and without the prefix {_PREFIX!r}; export it again as one."
        )
    if not weights:
        raise CheckpointMismatchError("The heads have block biases but no block weights; download them again.")
    if shared and outputs:
        raise CheckpointMismatchError(
            f"The checkpoint mixes a shared {shared[0]} with {len(outputs)} matrices of single heads; export it again."
        )
    num_heads = 1 + max(head for head, _ in weights)
    if shared or (len(outputs) == 1 and num_heads > 1 and 0 in outputs):
        # vLLM loads a lone lm_heads.0 for every head when told to share it.
        outputs = dict.fromkeys(range(num_heads), shared[0] if shared else outputs[0])
    if not outputs:
        raise CheckpointMismatchError(
            "The heads have no output matrix (lm_heads.0.weight or lm_head.weight); vLLM's layout always has one, "
            "so the checkpoint is incomplete: download or export it again."
        )
    return build_layout("vllm", weights, biases, outputs, token_maps[0] if token_maps else None)


def vllm_config(config: HeadsConfig, base_name: str) -> dict[str, object]:
    """Return the config.json that vLLM reads for heads with biases.

    No other key may hold "num" with "heads" or "layers": vLLM renames each such key to the two below.
    """
    return {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "base_model_name_or_path": base_name,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "truncated_vocab_size": config.output_size,
        "num_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "medusa_fc_bias": True,
        "original_lm_head": not config.output.startswith("own"),
    }
