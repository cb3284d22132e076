"""The rest of a captured step on a GPU: attention, small launches, and a whole random model of a real one's shapes."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from engine.bench.gpu_linears import alone, config_for
from engine.bench.gpu_report import Report, or_error
from engine.kernels import fused_ops, nvrtc
from engine.kernels.dense_linear import pack_dense
from engine.kernels.draft_ops import draft_tokens
from engine.kernels.int8_linear import Int8Weight, pack_int8
from engine.kernels.nf4_linear import Nf4Weight, pack_nf4
from engine.kernels.small_batch_linear import PackedLinear, Workspace, run_linear
from engine.kernels.tree_attention import (
    AttentionConfig,
    AttentionShape,
    AttentionWorkspace,
    ancestor_table,
    tree_attention,
)
from engine.kernels.tune_nf4 import time_graph
from engine.tree import CandidateTree

MODELS = {  # hidden, layers, heads, kv heads, head dim, intermediate, vocabulary
    "bundled": (576, 30, 9, 3, 64, 1536, 49152),
    "7B": (4096, 32, 32, 32, 128, 11008, 32000),
    "8B": (4096, 32, 32, 8, 128, 14336, 128256),
}


def attention_times(report: Report) -> dict[str, Any]:
    """Microseconds per layer by model, nodes and committed length, with the bytes of K and V read once."""
    results = {}
    for name, (_, _, heads, kv_heads, head_dim, _, _) in MODELS.items():
        shape = AttentionShape(heads, kv_heads, head_dim, torch.bfloat16)
        for context in (128, 1000, 4000, 8000):
            layers = attention_layers(shape, context)
            runs = {nodes: attention_run(layers, context, wide_tree(nodes)) for nodes in (1, 8, 16, 32, 63)}
            row: dict[int | str, float] = {nodes: round(time_graph(run, 16), 2) for nodes, run in runs.items()}
            row["floor_us"] = round(4 * kv_heads * context * head_dim / 3e6, 2)
            results[f"{name} {context}"] = row
    return results


@dataclass(frozen=True)
class AttentionLayers:
    """Caches [kv_heads, capacity, head_dim] of eight layers, more than a GPU keeps in its cache for a large model."""

    shape: AttentionShape
    caches: list[Tensor]
    angles: Tensor


def attention_layers(shape: AttentionShape, context: int) -> AttentionLayers:
    bucket = 1 << math.ceil(math.log2(context + 64))
    caches = [torch.randn(2, shape.num_kv_heads, bucket, shape.head_dim, device="cuda").bfloat16() for _ in range(8)]
    return AttentionLayers(shape, caches, fused_ops.rotary_angles(1e4, shape.head_dim, bucket).cuda())


def wide_tree(nodes: int) -> CandidateTree:
    choices = [(0,) * d for d in range(1, min(5, nodes))]
    for rank in range(1, nodes):
        choices += [(*(0,) * d, rank) for d in range(4)]
    return CandidateTree.from_choices(dict.fromkeys(choices[: nodes - 1]))


def attention_run(
    layers: AttentionLayers, context: int, tree: CandidateTree, config: AttentionConfig | None = None
) -> Callable[[int], Tensor]:
    """Return what launches a layer's whole attention over a tree, from qkv to what the next linear reads."""
    shape, nodes = layers.shape, tree.num_nodes
    width = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    qkv = torch.randn(nodes, width, device="cuda").to(shape.dtype)
    scratch = torch.empty(2, nodes, shape.num_kv_heads, shape.head_dim, device="cuda", dtype=shape.dtype)
    length = torch.tensor([context], dtype=torch.int32, device="cuda")
    depth, table = tree.depth.int().cuda(), ancestor_table(tree.ancestors, tree.depth).cuda()
    workspace = AttentionWorkspace(shape, nodes, "cuda", config=config)
    out = torch.empty(nodes, shape.num_heads, shape.head_dim, device="cuda", dtype=shape.dtype)

    def run(i: int) -> Tensor:
        cache = layers.caches[i % len(layers.caches)]
        rows = (scratch[0], scratch[1])
        return tree_attention(qkv, layers.angles, length, depth, table, cache[0], cache[1], rows, workspace, out=out)

    return run


