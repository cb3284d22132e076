"""Attention of one new token a row over that row's own cached length, for batched generation.

Rows of a batch have different lengths; a padded attention would read the longest for all. The Triton kernel reads each
row's own keys and values once for all query heads that share them, and stores the new key and value on the way. The
plain version is the CPU path and the oracle. Cache layout: [slots, kv_heads, capacity, head_dim].
"""

import torch
from torch import Tensor
from torch.nn import functional as F

try:  # optional: absent on CPU machines, where the plain version runs
    import triton
    import triton.language as tl
except ImportError:
    triton = None

__all__ = ["attend_rows", "attend_rows_plain", "attend_rows_triton", "has_triton"]


def has_triton() -> bool:
    return triton is not None


def attend_rows(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> Tensor:
    """Store key and value at `position` and attend to positions 0..position of each row.

    query [slots, heads, head_dim], key and value [slots, kv_heads, head_dim], keys and values the caches
    [slots, kv_heads, capacity, head_dim], position int64 [slots] -> [slots, heads, head_dim].
    """
    attend = attend_rows_triton if query.is_cuda and has_triton() else attend_rows_plain
    return attend(query, key, value, keys, values, position)


def attend_rows_plain(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, position: Tensor
) -> Tensor:
    """The same with a masked attention over the longest row."""
    rows = torch.arange(query.shape[0], device=query.device)
    keys[rows, :, position] = key
    values[rows, :, position] = value
    # Reading the longest length would stall a GPU's queue; there the whole capacity is attended to.
    length = keys.shape[2] if query.is_cuda else int(position.max()) + 1
    seen = torch.arange(length, device=query.device) <= position.unsqueeze(1)
    out = F.scaled_dot_product_attention(
        query.unsqueeze(2), keys[:, :, :length], values[:, :, :length], attn_mask=seen[:, None, None], enable_gqa=True
    )
    return out.squeeze(2)


if triton is not None:

    @triton.jit
    def _attend_rows_kernel(
        query,
        key,
        value,
        keys,
        values,
        position,
        out,
        query_stride,
        key_stride,
        value_stride,
        scale,
        capacity,
        KV_HEADS: tl.constexpr,
        GROUP: tl.constexpr,
        DIM: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        # One program: one row, one key/value head and the GROUP query heads that share it (padded to ROWS for dot).
        slot = tl.program_id(0).to(tl.int64)
        kv_head = tl.program_id(1)
        length = tl.load(position + slot).to(tl.int32)
        lane = tl.arange(0, ROWS)
        dim = tl.arange(0, DIM)
        used = lane < GROUP
        head = kv_head * GROUP + lane
        q = tl.load(query + slot * query_stride + head[:, None] * DIM + dim[None, :], mask=used[:, None], other=0.0)
        new_key = tl.load(key + slot * key_stride + kv_head * DIM + dim)
        new_value = tl.load(value + slot * value_stride + kv_head * DIM + dim)
        cache = (slot * KV_HEADS + kv_head) * capacity * DIM
        tl.store(keys + cache + length.to(tl.int64) * DIM + dim, new_key)
        tl.store(values + cache + length.to(tl.int64) * DIM + dim, new_value)
        # The new token is taken from registers, so the loop over the cache needs no ordering with the stores.
        top = tl.sum(q.to(tl.float32) * new_key.to(tl.float32)[None, :], axis=1) * scale
        total = tl.full([ROWS], 1.0, tl.float32)
        mixed = tl.zeros([ROWS, DIM], tl.float32) + new_value.to(tl.float32)[None, :]
        for start in range(0, length, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < length
            place = cache + column[:, None].to(tl.int64) * DIM + dim[None, :]
            k = tl.load(keys + place, mask=inside[:, None], other=0.0)
            scores = tl.dot(q, tl.trans(k)) * scale
            scores = tl.where(inside[None, :], scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, axis=1))
            weight = tl.exp(scores - new_top[:, None])
            shrink = tl.exp(top - new_top)
            v = tl.load(values + place, mask=inside[:, None], other=0.0)
            mixed = mixed * shrink[:, None] + tl.dot(weight.to(v.dtype), v)
            total = total * shrink + tl.sum(weight, axis=1)
            top = new_top
        mixed = mixed / total[:, None]
        target = out + slot * (KV_HEADS * GROUP * DIM) + head[:, None] * DIM + dim[None, :]
        tl.store(target, mixed.to(out.dtype.element_ty), mask=used[:, None])


def attend_rows_triton(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, position: Tensor
) -> Tensor:
    """The same with one program for each row and key/value head."""
    slots, heads, dim = query.shape
    kv_heads, capacity = keys.shape[1], keys.shape[2]
    assert keys.is_contiguous() and values.is_contiguous()
    assert query.stride()[1:] == (dim, 1) and key.stride()[1:] == (dim, 1) and value.stride()[1:] == (dim, 1)
    out = torch.empty(slots, heads, dim, dtype=query.dtype, device=query.device)
    group = heads // kv_heads
    _attend_rows_kernel[(slots, kv_heads)](
        query,
        key,
        value,
        keys,
        values,
        position,
        out,
        query.stride(0),
        key.stride(0),
        value.stride(0),
        dim**-0.5,
        capacity,
        KV_HEADS=kv_heads,
        GROUP=group,
        DIM=dim,
        ROWS=max(16, triton.next_power_of_2(group)),
        BLOCK=64,
        num_warps=4,
        num_stages=3,
    )
    return out
