"""Whether this machine's Triton kernels compute what plain torch computes; asked once, before a long run.

A kernel that does not compile here or disagrees is switched off for this process, and the reason is reported.
"""

from collections.abc import Callable

import numpy as np
import torch

from engine.training import losses, ragged_attention, row_sampler

__all__ = ["check_kernels"]


def check_kernels(report: Callable[[str], None]) -> None:
    """Compare each Triton kernel with plain torch here and now; one that fails is not used."""
    checks = ((ragged_attention, _attention_agrees), (row_sampler, _choice_agrees), (losses, _loss_agrees))
    for module, agrees in checks:
        try:
            ok = agrees()
        except Exception as error:  # whatever a compiler on a new machine raises: the plain path still works
            report(f"{module.__name__}: {type(error).__name__}: {error}")
            ok = False
        if not ok:
            module.triton = None
        report(f"{module.__name__}: {'Triton kernel agrees' if ok else 'plain torch is used'}")


def _attention_agrees() -> bool:
    query, key, value = (torch.randn(64, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (9, 3, 3))
    cache = torch.randn(2, 64, 3, 200, 64, device="cuda", dtype=torch.bfloat16)
    other, position = cache.clone(), torch.arange(64, device="cuda") * 3
    out = ragged_attention.attend_rows_triton(query, key, value, cache[0], cache[1], position)
    expected = ragged_attention.attend_rows_plain(query, key, value, other[0], other[1], position)
    return torch.allclose(out.float(), expected.float(), atol=0.03, rtol=0.03) and torch.equal(cache, other)


def _choice_agrees() -> bool:
    scores = (torch.randn(64, 49152, device="cuda") * 4).bfloat16()
    temperature = torch.tensor([0.0, 0.7] * 32, device="cuda")
    seed = torch.zeros(1, dtype=torch.int64, device="cuda")
    chosen = row_sampler.choose_tokens_triton(scores, temperature, 0.05, seed)
    picked = scores.gather(1, chosen[:, None])[:, 0]
    is_best = picked == scores.amax(1)
    likely = picked.float() >= scores.amax(1).float() + 0.7 * np.log(0.05) - 0.01
    return bool(is_best[::2].all() and likely.all() and not is_best[1::2].all())


def _loss_agrees() -> bool:
    scores, teacher = ((torch.randn(50, 16384, device="cuda") * 3).bfloat16() for _ in range(2))
    rows = torch.arange(50, device="cuda").flip(0)
    gold, weight = torch.arange(-1, 49, device="cuda"), torch.rand(50, device="cuda")
    weight[7] = 0
    other = scores.clone()
    loss, rank = losses.row_loss_triton(scores, teacher, rows, gold, weight)
    expected, expected_rank = losses.row_loss_plain(other, teacher, rows, gold, weight)
    close = torch.allclose(scores.float(), other.float(), atol=1e-4, rtol=0.02)
    used = weight > 0
    is_same_rank = torch.equal(rank[used], expected_rank[used])
    return close and torch.allclose(loss, expected, rtol=1e-3, atol=1e-3) and is_same_rank
