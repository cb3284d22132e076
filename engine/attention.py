"""Attention over a KVCache, for prefill and for a tree, in plain torch.

Each function makes the `attend` callable of one forward. `attend_rowwise` gives a node the bits that plain decoding
would give it; `attend_masked` computes all nodes at once and promises no such thing.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.backbone import Attend
from engine.kv_cache import KVCache
from engine.tree import CandidateTree

__all__ = ["attend_masked", "attend_prefill", "attend_rowwise"]


def attend_prefill(cache: KVCache) -> Attend:
    """Append the rows of a prompt and let each see what precedes it."""

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        cache.append(layer, key, value)
        rows, end = query.shape[0], cache.length + query.shape[0]
        mask = torch.ones(rows, end, dtype=torch.bool, device=query.device).tril(cache.length)
        out = F.scaled_dot_product_attention(
            query.transpose(0, 1).unsqueeze(0),
            cache.keys[layer, :, :end].unsqueeze(0),
            cache.values[layer, :, :end].unsqueeze(0),
            attn_mask=mask,
            enable_gqa=True,
        )
        return out[0].transpose(0, 1).contiguous()

    return attend


def attend_rowwise(cache: KVCache, tree: CandidateTree) -> Attend:
    """Verify a tree node by node, in preorder, over the very rows that plain decoding would see.

    A node's key and value go to its absolute position, length + depth. In preorder every ancestor already stands at
    its own, so the node attends to one contiguous run, by the same call with the same shapes as plain decoding: the
    same bits. Costs one small call a node and layer, which a CPU's small trees can pay.
    """
    depths = tree.depth.tolist()

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        cache.hold_scratch(layer, key, value)
        keys, values = cache.keys[layer], cache.values[layer]
        groups = query.unflatten(1, (keys.shape[0], -1))  # [nodes, kv_heads, group, head_dim]
        out = torch.empty_like(groups)
        for node in tree.depth_first:
            row = cache.length + depths[node]
            keys[:, row] = key[node]
            values[:, row] = value[node]
            out[node] = F.scaled_dot_product_attention(
                groups[node].unsqueeze(0), keys[:, : row + 1].unsqueeze(0), values[:, : row + 1].unsqueeze(0)
            )[0]
        return out.flatten(1, 2)

    return attend


def attend_masked(cache: KVCache, tree: CandidateTree) -> Attend:
    """Verify a tree in one call: committed rows for all, scratch rows by the tree attention mask."""
    device = cache.keys.device
    seen = torch.ones(tree.num_nodes, cache.length, dtype=torch.bool, device=device)
    mask = torch.cat([seen, tree.ancestors.to(device)], dim=1)

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        cache.hold_scratch(layer, key, value)
        keys = torch.cat([cache.keys[layer, :, : cache.length], key.transpose(0, 1)], dim=1)
        values = torch.cat([cache.values[layer, :, : cache.length], value.transpose(0, 1)], dim=1)
        out = F.scaled_dot_product_attention(
            query.transpose(0, 1).unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0), attn_mask=mask, enable_gqa=True
        )
        return out[0].transpose(0, 1).contiguous()

    return attend
