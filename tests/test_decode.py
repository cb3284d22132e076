"""Tree decoding against plain decoding on the bundled model: same tokens, same cache, whatever the heads say."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from engine.build import Built, build_drafter, build_runner, build_torch_runner, pack_int4
from engine.decode import PLAIN, DecodeLoop
from engine.draft import Draft, HeadsDrafter
from engine.heads import HeadsConfig, MedusaHeads
from engine.models.loader import LoadedModel
from engine.native_runner import NativeRunner
from engine.nested_tree import NestedTree
from engine.runner import Runner
from engine.sampling import SamplingParams
from engine.tree import CandidateTree

PROMPTS = ["Liste trois fruits, s'il vous plaît.", "What is 17 * 3?"]
NUM_TOKENS = 24
TREES = [
    CandidateTree.chain(1),
    CandidateTree.chain(4),
    NestedTree.default().first(8),
    CandidateTree.from_choices([(3,), (0,), (3, 1), (0, 0), (0, 0, 0), (3, 1, 5), (0, 2)]),
]


@pytest.fixture(scope="module", params=["native", "torch"])
def built(request: pytest.FixtureRequest, bundled: LoadedModel) -> Built:
    config, weights = bundled.config, bundled.weights
    if request.param == "torch":
        return Built(build_torch_runner(config, weights, "cpu", "int4", "Q4_1"), pack_int4)
    native = build_runner(config, weights, device="cpu", quantize="int4", source_format="Q4_1")
    if native.notes:
        pytest.skip(native.notes[0])
    return native


@pytest.fixture
def runner(built: Built) -> Runner:
    return built.runner


def decode(
    runner: Runner, drafter: object, tree: CandidateTree, prompt: Sequence[int], params: SamplingParams, seed: int
) -> tuple[list[int], list[int]]:
    """Return the first NUM_TOKENS tokens and the accepted counts of the steps they took."""
    runner.truncate(0)
    loop = DecodeLoop(runner, drafter, params, seed)  # type: ignore[arg-type]
    tokens, accepted = [loop.prefill(prompt)], []
    for step in loop.steps(tree):
        tokens.extend(step.tokens)
        accepted.append(step.num_accepted)
        if len(tokens) >= NUM_TOKENS:
            return tokens[:NUM_TOKENS], accepted
    raise AssertionError("the loop never ends by itself")


class Oracle:
    """Drafts the true continuation as every node's best guess, and wrong tokens elsewhere."""

    max_depth = 4

    def __init__(self, text: Sequence[int], runner: Runner, wrong: bool = False) -> None:
        self.text, self.runner, self.wrong = list(text), runner, wrong

    def draft(self, hidden: Tensor, root: int, tree: CandidateTree) -> Draft:
        here = self.runner.num_committed
        assert self.text[here] == root
        tokens = [root]
        for choice in tree.choices:
            true = self.text[here + len(choice)]
            right = not self.wrong and not any(choice)
            tokens.append(true if right else (true + 1 + choice[-1]) % 49152)
        return Draft(tokens, [1.0] * tree.num_nodes)


def random_heads(bundled: LoadedModel, sees: str) -> MedusaHeads:
    config = HeadsConfig(
        576, 49152, num_heads=4, num_layers=2, width=256, sees=sees, output="truncated", draft_vocab=512
    )
    return MedusaHeads(config, token_map=torch.arange(512) * 7)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize(("temperature", "seed"), [(0.0, 0), (0.8, 1), (1.3, 2)])
def test_any_tree_gives_plain_decodings_tokens(
    built: Built, runner: Runner, bundled: LoadedModel, prompt: str, temperature: float, seed: int
) -> None:
    ids = bundled.tokenizer.encode_chat([{"role": "user", "content": prompt}])
    params = SamplingParams(temperature=temperature)
    plain, _ = decode(runner, None, PLAIN, ids, params, seed)
    for sees, tree in zip(("hidden", "root", "path", "path"), TREES, strict=True):
        drafter, _ = build_drafter(random_heads(bundled, sees), built, bundled.weights.lm_head)
        assert decode(runner, drafter, tree, ids, params, seed)[0] == plain


@pytest.mark.parametrize("tree", TREES[:3])
def test_oracle_heads_are_accepted_to_full_depth(runner: Runner, bundled: LoadedModel, tree: CandidateTree) -> None:
    ids = bundled.tokenizer.encode_chat([{"role": "user", "content": PROMPTS[0]}])
    params = SamplingParams()
    plain, _ = decode(runner, None, PLAIN, ids, params, 0)
    text = [*ids, *plain, *[1] * 8]
    tokens, accepted = decode(runner, Oracle(text, runner), tree, ids, params, 0)
    assert tokens == plain
    assert accepted[:-1] == [tree.max_depth] * (len(accepted) - 1)


def test_adversary_heads_are_never_accepted_and_change_nothing(runner: Runner, bundled: LoadedModel) -> None:
    ids = bundled.tokenizer.encode_chat([{"role": "user", "content": PROMPTS[0]}])
    params = SamplingParams()
    plain, _ = decode(runner, None, PLAIN, ids, params, 0)
    adversary = Oracle([*ids, *plain, *[1] * 8], runner, wrong=True)
    tokens, accepted = decode(runner, adversary, TREES[2], ids, params, 0)
    assert tokens == plain
    assert accepted == [0] * (NUM_TOKENS - 1)


def test_the_cache_after_commit_is_a_plain_forwards_cache(runner: Runner, bundled: LoadedModel) -> None:
    ids = bundled.tokenizer.encode_chat([{"role": "user", "content": PROMPTS[1]}])
    params = SamplingParams()
    plain, _ = decode(runner, None, PLAIN, ids, params, 0)
    reference = committed(runner)
    _, accepted = decode(runner, Oracle([*ids, *plain, *[1] * 8], runner), TREES[2], ids, params, 0)
    assert sum(accepted) > 10
    rows = slice(0, len(ids) + NUM_TOKENS - 1)
    for ours, theirs in zip(committed(runner), reference, strict=True):
        assert torch.equal(ours[:, rows], theirs[:, rows])


def committed(runner: Runner) -> list[Tensor]:
    """Copies of every layer's committed keys and values, each [kv_heads, rows, head_dim]."""
    return [rows.clone() for layer in range(runner.config.num_layers) for rows in runner.committed_rows(layer)]


def test_typical_acceptance_at_temperature_zero_is_exact(built: Built, runner: Runner, bundled: LoadedModel) -> None:
    ids = bundled.tokenizer.encode_chat([{"role": "user", "content": PROMPTS[1]}])
    plain, _ = decode(runner, None, PLAIN, ids, SamplingParams(), 0)
    drafter, _ = build_drafter(random_heads(bundled, "root"), built, bundled.weights.lm_head)
    assert decode(runner, drafter, TREES[2], ids, SamplingParams(acceptance="typical"), 0)[0] == plain


def test_heads_that_the_kernels_cannot_draft_for_come_with_a_note(built: Built, bundled: LoadedModel) -> None:
    heads = MedusaHeads(HeadsConfig(576, 49152, num_heads=1))
    drafter, notes = build_drafter(heads, built, bundled.weights.lm_head)
    assert isinstance(drafter, HeadsDrafter)
    is_native = isinstance(built.runner, NativeRunner)
    assert [note.startswith("Drafting is slower: ") for note in notes] == [True] * is_native
