"""The captured step's whole logic on a small random decoder: on a CPU through the kernels' emulator, and on a GPU.

The toggle's promise is tested as equality of bits: a token's row is the same from a prompt, from plain decoding and
from any tree, so the text is the same for any heads.
"""

import random
from collections.abc import Sequence

import pytest
import torch
from cuda_emulator import COMPILER, load_emulated
from small_decoder import random_tree, random_weights

from engine.backbone import Backbone, BackboneConfig, BackboneWeights
from engine.block_weights import DenseWeight, Weight
from engine.captured_decode import CapturedLoop, make_loop
from engine.cuda_drafter import CudaDrafter
from engine.cuda_linear import choose_default
from engine.cuda_runner import CudaRunner
from engine.cuda_weights import CudaKernelsUnavailableError, pack_backbone
from engine.decode import PLAIN, DecodeLoop
from engine.draft import HeadsDrafter
from engine.errors import ContextLengthError
from engine.heads import HeadsConfig, MedusaHeads
from engine.kernels import nvrtc
from engine.kernels.int8_linear import Int8Weight
from engine.kernels.nf4_linear import NF4_VALUES
from engine.kernels.nf4_quantize import quantize_nf4
from engine.linear import DenseLinear
from engine.sampling import SamplingParams
from engine.torch_runner import TorchRunner
from engine.tree import CandidateTree

CONFIG = BackboneConfig(
    hidden_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    intermediate_size=192,
    vocab_size=96,
    rope_theta=10000.0,
    rms_norm_eps=1e-5,
    max_positions=140,
)
PROMPT = [5, 3, 80, 7, 11, 42, 9, 1, 60, 33, 2, 90, 14, 71, 6, 25, 8, 19, 50]
TREES = [
    CandidateTree.chain(1),
    CandidateTree.chain(3),
    CandidateTree.from_choices([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1), (1, 0, 2)]),
]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("cpu", marks=pytest.mark.skipif(COMPILER is None, reason="the emulator is built with g++")),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not nvrtc.is_available():
        pytest.skip("no CUDA device with the run-time compiler")
    return request.param


@pytest.fixture(scope="module")
def weights() -> BackboneWeights:
    torch.manual_seed(1)
    return random_weights(CONFIG)


def make_runner(weights: BackboneWeights, device: str, quantize: str = "int8") -> CudaRunner:
    packed = pack_backbone(CONFIG, weights, quantize=quantize, dtype=torch.bfloat16, device=device)
    load = nvrtc.load_kernel if device == "cuda" else load_emulated
    return CudaRunner(CONFIG, packed, device=device, label=quantize, load=load, choose=choose_default)


@pytest.fixture(scope="module")
def runner(weights: BackboneWeights, device: str) -> CudaRunner:
    return make_runner(weights, device)


def random_heads(sees: str = "path", output: str = "truncated", width: int | None = 64) -> MedusaHeads:
    vocab = 48 if "truncated" in output else 0
    config = HeadsConfig(128, 96, num_heads=3, num_layers=2, width=width, sees=sees, output=output, draft_vocab=vocab)
    heads = MedusaHeads(config, token_map=torch.randperm(96)[:48] if vocab else None)
    for parameter in heads.parameters():  # some are zero at the start
        torch.nn.init.normal_(parameter, std=0.1)
    return heads


class Oracle:
    """Launches a copy of what the text will be, or of what it will not be, into every node."""

    sees_path, max_depth = False, 3

    def __init__(self, runner: CudaRunner, text: list[int], wrong: bool = False) -> None:
        self.runner, self.text, self.wrong = runner, torch.tensor(text, dtype=torch.int32, device=runner.device), wrong

    def prepare(self, plan: object) -> None:
        pass

    def launch(self, plan) -> None:  # type: ignore[no-untyped-def]
        here = self.runner.memory.record[:1] + plan.depth
        right = (plan.rank == 0) & (not self.wrong)
        self.runner.memory.tokens[: plan.num_nodes] = torch.where(right, self.text[here], (self.text[here] + 1) % 96)


def decode(
    loop: DecodeLoop | CapturedLoop, tree: CandidateTree, count: int = 0, prompt: Sequence[int] = PROMPT
) -> tuple[list[int], list[int]]:
    count = count or (9 if loop._runner.device == "cpu" else 16)  # emulated steps take long
    loop._runner.truncate(0)
    tokens, accepted = [loop.prefill(prompt)], []
    for step in loop.steps(tree):
        tokens.extend(step.tokens)
        accepted.append(step.num_accepted)
        if len(tokens) >= count:
            return tokens[:count], accepted
    raise AssertionError("the loop never ends by itself")


