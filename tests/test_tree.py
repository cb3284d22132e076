"""CandidateTree on trees drawn by hand."""

import pytest

from engine.nested_tree import NestedTree
from engine.tree import CandidateTree

#         0 root
#        / \
#       1   2        ranks 0, 1
#      / \   \
#     3   4   5      ranks 0, 2 under 1; 0 under 2
#     |
#     6              rank 1 under 3
CHOICES = [(0, 0, 1), (1,), (0, 2), (0,), (1, 0), (0, 0)]


@pytest.fixture
def tree() -> CandidateTree:
    return CandidateTree.from_choices(CHOICES)


def test_nodes_are_ordered_by_depth_then_lexicographically(tree: CandidateTree) -> None:
    assert tree.choices == ((0,), (1,), (0, 0), (0, 2), (1, 0), (0, 0, 1))
    assert tree.depth.tolist() == [0, 1, 1, 2, 2, 2, 3]
    assert tree.rank.tolist() == [0, 0, 1, 0, 2, 0, 1]
    assert tree.parents == (-1, 0, 0, 1, 1, 2, 3)
    assert (tree.num_nodes, tree.num_drafted, tree.max_depth) == (7, 6, 3)


def test_ancestors_hold_the_node_and_everything_above_it(tree: CandidateTree) -> None:
    above = [[column for column in range(7) if row[column]] for row in tree.ancestors.tolist()]
    assert above == [[0], [0, 1], [0, 2], [0, 1, 3], [0, 1, 4], [0, 2, 5], [0, 1, 3, 6]]


def test_paths_run_from_root_to_leaf_and_are_padded(tree: CandidateTree) -> None:
    assert sorted(tree.paths.tolist()) == [[0, 1, 3, 6], [0, 1, 4, -1], [0, 2, 5, -1]]


def test_depth_first_visits_a_node_right_below_its_ancestors(tree: CandidateTree) -> None:
    assert tree.depth_first == (0, 1, 3, 6, 4, 2, 5)


def test_each_head_gives_as_many_guesses_as_its_depth_uses(tree: CandidateTree) -> None:
    assert tree.ranks_by_depth == (2, 3, 2)


def test_the_empty_tree_is_the_root_alone() -> None:
    tree = CandidateTree.from_choices([])
    assert tree.paths.tolist() == [[0]]
    assert tree.ancestors.tolist() == [[True]]
    assert (tree.num_nodes, tree.max_depth) == (1, 0)


def test_a_chain_takes_each_heads_best() -> None:
    assert CandidateTree.chain(3).paths.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ([(0, 0)], r"\(0, 0\) has no parent; add \(0,\)"),
        ([(0,), (0,)], "listed twice"),
        ([()], "leave out the root"),
        ([(-1,)], "not a path of ranks"),
    ],
)
def test_what_is_no_tree_is_refused(choices: list[tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CandidateTree.from_choices(choices)


def test_every_prefix_of_the_default_order_is_a_tree() -> None:
    nested = NestedTree.default()
    for nodes in range(65):
        assert nested.first(nodes).num_drafted == nodes


def test_an_order_can_be_limited_to_fewer_heads() -> None:
    limited = NestedTree.default().limited(2)
    assert limited.first(64).max_depth == 2
