"""Write draft heads in the layouts that other programs serve: MEDUSA v0.1, MEDUSA version 2, vLLM.

Heads are rewritten only where that is exact: a shared `lm_head` becomes copies of it, a draft vocabulary becomes vLLM's
`token_map`. What a layout cannot say is refused with the training options that give heads it can.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import CheckpointMismatchError, InvalidParameterError
from engine.heads import HeadsConfig, MedusaHeads
from engine.models.format_medusa import block_names, medusa_config, output_name
from engine.models.format_vllm import vllm_config
from engine.models.tensor_files import save_safetensors

__all__ = ["FORMATS", "export_heads"]

FORMATS = {
    "medusa": "MEDUSA's own code, TensorRT-LLM, text-generation-inference (version 1)",
    "medusa-v2": "text-generation-inference (version 2): small, uses the model's own output matrix",
    "vllm": "vLLM",
}
_OFFICIAL_HEADS = 5


def export_heads(
    heads: MedusaHeads,
    file_format: str,
    out: Path,
    *,
    base_name: str,
    lm_head: Callable[[], Tensor],
    dtype: torch.dtype = torch.bfloat16,
) -> list[str]:
    """Write `heads` as `file_format` (a key of FORMATS) into the folder `out`, new or empty; return notes for the user.

    `base_name` is the name or path by which the reader finds the backbone. `lm_head` gives the backbone's output matrix
    [vocab, hidden]; it is called only where the layout needs its rows. Raises InvalidParameterError for heads that the
    layout cannot express.
    """
    _refuse_inexpressible(heads.config, file_format)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidParameterError(f"{out} already exists and is not an empty folder; name a new one.")
    config = heads.config
    if file_format == "vllm":
        tensors, settings = _vllm_tensors(heads, lm_head, dtype), vllm_config(config, base_name)
        files = ["model.safetensors"]
    else:
        has_outputs = file_format == "medusa"
        tensors = _medusa_tensors(heads, lm_head if has_outputs else None, dtype)
        settings = medusa_config(config, base_name, has_outputs=has_outputs)
        # Each reader of version 1 takes only one of the two files; version 2 has a single reader.
        files = ["medusa_lm_head.safetensors", "medusa_lm_head.pt"][: 1 + has_outputs]
    out.mkdir(parents=True, exist_ok=True)
    for name in files:
        _save(tensors, out / name)
    (out / "config.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
    return _notes(config, file_format)


def _refuse_inexpressible(config: HeadsConfig, file_format: str) -> None:
    """Refuse, in one sentence with the remedy, what the layout has no words for."""
    if file_format not in FORMATS:
        raise InvalidParameterError(f"format is {file_format!r}; allowed is one of {', '.join(FORMATS)}.")
    reason = ""
    if config.width is not None:
        reason = f"they have wide blocks (width {config.width}), and no public layout has those"
    elif config.prefix is not None:
        reason = "they look back over the text through a prefix attention, and no public layout has one"
    elif config.draft_vocab and file_format != "vllm":
        reason = f"they draft from {config.draft_vocab} of {config.vocab_size} tokens, which only vllm can express"
    elif file_format == "medusa-v2" and config.output != "shared":
        reason = "they have output matrices of their own, and version 2 has only the model's"
    elif file_format == "medusa-v2" and config.num_layers != 1:
        reason = f"they have {config.num_layers} residual layers, and its readers take exactly 1"
    if reason:
        output = "shared --layers 1" if file_format == "medusa-v2" else "own"
        fits_vllm = config.width is None and config.prefix is None and file_format != "vllm"
        other = "; or export these as --format vllm" if fits_vllm else ""
        raise InvalidParameterError(
            f"These heads cannot be written as {file_format}: {reason}. "
            f"Train exportable ones with `train --width none --sees hidden --output {output}`{other}."
        )


def _medusa_tensors(heads: MedusaHeads, lm_head: Callable[[], Tensor] | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return blocks, and unless `lm_head` is None one full output matrix a head."""
    config = heads.config
    tensors: dict[str, Tensor] = {}
    for head, layer, block in _blocks(heads, dtype):
        tensors |= dict(zip(block_names(head, layer), block, strict=True))
    if lm_head is None:
        return tensors
    if config.output == "own":
        outputs = _own_outputs(heads, dtype)
    else:
        rows = _lm_head_rows(heads, lm_head, dtype)
        outputs = [rows.clone() for _ in range(config.num_heads)]  # safetensors refuses tensors that share memory
    return tensors | {output_name(head, config.num_layers): output for head, output in enumerate(outputs)}


def _vllm_tensors(heads: MedusaHeads, lm_head: Callable[[], Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return blocks, one matrix for all heads or one a head, and the token map of a draft vocabulary."""
    tensors: dict[str, Tensor] = {}
    for head, layer, (weight, bias) in _blocks(heads, dtype):
        place = f"blocks.{head}.layers.{layer}"
        tensors |= {f"{place}.weight": weight, f"{place}.bias": bias}
    if heads.config.output.startswith("own"):
        tensors |= {f"lm_heads.{head}.weight": output for head, output in enumerate(_own_outputs(heads, dtype))}
    else:
        tensors["lm_head.weight"] = _lm_head_rows(heads, lm_head, dtype)
    if heads.token_map is not None:
        tensors["token_map"] = _token_map(heads)
    return tensors


def _blocks(heads: MedusaHeads, dtype: torch.dtype) -> Iterator[tuple[int, int, tuple[Tensor, Tensor]]]:
    """Yield head, layer and the block's weight and bias."""
    state = heads.state_dict()
    for head in range(heads.config.num_heads):
        for layer in range(heads.config.num_layers):
            place = f"heads.{head}.blocks.{layer}.linear"
            yield head, layer, (state[f"{place}.weight"].to(dtype), state[f"{place}.bias"].to(dtype))


def _own_outputs(heads: MedusaHeads, dtype: torch.dtype) -> list[Tensor]:
    """Return one matrix a head, none sharing memory with another."""
    state = heads.state_dict()
    return [state[f"outputs.{head}.weight"].to(dtype, copy=True) for head in range(heads.config.num_heads)]


def _token_map(heads: MedusaHeads) -> Tensor:
    return heads.state_dict()["token_map"].long()


def _lm_head_rows(heads: MedusaHeads, lm_head: Callable[[], Tensor], dtype: torch.dtype) -> Tensor:
    """Return the rows of the backbone's output matrix that the heads use, [output_size, hidden]."""
    config = heads.config
    matrix = lm_head()
    if tuple(matrix.shape) != (config.vocab_size, config.hidden_size):
        raise CheckpointMismatchError(
            f"The heads need an output matrix of {config.vocab_size} x {config.hidden_size}, but the model's is "
            f"{matrix.shape[0]} x {matrix.shape[1]}; name the model they were trained on with --model."
        )
    return (matrix if heads.token_map is None else matrix[_token_map(heads).to(matrix.device)]).to(dtype)


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    if path.suffix == ".pt":
        torch.save({name: tensor.detach().cpu() for name, tensor in tensors.items()}, path)
    else:
        save_safetensors(tensors, path)


def _notes(config: HeadsConfig, file_format: str) -> list[str]:
    if file_format == "medusa" and config.num_heads != _OFFICIAL_HEADS:
        return [
            f"MEDUSA's own loader always builds {_OFFICIAL_HEADS} heads and leaves missing ones untrained; "
            f"use at most {config.num_heads} there."
        ]
    if file_format == "vllm":
        return [f'Serve with --speculative-config \'{{"model": DIR, "num_speculative_tokens": {config.num_heads}}}\'.']
    return []
