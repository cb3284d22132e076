"""Trees pruned by the heads' chances: what is kept is the likeliest tree, and the text does not know of it."""

import random

import pytest
import torch
from small_decoder import random_tree
from test_cuda_runner import CONFIG, TREES, decode, device, random_heads, runner, weights  # noqa: F401

from engine import Engine, SamplingParams
from engine.backbone import BackboneWeights
from engine.captured_decode import CapturedLoop
from engine.cuda_drafter import CudaDrafter
from engine.cuda_plan import TreePlan
from engine.cuda_runner import CudaRunner
from engine.decode import PLAIN, DecodeLoop
from engine.kernels.draft_prune import embed_likeliest
from engine.nested_tree import MAX_FILLED, NestedTree
from engine.pruned_tree import PrunedTree, by_likelihood, path_chances
from engine.sampling import SamplingParams as Params
from engine.tree import CandidateTree


def random_chances(draw: random.Random, tree: CandidateTree) -> list[float]:
    """Float32 values, with ties, certainties and impossibilities among them."""
    values = [draw.choice([0.0, 1.0, 0.5, 0.25, draw.random()]) for _ in range(tree.num_nodes)]
    return torch.tensor([1.0, *values[1:]]).tolist()


@pytest.mark.parametrize("seed", range(20))
def test_what_is_kept_is_a_tree_of_the_likeliest_nodes(seed: int) -> None:
    draw = random.Random(seed)
    tree = random_tree(draw, draw.randint(5, 60))
    chances = random_chances(draw, tree)
    of_path = path_chances(tree.parents, chances)
    for node in range(tree.num_nodes):
        product = 1.0
        for above in tree.path_to(node)[1:]:
            product *= chances[above]
        assert of_path[node] == product
    smaller: set[int] = {0}
    for count in range(1, tree.num_drafted):
        pruned = PrunedTree(tree, count)
        kept = pruned.kept(chances)
        assert kept[0] == 0 and len(kept) == count + 1 == pruned.num_nodes
        assert smaller < set(kept)  # a node at a time, the likeliest that is left
        assert min(of_path[node] for node in kept) >= max(of_path[node] for node in set(range(len(chances))) - {*kept})
        left = pruned.tree_of(kept)
        assert left == CandidateTree.from_choices(left.choices)  # no orphans, and in order
        assert [left.choices[i] for i in range(count)] == [tree.choices[node - 1] for node in kept[1:]]
        assert [kept[parent] if parent >= 0 else -1 for parent in left.parents] == [tree.parents[n] for n in kept]
        smaller = set(kept)


def test_a_pruned_tree_leaves_something_out() -> None:
    for count in (0, 4, 5):
        with pytest.raises(ValueError, match=f"{count} of 4 nodes"):
            PrunedTree(CandidateTree.chain(4), count)
    assert by_likelihood((-1, 0, 0, 1), (1.0, 0.4, 0.6, 1.0)) == [0, 2, 1, 3]


def test_nested_trees_fill_about_twice_what_they_keep() -> None:
    nested = NestedTree.default()
    for nodes in range(65):
        tree = nested.pruned(nodes)
        assert tree.num_drafted == nodes
        assert tree.max_depth <= max(1, nodes)
        if isinstance(tree, PrunedTree):
            assert tree.filled.num_drafted <= min(2 * nodes, MAX_FILLED)
            assert set(tree.filled.choices) <= set(nested.order[: 6 * nodes])
    assert nested.pruned(1) == nested.first(1)
    assert nested.pruned(63) == nested.first(63)
    assert nested.pruned(7, 1).max_depth == 1


def random_filled(runner: CudaRunner, tree: PrunedTree, seed: int) -> TreePlan:  # noqa: F811
    plan, draw = TreePlan(tree, runner.memory, sees_path=True), random.Random(seed)
    runner.set_root(60)
    runner.memory.tokens[: plan.num_nodes] = torch.randint(CONFIG.vocab_size, (plan.num_nodes,)).int()
    runner.memory.chances[: plan.num_nodes] = torch.tensor(random_chances(draw, tree.filled))
    return plan


