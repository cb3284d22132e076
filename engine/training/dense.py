"""A model loaded for training and for batched generation: the shared backbone over plain matrices, and its tokenizer.

Plain bfloat16 matrices hold exactly the values that the quantised file stands for, up to that rounding, and are what
large batches run fastest on.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.backbone import Backbone
from engine.errors import ModelNotFoundError
from engine.linear import DenseLinear
from engine.models.gguf_file import GGUFModel
from engine.models.loader import bundled_path
from engine.models.tokenizer import ChatTokenizer, from_gguf

__all__ = ["TrainingModel", "attend_causal", "find_model", "load_model"]


@dataclass(frozen=True)
class TrainingModel:
    """A backbone and the tokenizer that belongs to it; `name` is what heads trained on it are filed under."""

    name: str
    backbone: Backbone
    tokenizer: ChatTokenizer

    @property
    def device(self) -> torch.device:
        return self.backbone.cos.device

    @property
    def lm_head_weight(self) -> Tensor:
        """The output matrix [vocab, hidden]."""
        return self.backbone.lm_head.weight

    def embed(self, tokens: Tensor) -> Tensor:
        return self.backbone.embed(tokens)


def load_model(model: str, device: str | torch.device, dtype: torch.dtype = torch.bfloat16) -> TrainingModel:
    """Load "bundled" or a GGUF file with plain matrices; raises ModelNotFoundError for anything else."""
    path = find_model(model)
    source = GGUFModel(path)
    config, weights = source.config(), source.weights()
    embedding = nn.Embedding.from_pretrained(weights.embedding.dequantize().to(dtype))
    lm_head = DenseLinear(weights.lm_head, dtype)
    if weights.lm_head is weights.embedding:
        lm_head.weight = embedding.weight
    backbone = Backbone(
        config, weights, embed=embedding, linear=lambda weight: DenseLinear(weight, dtype), lm_head=lm_head, dtype=dtype
    )
    backbone.requires_grad_(False)
    return TrainingModel(path.stem, backbone.to(device), from_gguf(source.tokenizer_fields()))


def find_model(model: str) -> Path:
    """Return the file behind a model's name."""
    if model == "bundled":
        return bundled_path()
    path = Path(model).expanduser()
    if path.suffix != ".gguf" or not path.is_file():
        raise ModelNotFoundError(f"{model} is not a GGUF file; give 'bundled' or the path of a .gguf file.")
    return path


def attend_causal(_: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend to what came before in the same row: [batch, tokens, heads, head_dim] in and out.

    Rows are padded at their end only, where causality alone keeps the padding out.
    """
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)