def small_ops(report: Report) -> dict[str, float]:
    """Microseconds of every small launch, in a chain of its own kind."""
    record = fused_ops.new_record("cuda", 100)
    tree, results = wide_tree(32), {}
    parents = torch.tensor(tree.parents, dtype=torch.int32, device="cuda")
    for rows, width in ((1, 576), (32, 576), (32, 4096)):
        x, weight = torch.randn(rows, width, device="cuda").bfloat16(), torch.ones(width, device="cuda").bfloat16()
        out = torch.empty_like(x)
        results[f"rms_norm {rows}x{width}"] = time_graph(
            lambda i, x=x, w=weight, o=out: fused_ops.rms_norm(x, w, 1e-5, out=o), 32
        )
    for vocab in (49152, 128256):
        logits = torch.randn(32, vocab, device="cuda")
        keys = fused_ops.argmax_keys(logits)
        results[f"argmax 32x{vocab}"] = time_graph(lambda i, a=logits, k=keys: fused_ops.argmax_keys(a, out=k), 32)
    tokens = torch.randint(0, 1000, (32,), dtype=torch.int32, device="cuda")
    results["accept 32"] = time_graph(lambda i: fused_ops.accept_greedy(keys, tokens, parents, record), 32)
    record[fused_ops.LENGTH] = 100
    row_of, rank_of = torch.zeros_like(tokens), torch.arange(32, dtype=torch.int32, device="cuda") % 10
    chances = torch.empty(32, device="cuda")
    for vocab in (16384, 49152):
        drafts = torch.randn(4, vocab, device="cuda")
        results[f"draft_tokens 4x{vocab}"] = time_graph(
            lambda i, d=drafts: draft_tokens(d, None, row_of, rank_of, tokens, chances, guesses=10, nodes=range(32)), 32
        )
    return {name: round(us, 2) for name, us in results.items()}


