"""What a joint training leaves: a plain model with the adapters merged in, its heads and tree, as one folder.

The app and the training commands open that folder like any other model and find the heads and the tree in it.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from engine.backbone import BackboneConfig, BackboneWeights, LayerWeights
from engine.block_weights import DenseWeight
from engine.heads import MedusaHeads
from engine.models.gguf_file import GGUFModel
from engine.models.heads_file import save_heads
from engine.models.hf_folder import HFFolder, TokenizerPieces, save_hf_folder
from engine.models.tokenizer import pieces_from_gguf
from engine.nested_tree import tree_file
from engine.training.calibrate import Calibration, write_calibration
from engine.training.dense import TrainingModel, dense_backbone
from engine.training.lora import LoraAdapters, LoraLinear

__all__ = ["HEADS_FILE", "merged_model", "merged_weights", "save_model"]

HEADS_FILE = "heads.safetensors"  # where a model folder keeps its heads


@torch.no_grad()
def merged_weights(model: TrainingModel) -> BackboneWeights:
    """Return the weights of an adapted model with every adapter's change added, float32."""
    backbone = model.backbone
    assert isinstance(backbone.lm_head, LoraLinear), "the model has no adapters"
    return BackboneWeights(
        embedding=DenseWeight(backbone.embed.weight.float()),
        layers=[_layer(layer, backbone.config) for layer in backbone.layers],
        norm=backbone.norm.weight.float(),
        lm_head=DenseWeight(_merged(backbone.lm_head)),
    )


def merged_model(model: TrainingModel) -> TrainingModel:
    """Return a plain copy of an adapted model, in the same type and on the same device."""
    dtype = model.backbone.cos.dtype
    backbone = dense_backbone(model.backbone.config, merged_weights(model), model.device, dtype)
    return replace(model, backbone=backbone)


def save_model(
    folder: Path,
    source: TrainingModel,
    weights: BackboneWeights,
    heads: MedusaHeads,
    calibration: Calibration,
    storage: str = "int8",
    max_shard_bytes: int = 4 << 30,
) -> None:
    """Write the folder; `source` names the tokenizer's origin. config.json comes last and marks completion."""
    folder.mkdir(parents=True, exist_ok=True)
    heads_path = folder / HEADS_FILE
    save_heads(heads_path, heads, {"base_model": folder.resolve().name}, storage=storage)
    about = {"heads": HEADS_FILE, "model": folder.resolve().name}
    write_calibration(tree_file(heads_path), calibration, about)
    config = source.backbone.config
    tokenizer = _tokenizer_pieces(source.path, folder)
    save_hf_folder(folder, config, weights, tokenizer=tokenizer, max_shard_bytes=max_shard_bytes)


def adapter_tensors(adapters: LoraAdapters) -> dict[str, Tensor]:
    """Return the adapters' factors in bfloat16, by name."""
    return {name: tensor.detach().to("cpu", torch.bfloat16) for name, tensor in adapters.state_dict().items()}


def _tokenizer_pieces(source: Path, folder: Path) -> TokenizerPieces:
    if source.is_dir():
        return HFFolder(source).tokenizer_pieces()
    return pieces_from_gguf(GGUFModel(source).tokenizer_fields(), folder)


def _merged(linear: LoraLinear) -> Tensor:
    return linear.base.weight.float() + linear.adapter.delta()


def _layer(layer: torch.nn.Module, config: BackboneConfig) -> LayerWeights:
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    query, key, value = map(DenseWeight, _merged(layer.qkv).split((queries, keys, keys)))
    gate, up = map(DenseWeight, _merged(layer.gate_up).chunk(2))
    return LayerWeights(
        query=query,
        key=key,
        value=value,
        attention_output=DenseWeight(_merged(layer.attention_output)),
        gate=gate,
        up=up,
        down=DenseWeight(_merged(layer.down)),
        attention_norm=layer.attention_norm.weight.float(),
        mlp_norm=layer.mlp_norm.weight.float(),
    )