def committed(runner: CudaRunner, rows: int) -> list[torch.Tensor]:
    return [part[:, :rows].clone() for layer in range(CONFIG.num_layers) for part in runner.committed_rows(layer)]


@pytest.mark.parametrize("quantize", ["nf4", "int8", "none"])
def test_any_tree_gives_plain_decodings_tokens(weights: BackboneWeights, device: str, quantize: str) -> None:
    runner = make_runner(weights, device, quantize)
    plain, accepted = decode(CapturedLoop(runner, None), PLAIN)
    assert set(accepted) == {0}
    rows = committed(runner, len(PROMPT) + 6)
    drafter = CudaDrafter(random_heads(), runner, weights.lm_head)
    for tree in TREES if quantize == "nf4" or device != "cpu" else TREES[2:]:
        assert decode(CapturedLoop(runner, drafter), tree)[0] == plain
        assert all(torch.equal(*pair) for pair in zip(committed(runner, len(PROMPT) + 6), rows, strict=True))
    assert runner.graphs.failure == ""


def test_random_trees_of_an_oracle_and_an_adversary(runner: CudaRunner) -> None:
    plain, _ = decode(CapturedLoop(runner, None), PLAIN)
    text, draw = [*PROMPT, *plain, *[0] * 8], random.Random(3)
    for tree in (TREES[2], random_tree(draw, 24), random_tree(draw, 64)):
        if tree.max_depth > 3:
            continue
        tokens, accepted = decode(CapturedLoop(runner, Oracle(runner, text)), tree)  # type: ignore[arg-type]
        best = max(len(choice) for choice in [(), *tree.choices] if not any(choice))
        assert tokens == plain
        assert accepted[:-1] == [best] * (len(accepted) - 1)
    tokens, accepted = decode(CapturedLoop(runner, Oracle(runner, text, wrong=True)), TREES[2])  # type: ignore[arg-type]
    assert tokens == plain
    assert set(accepted) == {0}


def test_a_prompts_rows_have_the_bits_of_decoded_ones(runner: CudaRunner) -> None:
    runner.truncate(0)
    long = [(7 * i + i * i) % 96 for i in range(100)]
    together = runner.prefill(long)
    rows = committed(runner, 100)
    runner.truncate(0)
    runner.prefill(long[:37])
    for token in long[37:41]:
        hidden = runner.verify([token], PLAIN)
        runner.commit([0])
    last = runner.prefill(long[41:])
    assert torch.equal(last, together)
    assert hidden.shape == (1, 128)
    assert all(torch.equal(*pair) for pair in zip(committed(runner, 100), rows, strict=True))


def test_the_verbs_alone_give_the_captured_steps_tokens(runner: CudaRunner, weights: BackboneWeights) -> None:
    drafter = CudaDrafter(random_heads(), runner, weights.lm_head)
    assert isinstance(make_loop(runner, drafter, SamplingParams(), 0), CapturedLoop)
    assert isinstance(make_loop(runner, Oracle(runner, []), SamplingParams(), 0), DecodeLoop)  # type: ignore[arg-type]
    apart = decode(DecodeLoop(runner, drafter, SamplingParams(), 0), TREES[2])
    assert apart == decode(CapturedLoop(runner, drafter), TREES[2])


