"""Check and time tree attention on a GPU: `python -m engine.bench.gpu_attention --out DIR`, about a minute.

Against float64; equality of a node's bits for every cut of the work, for random trees and for random shares of its path
committed; then microseconds a layer in a chain of launches, from qkv to what the next linear reads.
"""

import argparse
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.bench.gpu_report import Report, environment, or_error
from engine.bench.gpu_step import MODELS, AttentionLayers, attention_layers, attention_run, wide_tree
from engine.kernels import nvrtc, reference
from engine.kernels.fused_ops import rotary_angles, rotate_into_cache
from engine.kernels.small_batch_linear import LoadKernel
from engine.kernels.tree_attention import (
    AttentionConfig,
    AttentionShape,
    AttentionWorkspace,
    ancestor_table,
    default_config,
    tree_attention,
)
from engine.kernels.tune_nf4 import time_graph
from engine.tree import CandidateTree

NODES = (1, 8, 16, 32, 63)
CONTEXTS = (128, 1000, 4000, 8000)
SHAPES = [(9, 3, 64), (32, 32, 128), (32, 8, 128), (28, 4, 128), (20, 1, 64)]


def cuts(shape: AttentionShape, device: str) -> list[AttentionConfig]:
    """Every way to cut the work here; all must give the same bits."""
    limit, found = nvrtc.shared_memory_limit(), []
    for cluster in (False, True) if device == "cpu" or torch.cuda.get_device_capability() >= (9, 0) else (False,):
        base = default_config(shape, 1, cluster=cluster, shared_limit=limit)
        found += [replace(base, row_tiles=tiles) for tiles in (1, 2, 3)]
    return [config for config in found if config.shared_bytes <= limit]


def compile_all(report: Report) -> int:
    shapes = [AttentionShape(*s, dtype) for s in SHAPES for dtype in (torch.bfloat16, torch.float16)]
    jobs = [("tree_attention.cuh", config.defines) for shape in shapes for config in cuts(shape, "cuda")]
    nvrtc.compile_ahead(jobs)
    return len(jobs)


