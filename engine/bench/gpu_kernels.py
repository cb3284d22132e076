"""Check and time the GPU kernels: `python -m engine.bench.gpu_kernels --out DIR --time-limit 280`.

Correctness first, then times from CUDA graphs over weights that do not fit the cache, beside bitsandbytes' NF4 and
16-bit `F.linear`. Every part stands alone: results are written after each, and a part that fails is reported.
"""

import argparse
import json
import math
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.kernels import fused_ops, nvrtc, reference
from engine.kernels.dense_linear import pack_dense
from engine.kernels.draft_ops import draft_tokens
from engine.kernels.int8_linear import Int8Weight, pack_int8
from engine.kernels.nf4_linear import Nf4Weight, pack_nf4
from engine.kernels.small_batch_linear import (
    Decode,
    LinearConfig,
    PackedLinear,
    Workspace,
    default_config,
    run_linear,
    token_tiles_for,
)
from engine.kernels.tree_attention import AttentionShape, AttentionWorkspace, ancestor_table, tree_attention
from engine.kernels.tune_nf4 import candidates, copies, time_graph, tune
from engine.tree import CandidateTree

TOKENS = (1, 2, 4, 8, 16, 32, 64)
MAIN = [(4096, 4096), (11008, 4096), (4096, 11008)]
MORE = [(12288, 4096), (22016, 4096), (6144, 4096), (14336, 4096), (28672, 4096), (4096, 14336)]
SMALL = [(960, 576), (576, 576), (3072, 576), (576, 1536)]
BNB_TOKEN_US = {(4096, 4096): 12.1, (11008, 4096): 24.6, (4096, 11008): 26.2}  # one token, H100, measured before
MODELS = {  # hidden, layers, heads, kv heads, head dim, intermediate, vocabulary
    "bundled": (576, 30, 9, 3, 64, 1536, 49152),
    "7B": (4096, 32, 32, 32, 128, 11008, 32000),
    "8B": (4096, 32, 32, 8, 128, 14336, 128256),
}


class Report:
    """Results by part, on disk after every part."""

    def __init__(self, folder: Path, limit: float) -> None:
        self.path, self.start, self.limit = folder / "gpu_kernels.json", time.time(), limit
        self.parts: dict[str, Any] = {}
        self.best: dict[tuple[int, int, int, int], LinearConfig] = {}  # (decode, n, k, token tiles)
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def elapsed(self) -> float:
        return time.time() - self.start

    def run(self, name: str, part: Callable[["Report"], Any], until: float = 1.0) -> None:
        """Run a part unless the given share of the time limit is spent."""
        if self.elapsed > self.limit * until:
            self.parts[name] = {"skipped": f"after {self.elapsed:.0f} s"}
        else:
            before = time.time()
            try:
                self.parts[name] = part(self)
            except Exception as error:  # one part must not cost the others
                self.parts[name] = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
            self.parts[name + "_seconds"] = round(time.time() - before, 1)
        self.path.write_text(json.dumps(self.parts, indent=1))
        print(f"[{self.elapsed:6.1f} s] {name}: {_short(self.parts[name])}", flush=True)


def _short(value: Any) -> str:
    if isinstance(value, dict) and "error" in value:
        return value["error"][:600]
    return str(value)[:160] if not isinstance(value, dict) else f"{len(value)} entries"


def environment(report: Report) -> dict[str, Any]:
    versions = {}
    for name in ("bitsandbytes", "triton", "transformers"):
        try:
            versions[name] = __import__(name).__version__
        except ImportError:
            versions[name] = None
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name, "multiprocessors": properties.multi_processor_count, "l2": properties.L2_cache_size,
        "torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"), **versions,
    }  # fmt: skip


def bandwidth(report: Report) -> dict[str, float]:
    """The ceilings of this card: a large copy, and reading alone."""
    source = torch.randint(0, 255, (1 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy_us = time_graph(lambda i: target.copy_(source), 3)
    wide = source.view(torch.float32)
    read_us = time_graph(lambda i: wide.sum(), 3)
    return {"copy_gb_s": 2 * source.nbytes / copy_us / 1e3, "read_gb_s": source.nbytes / read_us / 1e3}


def compile_all(report: Report) -> dict[str, Any]:
    """Compile every candidate, in parallel: this is what a first start would pay a part of."""
    jobs = []
    for tokens in (8, 16, 32, 64):
        for decode in (Decode.NF4_TABLE, Decode.INT8):
            for config in candidates(decode, tokens, 4096, 4096):
                jobs.append((*((name.upper(), value) for name, value in config.to_dict().items()), ("BF16", 1)))
    capability = torch.cuda.get_device_capability()
    architecture = 10 * capability[0] + capability[1]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda defines: nvrtc._cached_code("linear.cuh", defines, architecture), jobs))
    return {"kernels": len(jobs)}


