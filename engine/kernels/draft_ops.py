"""What the draft heads need around their matrices, as single launches over static buffers.

Guesses go straight to the tree's nodes in device memory, so a captured step drafts without the host. How heads are
built and which nodes are asked for together is known in `engine.cuda_drafter`.
"""

import math

import torch
from torch import Tensor

from engine.kernels.fused_ops import bf16_define
from engine.kernels.nvrtc import load_kernel
from engine.kernels.small_batch_linear import LoadKernel

__all__ = ["MAX_GUESSES", "MAX_VOCAB", "draft_tokens", "gather_seen", "silu_rows"]

SOURCE = "draft_ops.cuh"
MAX_GUESSES = 64
MAX_VOCAB = 131072


def gather_seen(
    state: Tensor,
    table: Tensor,
    tokens: Tensor,
    record: Tensor,
    ancestor_at: Tensor,
    row_nodes: Tensor,
    inputs: Tensor,
    x: Tensor,
    *,
    load: LoadKernel = load_kernel,
) -> None:
    """Write a head's inputs for the nodes in `row_nodes`: inputs [rows, 1 + seen, hidden], and x [rows, hidden].

    state [1, hidden] is the hidden state; the embeddings come from table [vocab, hidden], scaled to unit RMS, for the
    first `seen` tokens on the way to the node. The root's token is the record's bonus token.
    """
    rows, slots, width = inputs.shape
    assert width % 8 == 0 and all(t.is_contiguous() for t in (state, table, inputs, x))
    kernel = load(SOURCE, "gather_seen", bf16_define(x.dtype))
    kernel((slots, rows), 128, [state, table, tokens, record, ancestor_at, row_nodes, inputs, x, width // 8])


def silu_rows(
    x: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    load: LoadKernel = load_kernel,
) -> None:
    """Write residual + silu(x + bias), [rows, width]; `out` may be `x` or `residual`."""
    rows, width = x.shape
    assert width % 8 == 0 and x.is_contiguous() and out.is_contiguous()
    kernel = load(SOURCE, "silu_rows", bf16_define(x.dtype))
    kernel((math.ceil(width / 1024), rows), 128, [x, bias, residual, out, width // 8])


def draft_tokens(
    logits: Tensor,
    token_map: Tensor | None,
    row_of: Tensor,
    rank_of: Tensor,
    tokens: Tensor,
    chances: Tensor,
    *,
    guesses: int,
    nodes: range,
    table: Tensor | None = None,
    load: LoadKernel = load_kernel,
) -> None:
    """Give each node of `nodes` its row's guess of its rank, and the probability of that guess.

    logits float32 [rows, vocab]; row_of, rank_of, tokens int32 [all nodes], chances float32 [all nodes]; `guesses` is
    1 + the highest rank among the nodes. `token_map` int32 [vocab] turns draft ids into token ids. With the embeddings
    `table` [tokens, hidden], the guesses' rows are brought on their way to the GPU's cache.
    """
    rows, vocab = logits.shape
    assert guesses <= min(MAX_GUESSES, vocab) and vocab <= MAX_VOCAB and vocab % 4 == 0, f"{guesses} guesses of {vocab}"
    per_thread = 1 << max(2, math.ceil(math.log2(vocab / 1024)))
    kernel = load(SOURCE, "draft_tokens", (*bf16_define(torch.float16), ("PER_THREAD", per_thread)))
    row_bytes = 0 if table is None else table.shape[1] * table.element_size()
    arguments = [logits, token_map, row_of, rank_of, tokens, chances, table, row_bytes]
    arguments += [vocab, guesses, nodes.start, nodes.stop]
    kernel((rows,), 1024, arguments)