SETTINGS = [
    {"temperature": 0.7},
    {"temperature": 1.5, "top_k": 20, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
    {"temperature": 1.0, "top_p": 0.8, "min_p": 0.02, "logit_bias": ((3, 2.0), (40, -5.0))},
    {"presence_penalty": 1.5, "repetition_penalty": 1.2},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_seed_gives_the_same_sampled_text_for_any_tree(
    runner: CudaRunner, weights: BackboneWeights, settings: dict[str, object]
) -> None:
    if runner.device == "cpu" and settings != SETTINGS[1]:
        pytest.skip("emulated steps take long, and these settings do the most")
    params = SamplingParams(**settings)  # type: ignore[arg-type]
    loop = make_loop(runner, None, params, 5)
    assert isinstance(loop, CapturedLoop)
    plain, _ = decode(loop, PLAIN)
    assert decode(DecodeLoop(runner, None, params, 5), PLAIN)[0] == plain
    text = [*PROMPT, *plain, *[0] * 8]
    drafter = CudaDrafter(random_heads(), runner, weights.lm_head)
    for drafts in (drafter, Oracle(runner, text), Oracle(runner, text, wrong=True)):
        tokens, accepted = decode(CapturedLoop(runner, drafts, params, 5), TREES[2])  # type: ignore[arg-type]
        assert tokens == plain
        if isinstance(drafts, Oracle):
            assert accepted[:-1] == [0 if drafts.wrong else 3] * (len(accepted) - 1)


@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_typical_acceptance_is_the_same_in_a_captured_step(
    runner: CudaRunner, weights: BackboneWeights, temperature: float
) -> None:
    if runner.device == "cpu" and temperature < 1:
        pytest.skip("emulated steps take long, and little is accepted here")
    params = SamplingParams(acceptance="typical", temperature=temperature, top_k=30, epsilon=0.02)
    drafter = CudaDrafter(random_heads(), runner, weights.lm_head)
    count = 24 if runner.device == "cpu" else 40
    apart = decode(DecodeLoop(runner, drafter, params, 7), TREES[2], count)
    assert decode(CapturedLoop(runner, drafter, params, 7), TREES[2], count) == apart
    assert sum(apart[1]) > 0


@pytest.mark.parametrize("sees", ["hidden", "root", "path"])
@pytest.mark.parametrize("output", ["own", "shared", "truncated", "own_truncated"])
def test_drafts_are_those_of_the_heads(runner: CudaRunner, weights: BackboneWeights, sees: str, output: str) -> None:
    check_drafts(runner, weights, random_heads(sees, output))


@pytest.mark.parametrize("sees", ["hidden", "root", "path"])
def test_drafts_without_fused_rounds(runner: CudaRunner, weights: BackboneWeights, sees: str) -> None:
    check_drafts(runner, weights, random_heads(sees), is_fused=False)


def test_drafts_of_the_papers_blocks(runner: CudaRunner, weights: BackboneWeights) -> None:
    check_drafts(runner, weights, random_heads("hidden", "own", width=None))


MIXED = CandidateTree.from_choices(  # guesses for lists and too many, rows for blocks, for lists alone, and for blocks
    [*((i,) for i in range(20)), *((i, 0) for i in range(18)), (0, 0, 0), (3, 0, 0), (3, 0, 1), (3, 0, 2)]
)
WIDE = CandidateTree.from_choices([*((i,) for i in range(12)), *((i, 0) for i in range(12)), (0, 0, 0), (2, 0, 0)])


@pytest.mark.parametrize("sees", ["hidden", "path"])
@pytest.mark.parametrize("tree", [TREES[2], MIXED, WIDE])
def test_fused_rounds_guess_as_the_others_do(
    runner: CudaRunner, weights: BackboneWeights, tree: CandidateTree, sees: str
) -> None:
    heads, same = random_heads(sees, "truncated"), []
    fused, apart = (CudaDrafter(heads, runner, weights.lm_head, is_fused=way) for way in (True, False))
    for root in range(6):
        hidden = torch.randn(128).to(runner.device)
        ours, want = fused.draft(hidden, root, tree), apart.draft(hidden, root, tree)
        for node in range(1, tree.num_nodes):
            if [ours.tokens[n] for n in tree.path_to(node)[:-1]] == [want.tokens[n] for n in tree.path_to(node)[:-1]]:
                same.append(ours.tokens[node] == want.tokens[node])
        assert fused.draft(hidden, root, tree) == ours  # to the bit
    assert sum(same) > 0.85 * len(same)
    assert fused._fused is not None and not fused._fused._sums.any()
    assert fused.memory_bytes() > 0 and fused._logits.numel() < apart._logits.numel() + 1


def check_drafts(runner: CudaRunner, weights: BackboneWeights, heads: MedusaHeads, *, is_fused: bool = True) -> None:
    """Guesses and probabilities of float32 heads, wherever rounding leaves the order of guesses alone."""
    table = weights.embedding.dequantize()
    lm_head = torch.nn.Linear(128, 96, bias=False)
    rows = weights.lm_head.dequantize()
    lm_head.weight = torch.nn.Parameter(rows if heads.token_map is None else rows[heads.token_map])
    oracle = HeadsDrafter(heads, lambda tokens: table[tokens], lm_head)
    drafter, same, total = CudaDrafter(heads, runner, weights.lm_head, is_fused=is_fused), 0, 0
    for root in range(15):
        hidden = torch.randn(128)
        ours, want = drafter.draft(hidden.to(runner.device), root, TREES[2]), oracle.draft(hidden, root, TREES[2])
        assert ours.tokens[0] == root and ours.probabilities[0] == 1.0
        for node in range(1, TREES[2].num_nodes):
            if [ours.tokens[n] for n in TREES[2].path_to(node)] == [want.tokens[n] for n in TREES[2].path_to(node)]:
                assert ours.probabilities[node] == pytest.approx(want.probabilities[node], rel=0.2)
                same += 1
            total += 1
    assert same > 0.8 * total


@pytest.mark.parametrize("quantize", ["nf4", "int8", "none"])
def test_hidden_states_are_near_those_of_torch(weights: BackboneWeights, device: str, quantize: str) -> None:
    runner = make_runner(weights, device, quantize)
    rounded = {"nf4": quantize_nf4, "int8": Int8Weight.from_dense, "none": DenseWeight}[quantize]

    def linear(weight: Weight) -> DenseLinear:  # over the very values that the packed matrix stands for
        return DenseLinear(DenseWeight(rounded(weight.dequantize()).dequantize()), torch.float32)

    embed = torch.nn.Embedding.from_pretrained(weights.embedding.dequantize())
    backbone = Backbone(CONFIG, weights, embed=embed, linear=linear, lm_head=embed, dtype=torch.float32)
    want = TorchRunner(backbone, device="cpu", dtype=torch.float32, weights="", exact=True).prefill(PROMPT)
    got = runner.prefill(PROMPT).float().cpu()
    assert float((got - want).norm() / want.norm()) < 0.1  # float32 against bfloat16, ill-conditioned layers


def test_the_last_positions_are_decoded_plainly_and_then_refused(runner: CudaRunner, weights: BackboneWeights) -> None:
    drafter = CudaDrafter(random_heads(), runner, weights.lm_head)
    start = [i % 96 for i in range(CONFIG.max_positions - 6)]

    def finish(loop: CapturedLoop, tree: CandidateTree) -> list[int]:
        runner.truncate(0)
        tokens = [loop.prefill(start)]
        steps = loop.steps(tree)
        while len(tokens) < 6:
            tokens.extend(next(steps).tokens)
        return tokens[:6]

    assert finish(CapturedLoop(runner, drafter), TREES[1]) == finish(CapturedLoop(runner, None), PLAIN)
    runner.truncate(0)
    runner.prefill(start)
    with pytest.raises(ContextLengthError, match="134 tokens and 7 more do not fit the model's 140 positions"):
        runner.prefill([1] * 7)


def test_a_step_queued_past_the_end_is_forgotten(runner: CudaRunner, weights: BackboneWeights) -> None:
    plain, _ = decode(CapturedLoop(runner, None), PLAIN)
    runner.truncate(0)
    loop = CapturedLoop(runner, None)
    first = loop.prefill(PROMPT)
    steps = loop.steps(PLAIN)
    assert [first, *next(steps).tokens, *next(steps).tokens] == plain[:3]
    steps.close()
    runner.truncate(runner.num_committed)
    assert runner.num_committed == len(PROMPT) + 2
    again = runner.prefill([plain[2]])
    assert runner.greedy(again.unsqueeze(0)) == [plain[3]]


def test_the_cache_grows_and_the_text_stays(weights: BackboneWeights, device: str) -> None:
    runner = make_runner(weights, device)
    plain, _ = decode(CapturedLoop(runner, None), PLAIN)
    steps = CapturedLoop(runner, None).steps(PLAIN)
    runner.truncate(0)
    tokens = [CapturedLoop(runner, None).prefill(PROMPT)]
    before = runner.memory_bytes()
    while len(tokens) < len(plain):
        if len(tokens) == 4:
            runner.memory.capacity, full = 700, runner.memory.capacity
            runner.memory.cache_keys = runner.memory.cache_keys[:, :, :700].contiguous()
            runner.memory.cache_values = runner.memory.cache_values[:, :, :700].contiguous()
            runner._reserve(800)
            assert runner.memory.capacity == full
        tokens.extend(next(steps).tokens)
    assert tokens == plain
    assert runner.memory_bytes() >= before > runner.memory_table()["weights"]


def test_bad_calls_are_refused(runner: CudaRunner, weights: BackboneWeights) -> None:
    runner.truncate(0)
    runner.prefill(PROMPT)
    with pytest.raises(ValueError, match="no tokens"):
        runner.prefill([])
    with pytest.raises(ValueError, match="2 tokens for a tree of 1 nodes"):
        runner.verify([1, 2], PLAIN)
    runner.verify([1, 2, 3, 4], TREES[1])
    with pytest.raises(ValueError, match=r"\[0, 2\] is not a path"):
        runner.commit([0, 2])
    wide = MedusaHeads(HeadsConfig(128, 96, width=40))
    with pytest.raises(CudaKernelsUnavailableError, match="multiple of 64 as the heads' width; this model has 40"):
        CudaDrafter(wide, runner, weights.lm_head)


def test_nf4_takes_the_nearest_level() -> None:
    values = torch.randn(8, 128)
    back = quantize_nf4(values).dequantize()
    scale = values.view(8, 2, 64).abs().amax(-1, keepdim=True)
    levels = (scale.unsqueeze(-1) * torch.tensor(NF4_VALUES)).expand(8, 2, 64, 16)
    best = (levels - values.view(8, 2, 64, 1)).abs().amin(-1)
    torch.testing.assert_close((back - values).abs().view(8, 2, 64), best, rtol=1e-5, atol=1e-6)
