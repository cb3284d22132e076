"""Acceptance rules on small trees with every outcome written out."""

import math

import pytest
import torch

from engine.accept import accept_exact, accept_typical, typical_threshold
from engine.tree import CandidateTree

TREE = CandidateTree.from_choices([(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)])
#                nodes:           1     2     3       4       5       6
TOKENS = [9, 10, 20, 30, 31, 40, 50]


def follow(targets: dict[int, int]) -> tuple[list[int], int]:
    return accept_exact(TREE, TOKENS, lambda node: targets[node])


@pytest.mark.parametrize(
    ("targets", "path", "bonus"),
    [
        ({0: 77}, [0], 77),
        ({0: 10, 1: 77}, [0, 1], 77),
        ({0: 20, 2: 40, 5: 77}, [0, 2, 5], 77),
        ({0: 10, 1: 31, 4: 77}, [0, 1, 4], 77),
        ({0: 10, 1: 30, 3: 50, 6: 77}, [0, 1, 3, 6], 77),
    ],
)
def test_the_path_follows_the_backbones_own_tokens(targets: dict[int, int], path: list[int], bonus: int) -> None:
    assert follow(targets) == (path, bonus)


def test_only_nodes_on_the_path_are_asked_for() -> None:
    asked: list[int] = []

    def target(node: int) -> int:
        asked.append(node)
        return {0: 20, 2: 40, 5: 1}[node]

    accept_exact(TREE, TOKENS, target)
    assert asked == [0, 2, 5]


def test_padding_is_never_accepted_where_token_zero_is_real() -> None:
    """Leaf 2 ends a short path; its padding must not stand for the token 0 that the backbone wants next."""
    tree = CandidateTree.from_choices([(0,), (1,), (0, 0)])
    assert tree.paths.tolist() == [[0, 2, -1], [0, 1, 3]]
    path, bonus = accept_exact(tree, [5, 6, 7, 0], lambda node: {0: 7, 2: 0}[node])
    assert (path, bonus) == ([0, 2], 0)
    path, bonus = accept_exact(tree, [5, 6, 7, 0], lambda node: {0: 6, 1: 0, 3: 0}[node])
    assert (path, bonus) == ([0, 1, 3], 0)


def test_the_threshold_is_the_papers_formula() -> None:
    rows = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.25] * 4, [0.5, 0.3, 0.2, 0.0]], dtype=torch.float64)
    expected = []
    for row in rows.tolist():
        entropy = -sum(p * math.log(p) for p in row if p > 0)
        expected.append(min(0.09, 0.3 * math.exp(-entropy)))
    assert typical_threshold(rows, 0.09, 0.3).tolist() == pytest.approx(expected)


def uniform_rows(vocabulary: int) -> torch.Tensor:
    return torch.full((TREE.num_nodes, vocabulary), 1 / vocabulary, dtype=torch.float64)


def test_typical_acceptance_is_strict_at_the_threshold() -> None:
    rows = uniform_rows(100)  # threshold 0.3 / 100 = 0.003 < 0.01: all typical
    assert accept_typical(TREE, TOKENS, rows.__getitem__, epsilon=0.09, delta=0.3) == [0, 1, 3, 6]
    assert accept_typical(TREE, TOKENS, rows.__getitem__, epsilon=0.01, delta=1.0) == [0]  # exactly equal is not above


def test_typical_acceptance_takes_the_longest_then_the_likelier_path() -> None:
    rows = torch.full((TREE.num_nodes, 100), 1e-6, dtype=torch.float64)
    rows[0, [10, 20]] = torch.tensor([0.3, 0.6], dtype=torch.float64)
    rows[1, [30, 31]] = torch.tensor([0.2, 0.5], dtype=torch.float64)
    rows[2, 40] = 0.2
    assert accept_typical(TREE, TOKENS, rows.__getitem__, 0.09, 0.3) == [0, 1, 4]  # .3 * .5 beats .6 * .2
    rows[3, 50] = 0.2
    assert accept_typical(TREE, TOKENS, rows.__getitem__, 0.09, 0.3) == [0, 1, 3, 6]  # deeper beats likelier


def test_a_one_hot_backbone_accepts_its_own_tokens_only() -> None:
    rows = torch.zeros(TREE.num_nodes, 100, dtype=torch.float64)
    rows[0, 20] = rows[2, 41] = rows[1, 30] = rows[5, 0] = 1.0
    assert accept_typical(TREE, TOKENS, rows.__getitem__, 0.09, 0.3) == [0, 2]
