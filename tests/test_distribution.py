"""What trees emit is distributed as the backbone says: a G-test over 60,000 draws a tree, which wrong rules fail.

The backbone is a table: the logits after a token depend on that token alone, so every emitted token is one draw from a
known distribution, whichever path led there. The sampler and the acceptance rules are the engine's own.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from engine.accept import accept_exact, accept_typical
from engine.nested_tree import NestedTree
from engine.sampler import Sampler
from engine.sampling import SamplingParams
from engine.tree import CandidateTree

VOCAB, STRIDE = 8, 64
DRAWS = 60_000
FEW = 15_000  # enough for a wrong rule to be found out
TREES = {
    "root alone": CandidateTree.from_choices([]),
    "chain": CandidateTree.chain(3),
    "flat": CandidateTree.from_choices([(rank,) for rank in range(4)]),
    "default": NestedTree.default().first(12),
    "full": CandidateTree.from_choices([(a,) for a in range(8)] + [(a, b) for a in range(3) for b in range(8)]),
}
Targets = list[int]  # of each node, the backbone's own token there
Counted = tuple[Tensor, Tensor]
Rule = Callable[[CandidateTree, list[int], Targets, Tensor], tuple[list[int], int]]


def exact(tree: CandidateTree, tokens: list[int], targets: Targets, chances: Tensor) -> tuple[list[int], int]:
    return accept_exact(tree, tokens, targets.__getitem__)


def typical(tree: CandidateTree, tokens: list[int], targets: Targets, chances: Tensor) -> tuple[list[int], int]:
    path = accept_typical(tree, tokens, lambda node: chances[tokens[node]], 0.09, 0.3)
    return path, targets[path[-1]]


def accept_likely(tree: CandidateTree, tokens: list[int], targets: Targets, chances: Tensor) -> tuple[list[int], int]:
    """A wrong rule: a first child is also taken where the backbone gives it more than a third."""
    path = [0]
    while tree.children[path[-1]]:
        child = tree.children[path[-1]][0]
        if chances[tokens[path[-1]], tokens[child]] <= 1 / 3:
            break
        path.append(child)
    return path, targets[path[-1]]


def emit(tree: CandidateTree, params: SamplingParams, accept: Rule, draws: int, by_depth: bool = True) -> Counted:
    """Decode many steps; return how often each token followed each, [VOCAB, VOCAB], and what the backbone says.

    `by_depth` False draws all nodes of a step with the same random number, another wrong rule.
    """
    logits = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(2)) * 1.5
    sampler, generator = Sampler(VOCAB, "cpu"), torch.Generator().manual_seed(3)
    sampler.start(params, 11, [])
    nobody = torch.zeros(0, dtype=torch.int64), torch.zeros(1, 0, dtype=torch.bool)
    want = sampler.probabilities(logits, nobody[0], nobody[1].expand(VOCAB, -1))
    counts = [[0] * VOCAB for _ in range(VOCAB)]
    step, steps = 0, 4000
    while sum(map(sum, counts)) < draws:
        tokens = draft(tree, steps, generator)
        starts = (torch.arange(steps) + step).unsqueeze(1) * STRIDE
        positions = (starts + tree.depth * by_depth).flatten()
        rows = logits[tokens].flatten(0, 1)
        targets = sampler.choose(rows, positions, nobody[0], nobody[1].expand(len(rows), -1)).view(steps, -1)
        for nodes, row in zip(tokens.tolist(), targets.tolist(), strict=True):
            path, bonus = accept(tree, nodes, row, want)
            for node, token in zip(path, [*(nodes[node] for node in path[1:]), bonus], strict=True):
                counts[nodes[node]][token] += 1
        step += steps
    return torch.tensor(counts, dtype=torch.float64), want


def draft(tree: CandidateTree, steps: int, generator: torch.Generator) -> Tensor:
    """Guess tokens [steps, nodes], siblings distinct; low ones come earlier more often, as a head has its habits."""
    chances = torch.rand(steps, tree.num_nodes, VOCAB, generator=generator) * torch.arange(1, VOCAB + 1)
    guesses = chances.argsort(-1)
    place = {child: (node, at) for node, below in enumerate(tree.children) for at, child in enumerate(below)}
    columns = [guesses[:, node, at] for node, at in (place[child] for child in range(1, tree.num_nodes))]
    return torch.stack([torch.randint(VOCAB, (steps,), generator=generator), *columns], dim=1)


def p_value(counts: Tensor, want: Tensor) -> float:
    """The G-test's probability of a deviation this large by chance; 0 where a token came that never may."""
    if counts[want == 0].any():
        return 0.0
    expected = counts.sum(-1, keepdim=True) * want
    is_possible = want > 0
    g = 2 * torch.special.xlogy(counts, counts / expected.clamp(min=1e-300))[is_possible].sum()
    degrees = int(is_possible.sum()) - VOCAB
    return float(torch.special.gammaincc(torch.tensor(degrees / 2, dtype=torch.float64), g / 2))


SETTINGS: Sequence[dict[str, float]] = [
    {"temperature": 1.0},
    {"temperature": 0.6, "top_k": 5, "top_p": 0.95, "min_p": 0.01},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", TREES)
def test_exact_acceptance_emits_the_backbones_distribution(name: str, settings: dict[str, float]) -> None:
    counts, want = emit(TREES[name], SamplingParams(**settings), exact, DRAWS)  # type: ignore[arg-type]
    assert counts.sum() >= DRAWS
    assert p_value(counts, want) > 0.001


@pytest.mark.parametrize("rule", [typical, accept_likely])
@pytest.mark.parametrize("name", ["chain", "flat", "default", "full"])
def test_the_same_test_catches_other_rules(name: str, rule: Rule) -> None:
    assert p_value(*emit(TREES[name], SamplingParams(temperature=1.0), rule, FEW)) < 1e-9


@pytest.mark.parametrize("name", ["chain", "default", "full"])
def test_the_same_test_catches_one_random_number_for_all_depths(name: str) -> None:
    counts, want = emit(TREES[name], SamplingParams(temperature=1.0), exact, FEW, by_depth=False)
    assert p_value(counts, want) < 1e-9