def nf4_matrix(n: int, k: int, seed: int = 0) -> tuple[Nf4Weight, Any]:
    """Quantise a random matrix with bitsandbytes (nested absmax); without it, random codes."""
    generator = torch.Generator("cuda").manual_seed(seed)
    try:
        from bitsandbytes import functional
    except ImportError:
        codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda", generator=generator)
        return Nf4Weight(codes, torch.rand(n, k // 64, device="cuda", generator=generator) * 0.05 + 0.03), None
    values = torch.randn(n, k, device="cuda", generator=generator, dtype=torch.bfloat16) * 0.02
    data, state = functional.quantize_4bit(values, blocksize=64, compress_statistics=True, quant_type="nf4")
    return Nf4Weight.from_bitsandbytes(data, state), (data, state)


def bnb_linear(x: Tensor, quantised: Any) -> Tensor:
    import bitsandbytes

    data, state = quantised
    return bitsandbytes.matmul_4bit(x, data.t(), quant_state=state)


def correctness(report: Report) -> dict[str, Any]:
    """Error against float64 beside bitsandbytes', and equality of bits over rows, cuts and decodings."""
    results, workspace = {}, Workspace("cuda")
    for dtype in (torch.bfloat16, torch.float16):
        for n, k in [(4096, 4096), (1024, 11008), (576, 1536), (960, 576)]:
            weight, quantised = nf4_matrix(n, k)
            if quantised:
                quantised[1].dtype = dtype
            values = weight.dequantize()
            x = torch.randn(64, k, device="cuda").to(dtype)
            want = reference.linear(x, values)
            packed = pack_nf4([weight], dtype)
            base = run_linear(x, packed, default_config(n, k, 64, packed.decode), workspace)
            entry = {"ours": _error(base, want)}
            if quantised:
                entry["bnb"] = {m: _error(bnb_linear(x[:m], quantised), want[:m]) for m in (1, 4, 64)}
            entry["16 bit weights"] = _error(F.linear(x, values.to(dtype)), want)
            entry["unequal"] = _unequal(x, packed, workspace, base)
            results[f"{n}x{k} {dtype}"] = entry
            int8 = Int8Weight.from_dense(values)
            for name, other, exact in (
                ("int8", pack_int8([int8], dtype), int8.dequantize()),
                ("dense", pack_dense(values.to(dtype)), values.to(dtype)),
            ):
                base = run_linear(x, other, default_config(n, k, 64, other.decode), workspace)
                entry[name] = _error(base, reference.linear(x, exact))
                entry[name + " unequal"] = _unequal(x, other, workspace, base)
    return results


def _error(out: Tensor, want: Tensor) -> float:
    return float((out.double() - want).norm() / want.norm())


def _unequal(x: Tensor, packed: PackedLinear, workspace: Workspace, base: Tensor) -> list[str]:
    """Name every number of rows and every cut whose bits differ from `base`."""
    found = []
    for tokens in range(1, 65):
        config = default_config(packed.n, packed.k, tokens, packed.decode)
        if not torch.equal(run_linear(x[:tokens].contiguous(), packed, config, workspace), base[:tokens]):
            found.append(f"{tokens} rows")
    if packed.k == 4096 or packed.k == 576:
        for tokens in (3, 16, 32, 64) if packed.dtype == torch.bfloat16 else ():
            for config in candidates(packed.decode, tokens, packed.n, packed.k):
                out = torch.full((tokens, packed.n), torch.nan, dtype=packed.dtype, device="cuda")
                run_linear(x[:tokens].contiguous(), packed, config, workspace, out=out)
                if not torch.equal(out, base[:tokens]):
                    found.append(str(config))
    return found


def run_tests(report: Report) -> str:
    """The package's own tests of these kernels, on the GPU."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-k",
        "cuda",
        "tests/test_kernels.py",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    return (done.stdout + done.stderr)[-1500:]


def tune_shapes(shapes: list[tuple[int, int]], kinds: tuple[str, ...] = ("nf4",)) -> Callable[[Report], Any]:
    def part(report: Report) -> dict[str, Any]:
        results, workspace = {}, Workspace("cuda")
        for kind in kinds:
            for n, k in shapes:
                packed = _packed(kind, n, k)
                for tokens in (8, 16, 32, 64):
                    timed = tune(packed, tokens, workspace)
                    report.best[packed.decode, n, k, token_tiles_for(tokens)] = timed[0][1]
                    results[f"{kind} {n}x{k} {tokens}"] = [[round(us, 2), _cut(config)] for us, config in timed]
        return results

    return part


def _cut(config: LinearConfig) -> str:
    return "/".join(str(value) for value in config.to_dict().values())


def _packed(kind: str, n: int, k: int) -> PackedLinear:
    if kind == "nf4":
        return pack_nf4([nf4_matrix(n, k)[0]], torch.bfloat16)
    values = torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02
    return pack_int8([Int8Weight.from_dense(values)], torch.bfloat16) if kind == "int8" else pack_dense(values)


def config_for(report: Report, packed: PackedLinear, tokens: int) -> LinearConfig:
    key = (packed.decode, packed.n, packed.k, token_tiles_for(tokens))
    return report.best.get(key) or default_config(packed.n, packed.k, tokens, packed.decode)


def alone(*arguments: Any) -> nvrtc.Kernel:
    """Load a kernel that does not start before the one before it has ended."""
    return replace(nvrtc.load_kernel(*arguments), overlaps=False)


def time_shapes(shapes: list[tuple[int, int]], kind: str = "nf4", peers: bool = True) -> Callable[[Report], Any]:
    def part(report: Report) -> dict[str, Any]:
        return {f"{n}x{k}": _time_shape(report, kind, n, k, peers) for n, k in shapes}

    return part


def _time_shape(report: Report, kind: str, n: int, k: int, peers: bool) -> dict[str, Any]:
    packed, workspace, result = _packed(kind, n, k), Workspace("cuda"), {}
    rounds = copies(packed)
    dense = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(2 + (120 << 20) // (2 * n * k))]
    quantised = _bnb_copies(n, k) if peers and kind == "nf4" else []
    for tokens in TOKENS:
        x = torch.randn(tokens, k, device="cuda", dtype=torch.bfloat16)
        config, out = config_for(report, packed, tokens), torch.empty(tokens, n, device="cuda", dtype=torch.bfloat16)
        workspace.reserve(config.workspace_floats(n))
        count = max(24, len(rounds))
        row: dict[str, Any] = {"config": _cut(config)}
        for name, load in (("us", nvrtc.load_kernel), ("us_alone", alone)):
            row[name] = time_graph(
                lambda i, load=load, x=x, config=config, out=out: run_linear(
                    x, rounds[i % len(rounds)], config, workspace, out=out, load=load
                ),
                count,
            )
        row["gb_s"] = packed.num_bytes / row["us"] / 1e3
        if quantised:
            row["bnb_us"] = _or_error(
                lambda x=x: time_graph(lambda i: bnb_linear(x, quantised[i % len(quantised)]), len(quantised))
            )
        if peers:
            row["bf16_us"] = time_graph(lambda i, x=x: F.linear(x, dense[i % len(dense)]), max(12, len(dense)))
        result[tokens] = {key: round(v, 2) if isinstance(v, float) else v for key, v in row.items()}
    return result


def _or_error(measure: Callable[[], float]) -> float | str:
    """A peer that fails must not cost our own numbers."""
    try:
        return measure()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:120]


def _bnb_copies(n: int, k: int) -> list[Any]:
    _, quantised = nf4_matrix(n, k)
    if quantised is None:
        return []
    data, state = quantised
    return [(data.clone(), state) for _ in range(min(64, max(12, 2 + (120 << 20) // data.nbytes)))]


def attention_times(report: Report) -> dict[str, Any]:
    """Microseconds per layer by model, nodes and committed length, with the bytes of K and V read once."""
    results = {}
    for name, (_, _, heads, kv_heads, head_dim, _, _) in MODELS.items():
        shape = AttentionShape(heads, kv_heads, head_dim, torch.bfloat16)
        for context in (128, 1000, 4000, 8000):
            bucket = 1 << math.ceil(math.log2(context + 64))
            caches = [torch.randn(2, kv_heads, bucket, head_dim, device="cuda").bfloat16() for _ in range(8)]
            length = torch.tensor([context], dtype=torch.int32, device="cuda")
            row = {}
            for nodes in (1, 8, 32, 63):
                run = _attention(shape, _tree(nodes), caches, length, bucket)
                row[nodes] = round(time_graph(run, 16), 2)
            row["floor_us"] = round(4 * kv_heads * context * head_dim / 3e6, 2)
            results[f"{name} {context}"] = row
    return results


def _tree(nodes: int) -> CandidateTree:
    choices = [(0,) * d for d in range(1, min(5, nodes))]
    for rank in range(1, nodes):
        choices += [(*(0,) * d, rank) for d in range(4)]
    return CandidateTree.from_choices(dict.fromkeys(choices[: nodes - 1]))


def _attention(
    shape: AttentionShape, tree: CandidateTree, caches: list[Tensor], length: Tensor, bucket: int
) -> Callable[[int], Tensor]:
    nodes = tree.num_nodes
    query = torch.randn(nodes, shape.num_heads, shape.head_dim, device="cuda").to(shape.dtype)
    scratch = torch.randn(2, nodes, shape.num_kv_heads, shape.head_dim, device="cuda").to(shape.dtype)
    depth, table = tree.depth.int().cuda(), ancestor_table(tree.ancestors, tree.depth).cuda()
    workspace, out = AttentionWorkspace(shape, nodes, bucket, "cuda"), torch.empty_like(query)

    def run(i: int) -> Tensor:
        keys, values = caches[i % len(caches)]
        return tree_attention(
            query, keys, values, *scratch, length, depth, table, shape, workspace, max_context=bucket, out=out
        )

    return run


def small_ops(report: Report) -> dict[str, float]:
    """Microseconds of every small launch, in a chain of its own kind."""
    record = fused_ops.new_record("cuda", 100)
    tree, results = _tree(32), {}
    depth, parents = tree.depth.int().cuda(), torch.tensor(tree.parents, dtype=torch.int32, device="cuda")
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
    angles = fused_ops.rotary_angles(1e4, 128, 8192).cuda()
    qkv = torch.randn(32, 96 * 128, device="cuda").bfloat16()
    outs = [torch.empty(32, 32, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    results["rotate 32x96x128"] = time_graph(
        lambda i: fused_ops.rotate_and_split(qkv, angles, record, depth, *outs), 32
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
        self.tree = _tree(nodes)
        self.scratch = [self._random(self.layers, nodes, self.kv_heads, self.head_dim) for _ in range(2)]
        self.attention = AttentionWorkspace(self.shape, nodes, self.capacity, "cuda")
        self.depth = self.tree.depth.int().cuda()
        self.table = ancestor_table(self.tree.ancestors, self.tree.depth).cuda()
        self.parents = torch.tensor(self.tree.parents, dtype=torch.int32, device="cuda")
        self.tokens = torch.randint(0, 1000, (nodes,), dtype=torch.int32, device="cuda")
        self.x = self._random(nodes, self.hidden)
        self.query = self._random(nodes, self.heads, self.head_dim)
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
            scratch = [rows[layer] for rows in self.scratch]
            fused_ops.rotate_and_split(h, self.angles, self.record, self.depth, self.query, *scratch, load=self.load)
            attended = tree_attention(
                self.query, keys, values, *scratch, self.record, self.depth, self.table, self.shape, self.attention,
                max_context=self.capacity, load=self.load,
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


def print_table(report: Report) -> None:
    print("\nmicroseconds per linear (ours | ours without overlap | bitsandbytes | bf16), then ours in GB/s")
    for name in [key for key in report.parts if key.startswith("time_") and not key.endswith("_seconds")]:
        for shape, rows in report.parts[name].items():
            if isinstance(rows, dict):
                cells = [
                    f"{m}: {r['us']}|{r['us_alone']}|{r.get('bnb_us', '-')}|{r.get('bf16_us', '-')}"
                    for m, r in rows.items()
                ]
                print(f"{name[5:]} {shape}  " + "  ".join(cells) + f"  {rows[1]['gb_s']:.0f} GB/s  {rows[1]['config']}")
    for name in ("correctness", "attention", "small_ops"):
        part = report.parts.get(name, {})
        for key, value in part.items() if isinstance(part, dict) else ():
            print(f"{name} {key}: {value}"[:420])
    for name in [key for key in report.parts if key.startswith("step_")]:
        print(f"{name}: {report.parts[name]}"[:500])
    for name, part in report.parts.items():
        if isinstance(part, dict) and "error" in part:
            print(f"FAILED {name}: {part['error'][:300]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--time-limit", type=float, default=280.0)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    report = Report(arguments.out, arguments.time_limit)
    report.run("environment", environment)
    report.run("bandwidth", bandwidth)
    report.run("compile", compile_all)
    report.run("correctness", correctness)
    report.run("tune_main", tune_shapes(MAIN), 0.6)
    report.run("time_nf4_main", time_shapes(MAIN), 0.7)
    report.run("attention", attention_times, 0.7)
    report.run("small_ops", small_ops, 0.75)
    report.run("tests", run_tests, 0.6)
    report.run("tune_small", tune_shapes(SMALL, ("int8",)), 0.75)
    report.run("step_bundled_int8", whole_step("bundled", "int8"), 0.8)
    report.run("step_7B_nf4", whole_step("7B"), 0.85)
    report.run("tune_more", tune_shapes([(12288, 4096), (22016, 4096)]), 0.85)
    report.run("time_nf4_more", time_shapes(MORE), 0.9)
    report.run("time_nf4_small", time_shapes(SMALL), 0.95)
    report.run("time_int8_main", time_shapes(MAIN, "int8", peers=False), 0.95)
    report.run("time_dense_lm_head", time_shapes([(49152, 576), (32000, 4096)], "dense"), 0.97)
    report.run("step_8B_nf4", whole_step("8B"), 0.9)
    print_table(report)


if __name__ == "__main__":
    main()
