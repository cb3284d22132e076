"""A model loaded for training and for batched generation: the shared backbone, frozen, and its tokenizer.

Plain bfloat16 matrices hold exactly the values that the quantised file stands for, up to that rounding, and are what
large batches run fastest on. For a large model, or to train on what a 4-bit app computes, the layers' linears may be
quantised; the embedding and `lm_head` stay plain.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.backbone import Backbone, BackboneConfig, BackboneWeights
from engine.linear import DenseLinear
from engine.models.loader import BUNDLED, bundled_path, open_model
from engine.models.tokenizer import ChatTokenizer
from engine.training.quantized import linear_factory

__all__ = ["TrainingModel", "attend_causal", "dense_backbone", "load_model"]


@dataclass(frozen=True)
class TrainingModel:
    """A backbone and the tokenizer that belongs to it; `name` is what heads trained on it are filed under.

    `path` is the file or folder that they came from, `quantize` the format of the layers' linears.
    """

    name: str
    backbone: Backbone
    tokenizer: ChatTokenizer
    path: Path
    quantize: str = "none"

    @property
    def device(self) -> torch.device:
        return self.backbone.cos.device

    @property
    def lm_head_weight(self) -> Tensor:
        """The output matrix [vocab, hidden]."""
        return self.backbone.lm_head.weight

    def embed(self, tokens: Tensor) -> Tensor:
        return self.backbone.embed(tokens)


def load_model(
    model: str, device: str | torch.device, dtype: torch.dtype = torch.bfloat16, quantize: str = "none"
) -> TrainingModel:
    """Load "bundled", a GGUF file or a model folder; raises ModelNotFoundError for anything else.

    A file's model is named after the file, a folder's after the folder. `quantize` is one of quantized.QUANTIZE;
    raises UnsupportedDeviceError where that does not work on `device`.
    """
    source = open_model(model)
    path = bundled_path() if source.name == BUNDLED else Path(model).expanduser()
    name = path.stem if path.is_file() else source.name
    backbone = dense_backbone(source.config, source.weights, device, dtype, quantize)
    return TrainingModel(name, backbone, source.tokenizer, path, quantize)


def dense_backbone(
    config: BackboneConfig,
    weights: BackboneWeights,
    device: str | torch.device,
    dtype: torch.dtype = torch.bfloat16,
    quantize: str = "none",
) -> Backbone:
    """Build a frozen backbone over plain or quantised linears; a tied output matrix stays one with the embedding."""
    embedding = nn.Embedding.from_pretrained(weights.embedding.dequantize().to(dtype))
    lm_head = DenseLinear(weights.lm_head, dtype)
    if weights.lm_head is weights.embedding:
        lm_head.weight = embedding.weight
    linear = linear_factory(quantize, config, device, dtype)
    backbone = Backbone(config, weights, embed=embedding, linear=linear, lm_head=lm_head, dtype=dtype)
    return backbone.requires_grad_(False).to(device)


def attend_causal(_: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend to what came before in the same row: [batch, tokens, heads, head_dim] in and out.

    Rows are padded at their end only, where causality alone keeps the padding out.
    """
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)
