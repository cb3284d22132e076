"""Check and time drafting with the bundled heads on a GPU: `python -m engine.bench.gpu_draft --out DIR`.

Fused rounds beside the launches that they replace: the same guesses but for near-ties, microseconds per captured draft
by drafted nodes, with the heads' weights in the GPU's cache (warm) and out of it (cold, as within a step), and times by
kernel. Without --tuned the matrices of the other way run in configurations that nobody measured.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.bench.gpu_report import Report, environment
from engine.cuda_drafter import CudaDrafter
from engine.cuda_linear import choose_default
from engine.cuda_plan import TreePlan
from engine.cuda_rounds import FusedRounds
from engine.cuda_runner import CudaRunner
from engine.cuda_tuning import compile_candidates
from engine.cuda_weights import pack_backbone
from engine.kernels.linear_config import LinearConfig
from engine.kernels.measured_configs import choose_config
from engine.kernels.nvrtc import load_kernel
from engine.kernels.small_batch_linear import LoadKernel, PackedLinear, Workspace
from engine.kernels.tune_nf4 import time_graph
from engine.models.head_formats import Target, read_heads
from engine.models.loader import open_model
from engine.nested_tree import NestedTree
from engine.tree import CandidateTree, Choice

PROMPTS = Path(__file__).parent / "prompts" / "eval.txt"
SIZES = (4, 7, 15, 31, 36, 63)  # drafted nodes
PARENTS: tuple[tuple[Choice, ...], ...] = (  # a tree by rounds of few rows, each with its four best guesses
    ((),),
    ((0,), (1,)),
    ((0, 0), (1, 0), (0, 1)),
    ((0, 0, 0), (1, 0, 0), (0, 1, 0)),
)
FOURS = CandidateTree.from_choices([(*parent, rank) for row in PARENTS for parent in row for rank in range(4)])
COPIES = (1, 2, 4)  # of the sums of fused rounds
LARGER_THAN_CACHE = 96 << 20
DRAFTS = 8  # captured for one measurement


@dataclass
class Agreement:
    """Nodes whose guesses can be compared, those that agree, and those whose chances say that it was a near thing."""

    compared: int = 0
    same: int = 0
    near: int = 0

    def note(self, ours: Any, want: Any, tree: CandidateTree) -> None:
        for node in range(1, tree.num_nodes):
            before = tree.path_to(node)[:-1]
            if [ours.tokens[n] for n in before] != [want.tokens[n] for n in before]:
                continue
            self.compared += 1
            self.same += ours.tokens[node] == want.tokens[node]
            ratio = ours.probabilities[node] / max(want.probabilities[node], 1e-9)
            self.near += ours.tokens[node] != want.tokens[node] and abs(ratio - 1) < 0.1

    def __str__(self) -> str:
        return f"{self.same} of {self.compared} guesses agree, {self.near} more are near-ties"


class Bench:
    """The bundled model's runner, its heads and two drafters of them."""

    def __init__(self, *, device: str = "cuda", load: LoadKernel = load_kernel, tuned: bool = False) -> None:
        self.source, self.device, self.tuned = open_model("bundled"), device, tuned
        packed = {"quantize": "int8", "dtype": torch.bfloat16, "device": device}
        weights = pack_backbone(self.source.config, self.source.weights, **packed)
        config, lm_head, path = self.source.config, self.source.weights.lm_head, self.source.heads_path
        self.runner = CudaRunner(config, weights, device=device, label="int8", load=load, choose=self._choose)
        assert path is not None, "the bundled model has heads"
        target = Target(config.hidden_size, config.vocab_size, self.source.name, lm_head.dequantize)
        heads = read_heads(path, target).heads
        if heads.prefix is not None:
            self.runner.attach(heads.prefix)
        self.trees = NestedTree.beside(path).limited(heads.config.num_heads)
        self.fused, self.apart = (
            CudaDrafter(heads, self.runner, lm_head, is_fused=is_fused) for is_fused in (True, False)
        )
        if tuned:
            compile_candidates(self._matrices, (1, 8, 16, 32))

    @property
    def _matrices(self) -> list[PackedLinear]:
        heads = self.apart._heads
        every = {(m.n, m.k): m for head in heads for m in (*head.block_matrices, head.output)}
        return list(every.values())

    def _choose(self, weight: PackedLinear, rows: int, workspace: Workspace) -> LinearConfig:
        """Measure the heads' matrices alone: the backbone's are not timed here."""
        is_heads = any((weight.n, weight.k) == (matrix.n, matrix.k) for matrix in self._matrices)
        return (choose_config if self.tuned and is_heads else choose_default)(weight, rows, workspace)

    @cached_property
    def states(self) -> list[tuple[Tensor, int]]:
        """What heads read at the ends of prompts, and the backbone's tokens there."""
        found = []
        for prompt in PROMPTS.read_text().splitlines()[:8]:
            self.runner.truncate(0)
            tokens = self.source.tokenizer.encode_chat([{"role": "user", "content": prompt}])
            hidden = self.runner.prefill(tokens[-64:])
            found.append((self.runner.heads_state(), self.runner.greedy(hidden.unsqueeze(0))[0]))
        return found

    def tree(self, size: int) -> CandidateTree:
        """Return the tree of so many drafted nodes."""
        return FOURS if size == FOURS.num_nodes - 1 else self.trees.first(size)

    def plan(self, drafter: CudaDrafter, size: int) -> TreePlan:
        """Return a tree's tables with drafting prepared; the runner would prepare the backbone as well."""
        tree = self.tree(size)
        plan = self.runner._plans[tree, drafter] = TreePlan(tree, self.runner.memory, sees_path=drafter.sees_path)
        drafter.prepare(plan)
        return plan

    def use_copies(self, copies: int) -> None:
        """Have the fused drafter spread its sums."""
        drafter = self.fused
        drafter._fused = FusedRounds(
            drafter._heads, self.runner, drafter._token_map, sees_path=drafter.sees_path, copies=copies
        )

    def agreement(self, report: Report) -> dict[str, str]:
        """Guesses of both ways, and of the first way again."""
        found = {}
        for size in SIZES:
            agreed, tree = Agreement(), self.tree(size)
            for drafter in (self.fused, self.apart):
                self.plan(drafter, size)
            for state, root in self.states:
                ours, want = (drafter.draft(state, root, tree) for drafter in (self.fused, self.apart))
                agreed.note(ours, want, tree)
                if self.fused.draft(state, root, tree) != ours:
                    raise AssertionError(f"Two drafts of {size} nodes from one state differ.")
            if agreed.same + agreed.near < 0.95 * agreed.compared:
                raise AssertionError(f"{size} nodes: {agreed}")
            found[str(size)] = str(agreed)
        return found

    def times(self, report: Report) -> dict[str, Any]:
        """Microseconds per draft, by way and drafted nodes: (warm, cold)."""
        state, root = self.states[0]
        self.runner.memory.state.copy_(state.view(1, -1))
        self.runner.set_root(root)
        found: dict[str, Any] = {"apart": {size: self._time(self.apart, size) for size in SIZES}}
        for copies in COPIES:
            self.use_copies(copies)
            found[f"fused, {copies} copies"] = {size: self._time(self.fused, size) for size in SIZES}
        found["rows by round"] = {
            size: [turn.num_rows for turn in self.plan(self.apart, size).rounds] for size in SIZES
        }
        self.use_copies(1)
        return found

    def _time(self, drafter: CudaDrafter, size: int) -> list[float]:
        plan, waste = self.plan(drafter, size), torch.empty(LARGER_THAN_CACHE, dtype=torch.uint8, device=self.device)

        def cold(_: int) -> None:
            waste.fill_(1)
            drafter.settle(drafter.launch(plan))

        warm_us = time_graph(lambda _: drafter.settle(drafter.launch(plan)), DRAFTS)
        cold_us = time_graph(cold, DRAFTS) - time_graph(lambda _: waste.fill_(1), DRAFTS)
        return [round(warm_us, 1), round(cold_us, 1)]

    def kernels(self, report: Report) -> dict[str, Any]:
        """Launches and microseconds by kernel of captured drafts of 15 nodes, as torch's profiler sees them.

        A launch begins while it still waits for the one before, so times overlap; `ends` says when each of the last
        draft's launches was done, in microseconds after the first.
        """
        from torch.profiler import ProfilerActivity, profile

        found: dict[str, Any] = {}
        for name, drafter in (("fused", self.fused), ("apart", self.apart)):
            plan, graph = self.plan(drafter, 15), torch.cuda.CUDAGraph()
            drafter.settle(drafter.launch(plan))
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                drafter.settle(drafter.launch(plan))
            graph.replay()
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA]) as recorded:
                for _ in range(DRAFTS):
                    graph.replay()
                torch.cuda.synchronize()
            found[name] = {
                event.key[:40]: [event.count // DRAFTS, round(event.device_time_total / event.count, 2)]
                for event in sorted(recorded.key_averages(), key=lambda event: -event.device_time_total)
            }
            kernels = (event for event in recorded.events() if event.name[:5] in ("draft", "linea", "gathe"))
            launches = sorted(kernels, key=lambda event: event.time_range.end)
            last = launches[-(len(launches) // DRAFTS) :]
            ends = [f"{event.name[:16]} {event.time_range.end - last[0].time_range.end:.1f}" for event in last]
            found[f"{name}, ends"] = ends
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tuned", action="store_true", help="measure how to run the matrices of the other way")
    parser.add_argument("--time-limit", type=float, default=120.0)
    arguments = parser.parse_args()
    report = Report(arguments.out, arguments.time_limit, "gpu_draft")
    report.run("environment", environment)
    bench = Bench(tuned=arguments.tuned)
    parts: tuple[Callable[[Report], Any], ...] = (bench.agreement, bench.times, bench.kernels)
    for part in parts:
        report.run(part.__name__, part)
    for name, part in report.parts.items():
        if isinstance(part, dict) and "error" in part:
            print(f"FAILED {name}: {part['error'][:600]}\n{part['trace'][-1500:]}")
        elif isinstance(part, dict) and name != "environment":
            print(name, *(f"  {key}: {value}" for key, value in part.items()), sep="\n")


if __name__ == "__main__":
    main()
