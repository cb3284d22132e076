"""A Runner over torch modules: any device, any linears. Native and captured runners share its contract."""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.attention import attend_masked, attend_prefill, attend_rowwise
from engine.backbone import Backbone
from engine.kv_cache import KVCache
from engine.tree import MAX_TREE_NODES, CandidateTree

__all__ = ["TorchRunner"]

_PREFILL_ROWS = 512  # bounds the activations' memory; longer prompts go in pieces


class TorchRunner:
    """See `engine.runner.Runner`. `exact` chooses attention whose rows do not depend on their neighbours."""

    max_tree_nodes = MAX_TREE_NODES

    def __init__(self, backbone: Backbone, *, device: str, dtype: torch.dtype, weights: str, exact: bool) -> None:
        self.config = backbone.config
        self.device = device
        self.weights = weights
        self.backbone = backbone
        self._attend_tree = attend_rowwise if exact else attend_masked
        self._cache = KVCache(backbone.config, device, dtype)

    @property
    def num_committed(self) -> int:
        return self._cache.length

    @torch.inference_mode()
    def prefill(self, tokens: Sequence[int]) -> Tensor:
        ids = torch.tensor(tokens, device=self.device)
        for piece in ids.split(_PREFILL_ROWS):
            self._cache.reserve(len(piece))
            positions = torch.arange(len(piece), device=self.device) + self._cache.length
            hidden = self.backbone(piece, positions, attend_prefill(self._cache))
            self._cache.advance(len(piece))
        return hidden[-1]

    @torch.inference_mode()
    def verify(self, tokens: Sequence[int], tree: CandidateTree) -> Tensor:
        self._cache.reserve(tree.max_depth + 1)
        positions = self._cache.length + tree.depth.to(self.device)
        return self.backbone(torch.tensor(tokens, device=self.device), positions, self._attend_tree(self._cache, tree))

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        return self.backbone.lm_head(hidden).float()

    def greedy(self, hidden: Tensor) -> list[int]:
        return self.logits(hidden).argmax(-1).tolist()

    def embed(self, tokens: Tensor) -> Tensor:
        return self.backbone.embed(tokens.to(self.device))

    @torch.inference_mode()
    def commit(self, path: Sequence[int]) -> None:
        self._cache.commit(path)

    def truncate(self, length: int) -> None:
        self._cache.truncate(length)

    def committed_rows(self, layer: int) -> tuple[Tensor, Tensor]:
        rows = slice(0, self._cache.length)
        return self._cache.keys[layer, :, rows], self._cache.values[layer, :, rows]

    def memory_bytes(self) -> int:
        held = (*self.backbone.parameters(), *self.backbone.buffers())
        return sum(tensor.numel() * tensor.element_size() for tensor in held) + self._cache.memory_bytes()
