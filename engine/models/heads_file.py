"""Our own file of draft heads: one safetensors file with the state of `MedusaHeads` and its shape in the metadata.

The metadata key "heads_config" holds the `HeadsConfig` as JSON; "base_model" and whatever the caller adds stand beside
it as strings. Matrices may be stored as int8 codes with one scale a row (`X.weight` and `X.weight_scale`); they come
back as plain floats.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine.errors import CheckpointMismatchError, ModelNotFoundError
from engine.heads import HeadsConfig, MedusaHeads

__all__ = ["STORAGES", "load_heads", "quantize_rows", "read_heads_metadata", "save_heads"]

STORAGES = {"int8": torch.int8, "float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_SCALE = "_scale"


def save_heads(
    path: Path, heads: MedusaHeads, metadata: Mapping[str, str] | None = None, storage: str = "bfloat16"
) -> None:
    """Write `heads` with their shape; `storage` is a key of STORAGES, "int8" halves the file again.

    The file appears whole or not at all.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in heads.state_dict().items():
        tensors.update(_stored(name, tensor.detach().cpu(), storage))
    notes = {**(metadata or {}), "format": "medusa-heads", "heads_config": json.dumps(heads.config.to_dict())}
    unfinished = path.with_name(path.name + ".part")
    save_file(tensors, unfinished, metadata=notes)
    unfinished.chmod(0o644)  # safetensors writes files for their owner alone
    os.replace(unfinished, path)


def load_heads(path: Path, dtype: torch.dtype = torch.float32) -> MedusaHeads:
    """Read heads written by `save_heads`, all matrices in `dtype`.

    Raises ModelNotFoundError if the file cannot be read, CheckpointMismatchError if its tensors do not fit its config.
    """
    config = heads_config_of(read_heads_metadata(path), path)
    with safe_open(path, framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    state = {
        name: _restored(name, tensor, stored, dtype) for name, tensor in stored.items() if not name.endswith(_SCALE)
    }
    heads = MedusaHeads(config, token_map=state.get("token_map"))
    try:
        heads.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointMismatchError(f"{path} does not hold what its heads_config says: {error}") from error
    return heads.to(dtype)


def read_heads_metadata(path: Path) -> dict[str, str]:
    """Return the strings written beside the tensors, without reading these."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise ModelNotFoundError(f"{path} cannot be read as a heads file ({error}); train or download it again.") from (
            error
        )


def heads_config_of(metadata: Mapping[str, str], path: Path) -> HeadsConfig:
    """Return the shape that the metadata of `path` names; keys that this version does not know are refused."""
    if "heads_config" not in metadata:
        raise CheckpointMismatchError(f"{path} has no heads_config in its metadata; it is not a file of draft heads.")
    values = json.loads(metadata["heads_config"])
    unknown = set(values) - {field.name for field in fields(HeadsConfig)}
    if unknown:
        raise CheckpointMismatchError(f"{path} names {', '.join(sorted(unknown))}; update this app to load it.")
    try:
        return HeadsConfig.from_dict(values)
    except (TypeError, KeyError) as error:  # within the prefix attention's shape
        raise CheckpointMismatchError(f"{path} has a prefix of an unknown shape ({error}); update this app.") from error


def quantize_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix [N, K] to int8 codes with one float32 scale a row [N]; value = code * scale."""
    scale = values.float().abs().amax(dim=1).clamp(min=1e-12) / 127
    return (values.float() / scale.unsqueeze(1)).round().to(torch.int8), scale


def _stored(name: str, tensor: Tensor, storage: str) -> dict[str, Tensor]:
    if not tensor.is_floating_point():
        return {name: tensor.to(torch.int32) if name == "token_map" else tensor.contiguous()}
    if storage != "int8":
        return {name: tensor.to(STORAGES[storage]).contiguous()}
    if tensor.dim() != 2:
        return {name: tensor.to(torch.float32).contiguous()}
    codes, scale = quantize_rows(tensor)
    return {name: codes, name + _SCALE: scale}


def _restored(name: str, tensor: Tensor, stored: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    if name == "token_map":
        return tensor.long()
    if name + _SCALE in stored:
        return (tensor.float() * stored[name + _SCALE].unsqueeze(1)).to(dtype)
    return tensor.to(dtype)