@dataclass(frozen=True)
class Case:
    """A random tree behind a random text; rows past the committed ones hold NaN."""

    shape: AttentionShape
    tree: CandidateTree
    length: int
    cache: tuple[Tensor, Tensor]
    qkv: Tensor
    angles: Tensor
    load: LoadKernel

    @classmethod
    def draw(cls, shape: AttentionShape, draw: random.Random, longest: int, device: str, load: LoadKernel) -> "Case":
        tree, capacity = random_tree(draw), longest + 40
        length = draw.randrange(draw.choice([40, longest]))
        generator = torch.Generator().manual_seed(draw.randrange(1 << 30))
        sizes = [(shape.num_kv_heads, capacity, shape.head_dim)] * 2
        sizes.append((tree.num_nodes, (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim))
        keys, values, qkv = (torch.randn(*s, generator=generator).to(device, shape.dtype) for s in sizes)
        keys[:, length:] = values[:, length:] = torch.nan
        angles = rotary_angles(1e4, shape.head_dim, capacity).to(device)
        return cls(shape, tree, length, (keys, values), qkv * 1.5, angles, load)

    def attend(
        self,
        tree: CandidateTree,
        length: int,
        nodes: list[int],
        cache: tuple[Tensor, Tensor],
        config: AttentionConfig | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the nodes see as `tree` behind `length` rows of the cache, and their keys and values."""
        device, kv_heads = self.qkv.device, self.shape.num_kv_heads
        scratch = torch.full((2, len(nodes), kv_heads, self.shape.head_dim), torch.nan, dtype=self.shape.dtype)
        keys, values = scratch.to(device)
        workspace = AttentionWorkspace(self.shape, len(nodes), device, config=config)
        at = torch.tensor([length], dtype=torch.int32, device=device)
        table = ancestor_table(tree.ancestors, tree.depth).to(device)
        qkv, depth = self.qkv[nodes].contiguous(), tree.depth.int().to(device)
        out = tree_attention(*(qkv, self.angles, at, depth, table, *cache, (keys, values), workspace), load=self.load)
        return out, keys, values

    def together(self, config: AttentionConfig | None = None) -> tuple[Tensor, Tensor, Tensor]:
        return self.attend(self.tree, self.length, list(range(self.tree.num_nodes)), self.cache, config)

    def from_path(self, path: list[int], committed: int, found: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Return what the path's end sees with the path's first `committed` nodes in the cache, the rest a chain."""
        keys, values = (rows.clone() for rows in self.cache)
        for rows, new in ((keys, found[1]), (values, found[2])):
            rows[:, self.length : self.length + committed] = new[path[:committed]].transpose(0, 1)
        rest = path[committed:]
        chain = CandidateTree.chain(len(rest) - 1)
        return self.attend(chain, self.length + committed, rest, (keys, values), None)[0][-1]

    def as_prompt(self, path: list[int]) -> Tensor:
        """Return what a path sees as rows of a prompt."""
        device, end = self.qkv.device, self.length + len(path)
        cache = self.cache[0].clone(), self.cache[1].clone()
        at = torch.tensor([end], dtype=torch.int32, device=device)
        depth = torch.arange(-len(path), 0, dtype=torch.int32, device=device)
        qkv, workspace = self.qkv[path].contiguous(), AttentionWorkspace(self.shape, len(path), device)
        rotate_into_cache(qkv, self.angles, at, depth, *cache, load=self.load)
        return tree_attention(qkv, self.angles, at, depth, None, *cache, None, workspace, load=self.load)

    def error(self, out: Tensor) -> float:
        shape, nodes, length = self.shape, self.tree.num_nodes, self.length
        parts = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
        query, key, value = self.qkv.view(nodes, -1, shape.head_dim).split(parts, dim=1)
        turn = self.angles[length + self.tree.depth.to(self.qkv.device)].unsqueeze(1)
        query, key = (reference.rotate(x, turn).to(shape.dtype) for x in (query, key))
        ancestors = self.tree.ancestors.to(self.qkv.device)
        want = reference.tree_attention(query, *self.cache, key, value, length, ancestors)
        return float((out.double() - want).norm() / want.norm())


def random_tree(draw: random.Random) -> CandidateTree:
    """Grow a tree of up to 64 nodes and depth 15 by random children, from chains to bushes."""
    choices: list[tuple[int, ...]] = [()]
    count, reach = draw.randrange(1, 65), draw.choice([1, 3, 1000])
    while len(choices) < count:
        parents = [choice for choice in choices if len(choice) < 15]
        child = (*draw.choice(parents[-reach:]), draw.randrange(64))
        if child not in choices:
            choices.append(child)
    return CandidateTree.from_choices(choices[1:])


def check(shape: AttentionShape, cases: int, longest: int, device: str, load: LoadKernel) -> dict[str, Any]:
    """Return the largest error against float64, and every way in which bits differed (there should be none)."""
    draw, errors, differ = random.Random(7), [], []
    for case in (Case.draw(shape, draw, longest, device, load) for _ in range(cases)):
        found = case.together()
        errors.append(case.error(found[0]))
        name = f"{case.tree.num_nodes} nodes behind {case.length}"
        for config in cuts(shape, device):
            again = case.together(config)
            if not all(torch.equal(one, other) for one, other in zip(again, found, strict=True)):
                differ.append(f"{name}: {config}")
        for node in {0, *(draw.randrange(case.tree.num_nodes) for _ in range(4))}:
            path = case.tree.path_to(node)
            for committed in {0, len(path) - 1, draw.randrange(len(path))}:
                if not torch.equal(case.from_path(path, committed, found), found[0][node]):
                    differ.append(f"{name}: node {node}, {committed} of {len(path)} committed")
            if not torch.equal(case.as_prompt(path), found[0][path]):
                differ.append(f"{name}: node {node} as a prompt")
    return {"error": max(errors), "different": differ}


def correctness(report: Report) -> dict[str, Any]:
    results = {}
    for heads, kv_heads, head_dim in SHAPES:
        for dtype in (torch.bfloat16, torch.float16):
            shape = AttentionShape(heads, kv_heads, head_dim, dtype)
            results[f"{heads}/{kv_heads}x{head_dim} {dtype}"] = check(shape, 6, 2500, "cuda", nvrtc.load_kernel)
    return results


def model_shape(name: str) -> AttentionShape:
    _, _, heads, kv_heads, head_dim, _, _ = MODELS[name]
    return AttentionShape(heads, kv_heads, head_dim, torch.bfloat16)


def resources(report: Report) -> dict[str, Any]:
    """What each cut takes, and how many thread blocks and clusters fit."""
    results = {}
    for name in MODELS:
        for config in cuts(model_shape(name), "cuda"):
            kernel = nvrtc.load_kernel("tree_attention.cuh", "attend_tree", config.defines, config.shared_bytes)
            found: dict[str, Any] = kernel.resources(config.threads, config.shared_bytes)
            if config.cluster:
                grid = (*config.grid(1)[:2], 1)
                found["clusters"] = or_error(
                    lambda k=kernel, c=config, g=grid: k.clusters(g, c.threads, c.shared_bytes, c.slots)
                )
            found |= {"threads": config.threads, "shared": config.shared_bytes}
            results[f"{name} {label(config)}"] = found
    return results


def label(config: AttentionConfig) -> str:
    return f"{config.row_tiles} tiles, {config.slots} slots{', cluster' if config.cluster else ''}"


def times(report: Report) -> dict[str, Any]:
    """Microseconds a layer as the engine would run it; the floor is K and V read once at 3 TB/s."""
    results = {}
    for name in MODELS:
        for context in CONTEXTS:
            layers = attention_layers(model_shape(name), context)
            row = {str(nodes): time_one(layers, context, nodes, None) for nodes in NODES}
            row["floor"] = round(4 * layers.shape.num_kv_heads * context * layers.shape.head_dim / 3e6, 2)
            results[f"{name} {context}"] = row
            print(f"{name} {context}: {row}", flush=True)
    return results


def time_one(layers: AttentionLayers, context: int, nodes: int, config: AttentionConfig | None) -> float:
    return round(time_graph(attention_run(layers, context, wide_tree(nodes), config), 32), 2)


def times_by_cut(report: Report) -> dict[str, Any]:
    results = {}
    for name in MODELS:
        for context in (128, 1000, 4000):
            layers = attention_layers(model_shape(name), context)
            for config in cuts(layers.shape, "cuda"):
                row = {str(nodes): time_one(layers, context, nodes, config) for nodes in (1, 16, 32, 63)}
                results[f"{name} {context} {label(config)}"] = row
                print(f"{name} {context} {label(config)}: {row}", flush=True)
    return results


def durations(report: Report) -> dict[str, Any]:
    """Microseconds that a launch lasts by itself, as the driver's profiler sees it."""
    results = {}
    for name in MODELS:
        for context in (0, 128, 1000, 4000):
            layers, row = attention_layers(model_shape(name), max(context, 16)), {}
            for nodes in (1, 16, 32):
                run = attention_run(layers, context, wide_tree(nodes), None)
                row[str(nodes)] = or_error(lambda run=run: _profiled(run))
            results[f"{name} {context}"] = row
    return results


def _profiled(run: Any) -> float:
    for i in range(3):
        run(i)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for i in range(16):
            run(i)
            torch.cuda.synchronize()
    found = sorted(event.device_time_total for event in profile.events() if "attend" in event.name)
    return round(found[len(found) // 2], 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--time-limit", type=float, default=60.0)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    report = Report(arguments.out, arguments.time_limit, "gpu_attention")
    report.run("environment", environment)
    report.run("compile", compile_all)
    report.run("resources", resources)
    report.run("times", times)
    report.run("correctness", correctness, 0.8)
    report.run("durations", durations, 0.85)
    report.run("times_by_cut", times_by_cut, 0.9)
    for part in ("resources", "correctness", "durations"):
        for key, value in report.parts[part].items():
            print(f"{part} {key}: {value}"[:600])


if __name__ == "__main__":
    main()
