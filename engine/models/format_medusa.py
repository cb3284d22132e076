"""The layouts of MEDUSA's own code: heads alone (v0.1), heads over the backbone's output ("version 2"), full models.

Names are `{head}.{layer}.linear.weight|bias` for the residual blocks and `{head}.{layers}.weight` for the output
matrix; a full model (MEDUSA-2) has the prefix `medusa_head.` and its backbone beside them. Version 2 has no output
matrices: its consumers apply the backbone's `lm_head`.
"""

import re
from collections.abc import Iterable

from engine.errors import CheckpointMismatchError
from engine.heads import HeadsConfig
from engine.models.head_layout import HeadLayout, build_layout
from engine.models.tensor_files import some_names

__all__ = ["block_names", "has_medusa_names", "medusa_config", "medusa_layout", "output_name"]

_PREFIX = "medusa_head."
_NAME = re.compile(r"(medusa_head\.)?(\d+)\.(\d+)\.(linear\.weight|linear\.bias|weight)")


def has_medusa_names(names: Iterable[str]) -> bool:
    """Whether any tensor is named as in MEDUSA's own code."""
    return any(_NAME.fullmatch(name) for name in names)


def medusa_layout(names: list[str]) -> HeadLayout:
    """Read the layout from tensor names of which at least one is MEDUSA's."""
    found = [match for name in names if (match := _NAME.fullmatch(name))]
    is_full = bool(found[0][1])
    if any(bool(match[1]) != is_full for match in found):
        raise CheckpointMismatchError(
            f"The checkpoint mixes two layouts: heads with and without the prefix {_PREFIX!r}; export it again as one."
        )
    weights: dict[tuple[int, int], str] = {}
    biases: dict[tuple[int, int], str] = {}
    outputs: dict[tuple[int, int], str] = {}
    roles = {"linear.weight": weights, "linear.bias": biases, "weight": outputs}
    for match in found:
        roles[match[4]][int(match[2]), int(match[3])] = match[0]
    if not weights or not biases:
        raise CheckpointMismatchError(
            f"The heads lack residual blocks: only {some_names(match[0] for match in found)} is there; "
            "the checkpoint is incomplete, download it again."
        )
    layers = 1 + max(layer for _, layer in weights)
    misplaced = [name for (_, layer), name in outputs.items() if layer != layers]
    if misplaced:
        raise CheckpointMismatchError(
            f"The output matrix {misplaced[0]} does not follow {layers} residual blocks; "
            "the checkpoint is incomplete, download it again."
        )
    file_format = "medusa-2" if is_full else "medusa" if outputs else "medusa-v2"
    return build_layout(file_format, weights, biases, {head: name for (head, _), name in outputs.items()})


def block_names(head: int, layer: int, prefix: str = "") -> tuple[str, str]:
    """Return the names of a residual block's weight and bias."""
    return f"{prefix}{head}.{layer}.linear.weight", f"{prefix}{head}.{layer}.linear.bias"


def output_name(head: int, num_layers: int, prefix: str = "") -> str:
    """Return the name of a head's output matrix."""
    return f"{prefix}{head}.{num_layers}.weight"


def medusa_config(config: HeadsConfig, base_name: str, *, has_outputs: bool) -> dict[str, object]:
    """Return the config.json that MEDUSA's code and text-generation-inference read.

    It has no "architectures": text-generation-inference takes a checkpoint with that key for another kind of drafter.
    """
    fields: dict[str, object] = {
        "base_model_name_or_path": base_name,
        "medusa_num_heads": config.num_heads,
        "medusa_num_layers": config.num_layers,
    }
    return fields if has_outputs else fields | {"version": "2"}
