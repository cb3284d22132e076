"""Typical acceptance against a literal reading of the formula (arXiv 2401.10774, section 2.3.1), on random trees.

Both forms are held against it: the walk over nodes on the host, and the tensor form of captured steps.
"""

import math
import random
from collections.abc import Sequence

import pytest
import torch
from small_decoder import random_tree
from torch import Tensor

from engine.accept import accept_exact, accept_typical, typical_threshold
from engine.captured_sampler import typical_targets
from engine.tree import CandidateTree

VOCAB = 24
EPSILON, DELTA = 0.09, 0.3


def literal(tree: CandidateTree, tokens: Sequence[int], rows: Tensor, epsilon: float, delta: float) -> list[int]:
    """Try every path of the padded table from the root on, each token by the formula; keep the best beginning."""
    best: tuple[int, float] = (0, 0.0)
    winner = [0]
    for padded in tree.paths.tolist():
        path, likelihood = [0], 0.0
        for node in padded[1:]:
            if node == -1:  # the path ends here, whatever token has the id 0
                break
            chances = rows[path[-1]].tolist()
            entropy = -sum(chance * math.log(chance) for chance in chances if chance > 0)
            if not chances[tokens[node]] > min(epsilon, delta * math.exp(-entropy)):
                break
            likelihood += math.log(chances[tokens[node]])
            path.append(node)
        if (len(path) - 1, likelihood) > best:
            best, winner = (len(path) - 1, likelihood), path
    return winner


def both(tree: CandidateTree, tokens: Sequence[int], rows: Tensor, epsilon: float, delta: float) -> list[int]:
    """Return the path, once it is the same in both forms; the token after it is the last node's own sample."""
    path = accept_typical(tree, tokens, rows.__getitem__, epsilon, delta)
    ids, parents = torch.tensor(tokens), torch.tensor(tree.parents)
    samples = torch.full((tree.num_nodes,), VOCAB) + torch.arange(tree.num_nodes)  # no node has such a token
    thresholds = typical_threshold(rows, epsilon, delta)
    targets = typical_targets(rows, thresholds, ids, samples, parents, tree.ancestors).tolist()
    assert accept_exact(tree, tokens, targets.__getitem__) == (path, VOCAB + path[-1])
    return path


def draw_tokens(tree: CandidateTree, draw: random.Random) -> list[int]:
    """Random tokens, those of siblings distinct, as a head's guesses are."""
    tokens = [draw.randrange(VOCAB)] * tree.num_nodes
    for children in tree.children:
        for child, token in zip(children, draw.sample(range(VOCAB), len(children)), strict=True):
            tokens[child] = token
    return tokens


@pytest.mark.parametrize("sharpness", [0.3, 1.0, 2.0, 4.0])
def test_random_logits_on_random_trees(sharpness: float) -> None:
    draw, accepted = random.Random(int(10 * sharpness)), []
    for _ in range(150):
        tree = random_tree(draw, draw.choice([2, 5, 12, 40]))
        if tree.max_depth > 12:
            continue
        tokens = draw_tokens(tree, draw)
        rows = torch.softmax(torch.randn(tree.num_nodes, VOCAB, dtype=torch.float64) * sharpness, -1)
        epsilon, delta = draw.choice([(EPSILON, DELTA), (0.02, 0.5), (0.3, 1.0)])
        path = both(tree, tokens, rows, epsilon, delta)
        assert path == literal(tree, tokens, rows, epsilon, delta)
        accepted.append(len(path) - 1)
    assert 0 in accepted
    assert max(accepted) > 1


def tree_and_tokens() -> tuple[CandidateTree, list[int]]:
    return CandidateTree.from_choices([(0,), (1,), (0, 0), (0, 1), (1, 0)]), [9, 1, 2, 3, 4, 5]


def test_one_hot_rows_accept_the_certain_token_only() -> None:
    tree, tokens = tree_and_tokens()
    for certain, path in ((2, [0, 2, 5]), (1, [0, 1]), (7, [0])):
        rows = torch.zeros(6, VOCAB, dtype=torch.float64)
        rows[0, certain] = rows[1, 0] = rows[2, 5] = rows[3:, 0] = 1.0
        assert both(tree, tokens, rows, EPSILON, DELTA) == path == literal(tree, tokens, rows, EPSILON, DELTA)


def test_uniform_rows_accept_everything_below_delta_one_and_nothing_at_an_equal_epsilon() -> None:
    tree, tokens = tree_and_tokens()
    rows = torch.full((6, 16), 1 / 16, dtype=torch.float64)
    assert both(tree, tokens, rows, EPSILON, DELTA) == [0, 1, 3]  # all alike: the first in node order
    assert both(tree, tokens, rows, 1 / 16, 1.0) == [0] == literal(tree, tokens, rows, 1 / 16, 1.0)


def test_ties_in_length_go_by_likelihood() -> None:
    tree, tokens = tree_and_tokens()
    rows = torch.full((6, VOCAB), 1e-3, dtype=torch.float64)
    rows[0, 1], rows[0, 2], rows[1, 3], rows[1, 4], rows[2, 5] = 0.4, 0.5, 0.3, 0.6, 0.5
    assert both(tree, tokens, rows, EPSILON, DELTA) == [0, 2, 5]
    rows[2, 5] = 0.45
    assert both(tree, tokens, rows, EPSILON, DELTA) == [0, 1, 4]
    assert literal(tree, tokens, rows, EPSILON, DELTA) == [0, 1, 4]


def test_depth_one_and_the_root_alone() -> None:
    rows = torch.softmax(torch.randn(4, VOCAB, dtype=torch.float64) * 2, -1)
    ranked = rows[0].argsort(descending=True).tolist()
    flat = CandidateTree.from_choices([(0,), (1,), (2,)])
    assert both(flat, [0, ranked[3], ranked[0], ranked[1]], rows, EPSILON, DELTA) == [0, 2]
    assert both(CandidateTree.from_choices([]), [5], rows[:1], EPSILON, DELTA) == [0]


def test_padding_is_not_a_token_also_where_token_zero_is_likely() -> None:
    tree = CandidateTree.from_choices([(0,), (1,), (0, 0)])
    assert tree.paths.tolist() == [[0, 2, -1], [0, 1, 3]]
    rows = torch.full((4, VOCAB), 1e-3, dtype=torch.float64)
    rows[0, 7] = rows[2, 0] = 0.9  # after the short path's end the backbone is sure of token 0
    tokens = [5, 6, 7, 0]
    assert both(tree, tokens, rows, EPSILON, DELTA) == [0, 2] == literal(tree, tokens, rows, EPSILON, DELTA)
