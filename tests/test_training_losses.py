"""The heads' loss against autograd on the plain formula, its kernel against the plain version, and run counting."""

import pytest
import torch
from torch.nn import functional as F

from engine.training import losses
from engine.training.dataset import count_runs

ROWS = torch.arange(13).flip(0)  # each row's teacher stands elsewhere


def _kernel_runs() -> bool:
    return losses.triton is not None and (torch.cuda.is_available() or losses.triton.knobs.runtime.interpret)


def _case(vocab: int = 97) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(13, 16, generator=generator)
    output = torch.randn(vocab, 16, generator=generator)
    teacher = torch.randn(13, vocab, generator=generator) * 3
    gold = torch.randint(0, vocab, (13,), generator=generator)
    gold[4] = losses.IGNORED
    weight = torch.rand(13, generator=generator)
    weight[2] = 0
    return features, output, teacher, gold, weight


def test_gradients_equal_autograd() -> None:
    features, output, teacher, gold, weight = _case()
    features, output = features.requires_grad_(), output.requires_grad_()
    scores = features @ output.T
    hard = F.cross_entropy(scores, gold, reduction="none", ignore_index=losses.IGNORED)
    soft = -(teacher[ROWS].softmax(-1) * scores.log_softmax(-1)).sum(-1)
    expected = (weight * (0.5 * hard + 0.5 * soft)).sum()
    expected_grads = torch.autograd.grad(expected, [features, output])
    loss, rank = losses.head_loss(features, output, teacher, ROWS, gold, weight, chunk=5)
    grads = torch.autograd.grad(loss * 3, [features, output])
    torch.testing.assert_close(loss, expected)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, wanted * 3, rtol=1e-4, atol=1e-5)
    assert rank[4] == 97 and rank[0] == (scores[0] > scores[0, gold[0]]).sum()


@pytest.mark.skipif(not _kernel_runs(), reason="needs Triton and a GPU, or TRITON_INTERPRET=1")
@pytest.mark.parametrize("vocab", [97, 1000])
def test_kernel_equals_plain(vocab: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    features, output, teacher, gold, weight = (part.to(device) for part in _case(vocab))
    scores, rows = features @ output.T, ROWS.to(device)
    other = scores.clone()
    loss, rank = losses.row_loss_triton(scores, teacher, rows, gold, weight)
    expected_loss, expected_rank = losses.row_loss_plain(other, teacher, rows, gold, weight)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores, other, rtol=1e-4, atol=1e-6)
    assert torch.equal(rank[weight > 0], expected_rank[weight > 0])


def test_a_batch_without_labels_gives_zero_not_nan() -> None:
    features, output, teacher, gold, weight = _case()
    loss, _ = losses.head_loss(features.requires_grad_(), output, teacher, ROWS, gold, torch.zeros_like(weight))
    loss.backward()
    assert loss == 0 and torch.equal(features.grad, torch.zeros_like(features))


def test_no_rows_at_all_give_zero_and_zero_gradients() -> None:
    features, output, teacher, gold, weight = _case()
    features, output = features[:0].requires_grad_(), output.requires_grad_()
    loss, rank = losses.head_loss(features, output, teacher, ROWS[:0], gold[:0], weight[:0])
    loss.backward()
    assert loss == 0 and rank.shape == (0,) and torch.equal(output.grad, torch.zeros_like(output))


def test_runs_end_at_gaps_and_document_borders() -> None:
    labels = torch.tensor([0, 1, 1, 1, 0, 1, 1, 1, 1], dtype=torch.uint8)
    lengths = torch.tensor([7, 2])
    assert count_runs(labels, lengths).tolist() == [0, 3, 2, 1, 0, 2, 1, 2, 1]
