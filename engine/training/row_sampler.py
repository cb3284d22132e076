"""Choose one token a row: the best one, or a draw at the row's temperature among tokens that are likely enough.

The cut is min-p: a token takes part if its probability is at least `min_p` times the best one's. The Triton kernel
reads the scores twice and writes nothing but the choice; the plain version is the CPU path and the oracle.
"""

import math

import torch
from torch import Tensor

try:  # optional: absent on CPU machines, where the plain version runs
    import triton
    import triton.language as tl
except ImportError:
    triton = None

__all__ = ["choose_tokens", "choose_tokens_plain", "choose_tokens_triton"]


def choose_tokens(scores: Tensor, temperature: Tensor, min_p: float, seed: Tensor) -> Tensor:
    """Return one token a row, int64 [rows].

    scores [rows, vocab]; temperature float32 [rows], 0 takes the best; seed int64 [1], advanced by one.
    """
    choose = choose_tokens_triton if scores.is_cuda and triton is not None else choose_tokens_plain
    return choose(scores, temperature, min_p, seed)


def choose_tokens_plain(scores: Tensor, temperature: Tensor, min_p: float, seed: Tensor) -> Tensor:
    """The same by adding Gumbel noise to the allowed scores of drawn rows (torch's own generator)."""
    seed.add_(1)
    drawn = (temperature > 0).unsqueeze(1)
    scaled = scores.float() / torch.where(drawn, temperature.unsqueeze(1), 1.0)
    allowed = scaled >= scaled.amax(dim=1, keepdim=True) + math.log(min_p)
    noise = torch.empty_like(scaled).exponential_().log_()
    noisy = torch.where(allowed, scaled - noise, float("-inf"))
    return torch.where(drawn, noisy, scaled).argmax(dim=1)


if triton is not None:

    @triton.jit
    def _choose_kernel(scores, temperature, seed, chosen, stride, log_min_p, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        lane = tl.arange(0, BLOCK)
        heat = tl.load(temperature + row)
        best = tl.full([BLOCK], float("-inf"), tl.float32)
        place = tl.zeros([BLOCK], tl.int32)
        for start in range(0, VOCAB, BLOCK):
            column = start + lane
            x = tl.load(scores + row * stride + column, mask=column < VOCAB, other=float("-inf")).to(tl.float32)
            better = x > best
            best = tl.where(better, x, best)
            place = tl.where(better, column, place)
        top = tl.max(best, axis=0)
        if heat > 0:
            lowest = top + heat * log_min_p
            number = tl.load(seed)
            best = tl.full([BLOCK], float("-inf"), tl.float32)
            for start in range(0, VOCAB, BLOCK):
                column = start + lane
                x = tl.load(scores + row * stride + column, mask=column < VOCAB, other=float("-inf")).to(tl.float32)
                uniform = tl.rand(number, (row * VOCAB + column).to(tl.int32))
                noisy = (x - top) / heat - tl.log(-tl.log(uniform + 1e-10) + 1e-10)
                noisy = tl.where(x >= lowest, noisy, float("-inf"))
                better = noisy > best
                best = tl.where(better, noisy, best)
                place = tl.where(better, column, place)
            top = tl.max(best, axis=0)
        winner = tl.min(tl.where(best == top, place, VOCAB), axis=0)
        tl.store(chosen + row, winner.to(tl.int64))


def choose_tokens_triton(scores: Tensor, temperature: Tensor, min_p: float, seed: Tensor) -> Tensor:
    """The same with one program a row and a counter-based generator keyed by the seed and the place."""
    rows, vocab = scores.shape
    assert scores.stride(1) == 1
    seed.add_(1)
    chosen = torch.empty(rows, dtype=torch.int64, device=scores.device)
    _choose_kernel[(rows,)](
        scores, temperature, seed, chosen, scores.stride(0), math.log(min_p), VOCAB=vocab, BLOCK=2048, num_warps=8
    )
    return chosen
