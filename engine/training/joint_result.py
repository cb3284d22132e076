"""What a joint training leaves: a plain model with the adapters merged in, its heads and tree, as one folder.

The app and the training commands open that folder like any other model and find the heads and the tree in it.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.backbone import Backbone, BackboneWeights, LayerWeights
from engine.block_weights import DenseWeight
from engine.errors import InvalidParameterError
from engine.heads import MedusaHeads
from engine.models.gguf_file import GGUFModel
from engine.models.heads_file import save_heads
from engine.models.hf_folder import HFFolder, TokenizerPieces, save_hf_folder
from engine.models.tokenizer import pieces_from_gguf
from engine.nested_tree import tree_file
from engine.training.calibrate import calibrate, expected_worth, write_calibration
from engine.training.dataset import TextSet, build_cache
from engine.training.dense import TrainingModel, dense_backbone
from engine.training.joint_quality import compare
from engine.training.lora import LoraAdapters, LoraLinear
from engine.training.medusa1 import Vocabulary
from engine.training.medusa2 import JointPlan, JointTrainer
from engine.training.processes import ALONE, Processes
from engine.training.pruned_worth import with_pruned
from engine.training.quantized import plain_matrix
from engine.training.ranks import measure_ranks

__all__ = ["HEADS_FILE", "adapter_tensors", "merged_model", "merged_weights", "save_model", "train_jointly"]

HEADS_FILE = "heads.safetensors"  # where a model folder keeps its heads


@torch.no_grad()
def merged_weights(model: TrainingModel) -> BackboneWeights:
    """Return the weights of an adapted model with every adapter's change added, float32.

    A quantised linear gives what its codes stand for: that is what the adapters were trained on.
    """
    backbone = model.backbone
    assert isinstance(backbone.lm_head, LoraLinear), "the model has no adapters"
    return BackboneWeights(
        embedding=DenseWeight(backbone.embed.weight.float()),
        layers=[_layer(layer, backbone) for layer in backbone.layers],  # of DecoderLayer, adapted
        norm=backbone.norm.weight.float(),
        lm_head=DenseWeight(_merged(backbone.lm_head, backbone)),
    )


def train_jointly(
    model: TrainingModel,
    heads: MedusaHeads,
    vocabulary: Vocabulary,
    train: TextSet,
    held: TextSet,
    plan: JointPlan,
    checkpoint: Path,
    out: Path,
    storage: str,
    report: Callable[[str], None],
    processes: Processes = ALONE,
) -> str:
    """Train model and heads, then write the folder `out`; return the line that says what came of it.

    Of several processes the first writes; for the others the line is empty.
    """
    if held.num_documents < 2:
        raise InvalidParameterError(
            f"{held.num_documents} held-back conversations are too few to calibrate on; distill at least 20."
        )
    original = "the original" if model.quantize == "none" else f"the original in {model.quantize}"
    report(f"the model is held to what {original} says")
    trainer = JointTrainer(model, heads, vocabulary, train, plan, checkpoint, processes)
    trainer.run_reported(report)
    processes.close()
    if not processes.is_first:
        return ""
    tuned = merged_model(model)
    report("adapters merged; measuring on the held-back conversations")
    cache = build_cache(tuned, held, heads=heads)
    of_tuned = Vocabulary(tuned, heads.token_map)
    measured = measure_ranks(heads, cache, of_tuned)
    calibration = with_pruned(calibrate(measured), measured, heads, cache, of_tuned)
    weights = merged_weights(model)
    trainer.adapters.take_out(model.backbone)
    quality = compare(model, tuned, held)
    out.mkdir(parents=True, exist_ok=True)
    write_calibration(tree_file(out / HEADS_FILE), calibration, {"heads": HEADS_FILE, "model": out.resolve().name})
    save_model(out, model, weights, heads, storage)
    return (
        f"Wrote the model to {out} after {trainer.step} steps: {expected_worth(calibration)}. Against {original}: KL "
        f"{quality.kl:.4f} a token, the same best token {quality.same_best:.1%}, perplexity "
        f"{quality.perplexity_tuned:.3f} instead of {quality.perplexity_original:.3f} on held-back answers."
    )


def merged_model(model: TrainingModel) -> TrainingModel:
    """Return a plain copy of an adapted model, in the same type and on the same device."""
    dtype = model.backbone.cos.dtype
    backbone = dense_backbone(model.backbone.config, merged_weights(model), model.device, dtype)
    return replace(model, backbone=backbone, quantize="none")


def save_model(
    folder: Path,
    source: TrainingModel,
    weights: BackboneWeights,
    heads: MedusaHeads,
    storage: str = "int8",
) -> None:
    """Write the folder but for the tree, config.json last; `source` says where the tokenizer came from."""
    folder.mkdir(parents=True, exist_ok=True)
    save_heads(folder / HEADS_FILE, heads, {"base_model": folder.resolve().name}, storage=storage)
    save_hf_folder(folder, source.backbone.config, weights, tokenizer=_tokenizer_pieces(source.path, folder))


def adapter_tensors(adapters: LoraAdapters) -> dict[str, Tensor]:
    """Return the adapters' factors in bfloat16, by name."""
    return {name: tensor.detach().to("cpu", torch.bfloat16) for name, tensor in adapters.state_dict().items()}


def _tokenizer_pieces(source: Path, folder: Path) -> TokenizerPieces:
    if source.is_dir():
        return HFFolder(source).tokenizer_pieces()
    return pieces_from_gguf(GGUFModel(source).tokenizer_fields(), folder)


def _merged(linear: LoraLinear, backbone: Backbone) -> Tensor:
    columns, like = linear.adapter.down.shape[1], backbone.cos
    return plain_matrix(linear.base, columns, like.device, like.dtype) + linear.adapter.delta()


def _layer(layer: Any, backbone: Backbone) -> LayerWeights:
    config = backbone.config
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    query, key, value = map(DenseWeight, _merged(layer.qkv, backbone).split((queries, keys, keys)))
    gate, up = map(DenseWeight, _merged(layer.gate_up, backbone).chunk(2))
    return LayerWeights(
        query=query,
        key=key,
        value=value,
        attention_output=DenseWeight(_merged(layer.attention_output, backbone)),
        gate=gate,
        up=up,
        down=DenseWeight(_merged(layer.down, backbone)),
        attention_norm=layer.attention_norm.weight.float(),
        mlp_norm=layer.mlp_norm.weight.float(),
    )