class Stack:
    """A random model's verify step as a chain of these kernels over static buffers, as a captured step will be."""

    def __init__(self, name: str, kind: str, report: Report) -> None:
        self.hidden, self.layers, self.heads, self.kv_heads, self.head_dim, self.inner, self.vocab = MODELS[name]
        self.report, self.kind, self.load = report, kind, nvrtc.load_kernel
        self.workspace = Workspace("cuda")
        width, head_dim = self.hidden, self.head_dim
        sizes = [((self.heads + 2 * self.kv_heads) * head_dim, width), (width, self.heads * head_dim)]
        sizes += [(2 * self.inner, width), (width, self.inner)]
        self.weights = [[self._weight(n, k, i == 2) for i, (n, k) in enumerate(sizes)] for _ in range(self.layers)]
        self.lm_head = pack_dense(self._random(self.vocab, width) * 0.02)
        self.norm = torch.ones(width, device="cuda", dtype=torch.bfloat16)
        self.shape = AttentionShape(self.heads, self.kv_heads, head_dim, torch.bfloat16)
        self.capacity = 2048
        self.cache = [self._random(self.layers, self.kv_heads, self.capacity, head_dim) for _ in range(2)]
        self.angles = fused_ops.rotary_angles(1e4, head_dim, self.capacity).cuda()
        self.record = fused_ops.new_record("cuda", 1000)

    def set_tree(self, nodes: int) -> None:
        self.tree = wide_tree(nodes)
        self.scratch = [self._random(self.layers, nodes, self.kv_heads, self.head_dim) for _ in range(2)]
        self.attention = AttentionWorkspace(self.shape, nodes, "cuda")
        self.depth = self.tree.depth.int().cuda()
        self.table = ancestor_table(self.tree.ancestors, self.tree.depth).cuda()
        self.parents = torch.tensor(self.tree.parents, dtype=torch.int32, device="cuda")
        self.tokens = torch.randint(0, 1000, (nodes,), dtype=torch.int32, device="cuda")
        self.x = self._random(nodes, self.hidden)
        self.logits = torch.empty(nodes, self.vocab, device="cuda")

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    def _weight(self, n: int, k: int, gate_up: bool) -> PackedLinear:
        if self.kind == "nf4":
            codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
            return replace(
                pack_nf4([Nf4Weight(codes, torch.rand(n, k // 64, device="cuda") * 0.02)], torch.bfloat16),
                gate_up=gate_up,
            )
        codes = torch.randint(-127, 128, (n, k), dtype=torch.int8, device="cuda")
        return replace(
            pack_int8([Int8Weight(codes, torch.full((n,), 1e-4, device="cuda"))], torch.bfloat16), gate_up=gate_up
        )

    def linear(self, x: Tensor, weight: PackedLinear, **options: Any) -> Tensor:
        config = config_for(self.report, weight, x.shape[0])
        return run_linear(x, weight, config, self.workspace, load=self.load, **options)

    def step(self) -> None:
        x = self.x
        for layer, (qkv, output, gate_up, down) in enumerate(self.weights):
            h = self.linear(fused_ops.rms_norm(x, self.norm, 1e-5, load=self.load), qkv)
            keys, values = (cache[layer] for cache in self.cache)
            scratch = self.scratch[0][layer], self.scratch[1][layer]
            attended = tree_attention(
                h, self.angles, self.record, self.depth, self.table, keys, values, scratch, self.attention,
                load=self.load,
            )  # fmt: skip
            x = self.linear(attended.flatten(1), output, residual=x)
            h = self.linear(fused_ops.rms_norm(x, self.norm, 1e-5, load=self.load), gate_up)
            x = self.linear(h, down, residual=x)
        self.linear(fused_ops.rms_norm(x, self.norm, 1e-5, load=self.load), self.lm_head, out=self.logits)
        keys = fused_ops.argmax_keys(self.logits, load=self.load)
        fused_ops.accept_greedy(keys, self.tokens, self.parents, self.record, load=self.load)
        fused_ops.commit_path(*self.scratch, *self.cache, self.record, load=self.load)


def whole_step(name: str, kind: str = "nf4") -> Callable[[Report], Any]:
    """Milliseconds of a captured verify step at 1,000 committed rows, by nodes, overlapping launches or not."""

    def part(report: Report) -> dict[str, Any]:
        results: dict[str, Any] = {}
        stack = Stack(name, kind, report)
        for nodes in (1, 4, 8, 16, 32, 63):
            stack.set_tree(nodes)
            stack.load = nvrtc.load_kernel
            row = {"ms": round(_time_step(stack), 4)}
            if nodes in (1, 32):
                stack.load = alone
                row["ms_alone"] = round(_time_step(stack), 4)
            results[str(nodes)] = row
        del stack
        torch.cuda.empty_cache()
        return results

    return part


def step_parts(name: str, nodes: tuple[int, ...] = (1, 32)) -> Callable[[Report], Any]:
    """Where a captured step's milliseconds go: the step without each source file's kernels, and kernel by kernel."""

    def part(report: Report) -> dict[str, Any]:
        stack, results = Stack(name, "nf4", report), {}
        groups = {"linears": ("linear",), "attention": ("tree_attention",), "small launches": ("fused_ops",)}
        groups |= {"all but the linears": ("tree_attention", "fused_ops")}
        for count in nodes:
            stack.set_tree(count)
            stack.load = nvrtc.load_kernel
            row = {"ms": round(_time_step(stack), 4), "without": {}}
            for group, left_out in groups.items():
                stack.load = partial(_load_unless, left_out)
                row["without"][group] = round(_time_step(stack), 4)
            stack.load = alone
            row["kernels_us"] = or_error(partial(_kernel_times, stack))
            results[str(count)] = row
        del stack
        torch.cuda.empty_cache()
        return results

    return part


def _load_unless(left_out: tuple[str, ...], source: str, *arguments: Any) -> Callable[..., None]:
    return (lambda *_, **__: None) if source.startswith(left_out) else nvrtc.load_kernel(source, *arguments)


def _kernel_times(stack: Stack) -> dict[str, list[float]]:
    """Sum the microseconds of a step by kernel and grid, with its launches, as the driver's profiler sees them."""
    stack.step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        stack.step()
        torch.cuda.synchronize()
    totals: dict[str, list[float]] = {}
    for event in profile.events():
        total = totals.setdefault(event.name, [0.0, 0])
        total[0] += event.device_time_total
        total[1] += 1
    return {name: [round(us, 1), count] for name, (us, count) in totals.items()}


def _time_step(stack: Stack) -> float:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        stack.step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stack.step()
    times = []
    for _ in range(12):
        stack.record[fused_ops.LENGTH] = 1000
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return median(times[2:])