@pytest.mark.parametrize("seed", range(6))
def test_the_launch_keeps_what_the_host_would(runner: CudaRunner, seed: int) -> None:  # noqa: F811
    draw = random.Random(seed)
    grown = random_tree(draw, 64)
    filled = CandidateTree(tuple(choice for choice in grown.choices if len(choice) <= [3, 8, 15][seed % 3]))
    pruned = PrunedTree(filled, draw.randint(2, filled.num_drafted - 1))
    plan, memory = random_filled(runner, pruned, seed), runner.memory
    assert plan.kept is not None
    out = torch.zeros(pruned.num_nodes, CONFIG.hidden_size, dtype=memory.dtype, device=runner.device)
    shape = plan.depth, plan.ancestor_at
    embed_likeliest(plan.filled, *shape, plan.kept, runner.embedding, memory.record, out, load=runner.load)
    kept = pruned.kept(memory.chances[: plan.num_nodes].tolist())
    left, nodes = pruned.tree_of(kept), plan.verified
    static = TreePlan(left, memory, sees_path=True).verified
    assert plan.kept.nodes.tolist() == list(kept)
    tokens = [60, *(int(memory.tokens[node]) for node in kept[1:])]
    assert nodes.tokens.tolist() == tokens
    assert torch.equal(out, runner.embedding[torch.tensor(tokens).to(runner.device)])
    for name in ("depth", "parents", "ancestor_at", "is_above"):
        assert torch.equal(getattr(nodes, name), getattr(static, name)), name


def records(loop: DecodeLoop | CapturedLoop, tree: PrunedTree) -> list[tuple[object, ...]]:
    loop._runner.truncate(0)
    loop.prefill([5, 3, 80, 7])
    steps = loop.steps(tree)
    taken = [next(steps) for _ in range(4)]
    return [(step.tokens, step.path, step.node_tokens, step.node_parents, step.node_probabilities) for step in taken]


PRUNED = [PrunedTree(TREES[2], 4), PrunedTree(CandidateTree.chain(3), 2)]


@pytest.mark.parametrize(("sees", "is_fused"), [("path", True), ("hidden", False)])
def test_a_pruned_tree_gives_plain_decodings_tokens(
    runner: CudaRunner, weights: BackboneWeights, sees: str, is_fused: bool  # noqa: F811
) -> None:  # fmt: skip
    if runner.device == "cpu" and not is_fused:
        pytest.skip("emulated steps take long; the other way of drafting is emulated elsewhere")
    plain, _ = decode(CapturedLoop(runner, None), PLAIN)
    drafter = CudaDrafter(random_heads(sees), runner, weights.lm_head, is_fused=is_fused)
    for tree in PRUNED:
        assert decode(CapturedLoop(runner, drafter), tree)[0] == plain
    loops = DecodeLoop(runner, drafter, Params(), 0), CapturedLoop(runner, drafter)
    apart, together = (records(loop, PRUNED[0]) for loop in loops)
    for ours, want in zip(together, apart, strict=True):
        assert ours[:4] == want[:4]
        assert ours[4] == pytest.approx(want[4], rel=1e-5)


SAMPLED = [
    Params(temperature=0.9, repetition_penalty=1.3),
    Params(acceptance="typical", temperature=1.5, epsilon=0.02),
]


@pytest.mark.parametrize("params", SAMPLED)
def test_sampling_knows_the_kept_nodes(runner: CudaRunner, weights: BackboneWeights, params: Params) -> None:  # noqa: F811
    """Penalties and typical acceptance read which nodes stand above another: of the kept ones."""
    drafter = CudaDrafter(random_heads(), runner, weights.lm_head)
    apart = decode(DecodeLoop(runner, drafter, params, 7), PRUNED[0])
    assert decode(CapturedLoop(runner, drafter, params, 7), PRUNED[0]) == apart
    if not params.is_typical:
        assert apart[0] == decode(CapturedLoop(runner, None, params, 7), PLAIN)[0]


def test_the_engine_verifies_other_trees_in_other_steps(engine: Engine) -> None:
    question = [{"role": "user", "content": "Tell me about the sea."}]
    texts, shapes = set(), set()
    for nodes in (0, 3, 5):
        params = SamplingParams(medusa=nodes > 0, tree_nodes=nodes or None, max_tokens=60)
        for chunk in engine.stream(question, params):
            if chunk.step and nodes:
                assert chunk.step.tree_nodes == nodes
                assert all(parent < node for node, parent in enumerate(chunk.step.node_parents))
                shapes.add(chunk.step.node_parents)
            if chunk.result:
                texts.add(chunk.result.tokens)
    assert len(texts) == 1
    assert len(shapes) > 4
    assert {len(shape) for shape in shapes} == {4, 6}  # with the root
