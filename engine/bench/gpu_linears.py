"""The linears on a GPU: matrices and bitsandbytes' own, errors against float64, equality of bits, times by shape."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.bench.gpu_report import Report, or_error
from engine.kernels import nvrtc, reference
from engine.kernels.dense_linear import pack_dense
from engine.kernels.int8_linear import Int8Weight, pack_int8
from engine.kernels.linear_config import Decode, LinearConfig, default_config, rows_measured
from engine.kernels.measured_configs import choose_config
from engine.kernels.nf4_linear import Nf4Weight, pack_nf4
from engine.kernels.small_batch_linear import PackedLinear, Workspace, run_linear
from engine.kernels.tune_nf4 import candidates, copies, time_graph, tune

TOKENS = (1, 2, 4, 8, 16, 32, 64)


def compile_all(report: Report) -> dict[str, Any]:
    """Compile every candidate, in parallel: this is what a first start would pay a part of."""
    configs = []
    for tokens in (8, 16, 32, 64):
        for kind in (Decode.NF4_TABLE, Decode.INT8):
            configs += candidates(kind, tokens, 4096, 4096)
    return {"kernels": compile_configs(configs)}


def compile_configs(configs: Iterable[LinearConfig]) -> int:
    """Fill the cache of compiled kernels for bfloat16; return how many."""
    jobs = {(source, defines) for source, _, defines, _ in (config.kernel(64, torch.bfloat16) for config in configs)}
    nvrtc.compile_ahead(jobs)
    return len(jobs)


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


def short_correctness(report: Report) -> dict[str, Any]:
    """`correctness` of one NF4 matrix in bfloat16."""
    return correctness(report, dtypes=(torch.bfloat16,), shapes=[(4096, 4096)], others=False)


def correctness(
    report: Report,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float16),
    shapes: Sequence[tuple[int, int]] = ((4096, 4096), (1024, 11008), (576, 1536), (960, 576)),
    others: bool = True,
) -> dict[str, Any]:
    """Error against float64 beside bitsandbytes', and equality of bits over rows, cuts and decodings."""
    results, workspace = {}, Workspace("cuda")
    for dtype in dtypes:
        for n, k in shapes:
            weight, quantised = nf4_matrix(n, k)
            if quantised:
                quantised[1].dtype = dtype
            values = weight.dequantize()
            x = torch.randn(64, k, device="cuda").to(dtype)
            want = reference.linear(x, values)
            packed = pack_nf4([weight], dtype)
            base = run_linear(x, packed, default_config(n, k, 64, packed.decode), workspace)
            entry = {"ours": error(base, want)}
            if quantised:
                entry["bnb"] = {m: error(bnb_linear(x[:m], quantised), want[:m]) for m in (1, 4, 64)}
            entry["16 bit weights"] = error(F.linear(x, values.to(dtype)), want)
            entry["unequal"] = unequal(x, packed, workspace, base)
            results[f"{n}x{k} {dtype}"] = entry
            if not others:
                continue
            int8 = Int8Weight.from_dense(values)
            for name, other, exact in (
                ("int8", pack_int8([int8], dtype), int8.dequantize()),
                ("dense", pack_dense(values.to(dtype)), values.to(dtype)),
            ):
                base = run_linear(x, other, default_config(n, k, 64, other.decode), workspace)
                entry[name] = error(base, reference.linear(x, exact))
                entry[name + " unequal"] = unequal(x, other, workspace, base)
    return results


def error(out: Tensor, want: Tensor) -> float:
    return float((out.double() - want).norm() / want.norm())


def unequal(x: Tensor, packed: PackedLinear, workspace: Workspace, base: Tensor) -> list[str]:
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


def tune_shapes(shapes: list[tuple[int, int]], kinds: tuple[str, ...] = ("nf4",)) -> Callable[[Report], Any]:
    def part(report: Report) -> dict[str, Any]:
        results, workspace = {}, Workspace("cuda")
        for kind in kinds:
            for n, k in shapes:
                packed = packed_matrix(kind, n, k)
                for tokens in (1, 8, 16, 32, 64):
                    timed = tune(packed, tokens, workspace)
                    report.best[packed.decode, n, k, rows_measured(tokens)] = timed[0][1]
                    results[f"{kind} {n}x{k} {tokens}"] = [[round(us, 2), cut(config)] for us, config in timed]
        return results

    return part


def cut(config: LinearConfig) -> str:
    return "/".join(str(value) for value in config.to_dict().values())


def packed_matrix(kind: str, n: int, k: int) -> PackedLinear:
    if kind == "nf4":
        return pack_nf4([nf4_matrix(n, k)[0]], torch.bfloat16)
    values = torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02
    return pack_int8([Int8Weight.from_dense(values)], torch.bfloat16) if kind == "int8" else pack_dense(values)


def config_for(report: Report, packed: PackedLinear, tokens: int) -> LinearConfig:
    key = (packed.decode, packed.n, packed.k, rows_measured(tokens))
    return report.best.get(key) or choose_config(packed, tokens, Workspace("cuda"))


def alone(*arguments: Any) -> nvrtc.Kernel:
    """Load a kernel that does not start before the one before it has ended."""
    return replace(nvrtc.load_kernel(*arguments), overlaps=False)


def time_shapes(shapes: list[tuple[int, int]], kind: str = "nf4", peers: bool = True) -> Callable[[Report], Any]:
    def part(report: Report) -> dict[str, Any]:
        return {f"{n}x{k}": _time_shape(report, kind, n, k, peers) for n, k in shapes}

    return part


def _time_shape(report: Report, kind: str, n: int, k: int, peers: bool) -> dict[str, Any]:
    packed, workspace, result = packed_matrix(kind, n, k), Workspace("cuda"), {}
    rounds = copies(packed)
    dense = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(2 + (120 << 20) // (2 * n * k))]
    quantised = bnb_copies(n, k) if peers and kind == "nf4" else []
    for tokens in TOKENS:
        x = torch.randn(tokens, k, device="cuda", dtype=torch.bfloat16)
        config, out = config_for(report, packed, tokens), torch.empty(tokens, n, device="cuda", dtype=torch.bfloat16)
        workspace.reserve(config.workspace_floats(n))
        count = max(24, len(rounds))
        row: dict[str, Any] = {"config": cut(config)}
        for name, load in (("us", nvrtc.load_kernel), ("us_alone", alone)):
            row[name] = time_graph(
                lambda i, load=load, x=x, config=config, out=out: run_linear(
                    x, rounds[i % len(rounds)], config, workspace, out=out, load=load
                ),
                count,
            )
        row["gb_s"] = packed.num_bytes / row["us"] / 1e3
        if quantised:
            row["bnb_us"] = or_error(
                lambda x=x: time_graph(lambda i: bnb_linear(x, quantised[i % len(quantised)]), len(quantised))
            )
        if peers:
            row["bf16_us"] = time_graph(lambda i, x=x: F.linear(x, dense[i % len(dense)]), max(12, len(dense)))
        result[tokens] = {key: round(v, 2) if isinstance(v, float) else v for key, v in row.items()}
    return result


def bnb_copies(n: int, k: int) -> list[Any]:
    _, quantised = nf4_matrix(n, k)
    if quantised is None:
        return []
    data, state = quantised
    return [(data.clone(), state) for _ in range(min(64, max(12, 2 + (120 << 20) // data.nbytes)))]
