"""A Runner over torch modules: any device, any linears. Native and captured runners share its contract."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.attention import attend_masked, attend_prefill, attend_rowwise
from engine.backbone import Attend, Backbone
from engine.kv_cache import KVCache
from engine.prefix_attention import PrefixAttention, feature
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
        self._dtype = dtype
        self._cache = KVCache(backbone.config, device, dtype)
        self._prefix: PrefixAttention | None = None
        self._prefixed = 0
        self._read = self._state = torch.empty(0)  # what heads read: behind the last forward's rows, and the last token
        self._is_for_heads = True

    @property
    def num_committed(self) -> int:
        return self._cache.length

    @property
    def num_prefixed(self) -> int:
        return self.num_committed if self._prefix is None else self._prefixed

    def attach(self, prefix: PrefixAttention) -> None:
        prefix.config.check_fits(self.config)
        assert self._prefix is None and not self.num_committed, "a prefix attention is attached once, before any text"
        self._prefix = prefix.requires_grad_(False).to(self.device, self._dtype)
        self._cache = KVCache(self.config, self.device, self._dtype, num_layers=self.config.num_layers + 1)

    @torch.inference_mode()
    def prefill(self, tokens: Sequence[int]) -> Tensor:
        ids = torch.tensor(tokens, device=self.device)
        for piece in ids.split(_PREFILL_ROWS):
            self._cache.reserve(len(piece))
            positions = torch.arange(len(piece), device=self.device) + self._cache.length
            hidden = self._run(piece, positions, attend_prefill(self._cache), for_heads=True)
            self._advance(len(piece), self._cache.advance)
        self._state = self._read[-1]
        return hidden[-1]

    @torch.inference_mode()
    def verify(self, tokens: Sequence[int], tree: CandidateTree, *, for_heads: bool = True) -> Tensor:
        self._cache.reserve(tree.max_depth + 1)
        positions, ids = self._cache.length + tree.depth.to(self.device), torch.tensor(tokens, device=self.device)
        return self._run(ids, positions, self._attend_tree(self._cache, tree), for_heads=for_heads)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        return self.backbone.lm_head(hidden).float()

    def greedy(self, hidden: Tensor) -> list[int]:
        return self.logits(hidden).argmax(-1).tolist()

    def embed(self, tokens: Tensor) -> Tensor:
        return self.backbone.embed(tokens.to(self.device))

    @torch.inference_mode()
    def commit(self, path: Sequence[int]) -> None:
        self._advance(len(path), lambda count: self._cache.commit(path))
        self._state = self._read[path[-1]]

    def heads_state(self) -> Tensor:
        return self._state

    def truncate(self, length: int) -> None:
        self._cache.truncate(length)
        self._prefixed = min(self._prefixed, length)

    def committed_rows(self, layer: int) -> tuple[Tensor, Tensor]:
        rows = slice(0, self._cache.length)
        return self._cache.keys[layer, :, rows], self._cache.values[layer, :, rows]

    def memory_bytes(self) -> int:
        held = (*self.backbone.parameters(), *self.backbone.buffers())
        held += () if self._prefix is None else tuple(self._prefix.parameters())
        return sum(tensor.numel() * tensor.element_size() for tensor in held) + self._cache.memory_bytes()

    def _run(self, tokens: Tensor, positions: Tensor, attend: Attend, *, for_heads: bool) -> Tensor:
        """Return hidden states [rows, hidden]; keep what heads read behind these rows."""
        prefix = self._prefix if for_heads else None
        layers = () if prefix is None else prefix.config.layers
        hidden, *left = self.backbone.states(tokens, positions, attend, layers)
        self._read, self._is_for_heads = hidden, for_heads
        if prefix is not None:
            features = torch.cat([hidden, *map(feature, left)], dim=-1)
            self._read = prefix(features, *self.backbone.angles(positions), attend, self.config.num_layers)
        return hidden

    def _advance(self, rows: int, commit: Callable[[int], None]) -> None:
        """Commit rows; the prefix attention has seen them if they follow what it saw before."""
        follows = self._is_for_heads and self._prefixed == self.num_committed
        commit(rows)
        self._prefixed += rows if follows else 0
