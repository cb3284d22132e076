"""Search the cuts of the NF4 linear on a Hopper GPU: `python -m engine.bench.nf4_search --out DIR --time-limit 330`.

Both kernels, the portable one and the one on Hopper's matrix instruction: equality of bits for each cut, times over
weights that do not fit the cache, what a launch takes, and times with one stage left out, which show what bounds it.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.bench.gpu_linears import alone, bnb_copies, bnb_linear, compile_configs, cut, nf4_matrix
from engine.bench.gpu_report import Report, bandwidth, environment, or_error
from engine.bench.gpu_step import step_parts
from engine.kernels import nvrtc, reference
from engine.kernels.linear_config import Decode, LinearConfig, token_tiles_for
from engine.kernels.nf4_linear import pack_nf4
from engine.kernels.small_batch_linear import PackedLinear, Workspace, run_linear
from engine.kernels.tune_nf4 import candidates, copies, time_graph, wgmma_candidates

MAIN = [(4096, 4096), (11008, 4096), (4096, 11008)]
LAYER = [(12288, 4096), (22016, 4096)]
FAMILIES = {"mma": 0, "wgmma": 1}
BEST = 2  # the faster of both
STAGES = {
    "decode": 1, "tokens": 2, "exchange": 4, "weights": 8, "decode, tokens": 3, "all but weights": 7, "all": 15,
    "two sets": 16,
}  # fmt: skip


def mma_candidates(tokens: int, n: int, k: int) -> list[LinearConfig]:
    """List the portable kernel's cuts, with and without prefetching."""
    plain = [config for config in candidates(Decode.NF4_TABLE, tokens, n, k) if not config.wgmma]
    if token_tiles_for(tokens) == 1:
        plain.append(LinearConfig(Decode.NF4_TABLE, 1, 2, 1, 8, 2, 3))
    return [replace(config, prefetch=p) for config in plain for p in ((0,) if config.resident else (0, 1))]


def family_candidates(family: str, tokens: int, n: int, k: int) -> list[LinearConfig]:
    if family == "mma":
        return mma_candidates(tokens, n, k)
    limit = nvrtc.shared_memory_limit()
    return [config for config in wgmma_candidates(Decode.NF4_TABLE, token_tiles_for(tokens)) if config.fits(k, limit)]


class Matrix:
    """One random matrix, its copies and inputs, and what a run of a configuration on it costs."""

    def __init__(self, n: int, k: int) -> None:
        self.weight, self.quantised = nf4_matrix(n, k)
        self.packed = pack_nf4([self.weight], torch.bfloat16)
        self.rounds, self.workspace = copies(self.packed), Workspace("cuda")
        self.x = torch.randn(64, k, device="cuda", dtype=torch.bfloat16)
        self.workspace.reserve(64 * 8 * (n + 256))

    def run(self, tokens: int, config: LinearConfig, weight: PackedLinear | None = None, **options: Any) -> Tensor:
        return run_linear(self.x[:tokens], weight or self.packed, config, self.workspace, **options)

    def time(self, tokens: int, config: LinearConfig, *, repeats: int = 3, load: Any = nvrtc.load_kernel) -> float:
        out = torch.empty(tokens, self.packed.n, device="cuda", dtype=torch.bfloat16)
        launch = lambda i: self.run(tokens, config, self.rounds[i % len(self.rounds)], out=out, load=load)  # noqa: E731
        return round(time_graph(launch, max(24, len(self.rounds)), repeats=repeats), 2)


def compile_search(report: Report) -> dict[str, int]:
    configs = [
        config
        for family in FAMILIES
        for n, k in MAIN
        for m in (8, 16, 32, 64)
        for config in family_candidates(family, m, n, k)
    ]
    return {"kernels": compile_configs(configs)}


def check(report: Report) -> dict[str, Any]:
    """Error against float64 beside bitsandbytes', and the numbers of rows and cuts whose bits differ."""
    results: dict[str, Any] = {}
    for n, k in [(4096, 4096), (1040, 11008)]:
        matrix = Matrix(n, k)
        want, bases = reference.linear(matrix.x, matrix.weight.dequantize()), {}
        entry = results[f"{n}x{k}"] = {}
        for family in FAMILIES:
            bases[family] = base = matrix.run(64, family_candidates(family, 64, n, k)[0])
            entry[family] = {"error": _error(base, want), "unequal": _unequal(matrix, family, base)}
        entry["families equal"] = torch.equal(*bases.values())
        entry["values that differ between families"] = int((bases["mma"] != bases["wgmma"]).sum())
        if matrix.quantised:
            entry["bitsandbytes"] = {m: _error(bnb_linear(matrix.x[:m], matrix.quantised), want[:m]) for m in (1, 32)}
    return results


def _error(out: Tensor, want: Tensor) -> float:
    return float((out.double() - want).norm() / want.norm())


def _unequal(matrix: Matrix, family: str, base: Tensor) -> list[str]:
    found = []
    for tokens in (1, 7, 8, 9, 16, 17, 31, 32, 33, 64):
        for config in family_candidates(family, tokens, matrix.packed.n, matrix.packed.k):
            out = torch.full((tokens, matrix.packed.n), torch.nan, dtype=torch.bfloat16, device="cuda")
            matrix.run(tokens, config, out=out)
            if not torch.equal(out, base[:tokens]):
                found.append(f"{tokens} rows, {cut(config)}: {int((out != base[:tokens]).sum())} values")
    return found[:40]


def search(tokens: int, shapes: list[tuple[int, int]] = MAIN) -> Callable[[Report], Any]:
    """Time all cuts for one number of rows; the fastest of each family goes to the report."""

    def part(report: Report) -> dict[str, Any]:
        results = {}
        for n, k in shapes:
            matrix, quicker = Matrix(n, k), None
            for family in FAMILIES:
                tries = family_candidates(family, tokens, n, k)
                if not tries:
                    continue
                timed = sorted(((matrix.time(tokens, config), config) for config in tries), key=lambda pair: pair[0])
                again = [(matrix.time(tokens, config, repeats=9), config) for _, config in timed[:4]]
                us, report.best[FAMILIES[family], n, k, tokens] = min(again, key=lambda pair: pair[0])
                fastest = (us, report.best[FAMILIES[family], n, k, tokens])
                quicker = min(quicker, fastest, key=lambda pair: pair[0]) if quicker else fastest
                results[f"{family} {n}x{k}"] = [[us, cut(config)] for us, config in again + timed[4:24]]
            report.best[BEST, n, k, tokens] = quicker[1]
        return results

    return part


def best(report: Report, family: str, n: int, k: int, tokens: int) -> LinearConfig:
    key = (FAMILIES[family], n, k, tokens)
    return report.best.get(key) or family_candidates(family, tokens, n, k)[0]


def table(report: Report) -> dict[str, Any]:
    """The best cut of each family by rows: microseconds in a chain and alone, bytes per second, what it takes."""
    results: dict[str, Any] = {}
    for n, k in MAIN + LAYER:
        matrix, rows = Matrix(n, k), {}
        for tokens in (1, 8, 16, 32, 64):
            for family in FAMILIES:
                config = best(report, family, n, k, tokens)
                us = matrix.time(tokens, config, repeats=9)
                kernel = nvrtc.load_kernel(*config.kernel(k, torch.bfloat16))
                rows[f"{tokens} {family}"] = {
                    "us": us, "us_alone": matrix.time(tokens, config, load=alone), "cut": cut(config),
                    "gb_s": round(matrix.packed.num_bytes / us / 1e3), "grid": config.grid(n),
                    **kernel.resources(config.threads, config.shared_bytes(k)), "shared": config.shared_bytes(k),
                }  # fmt: skip
        rows |= bnb_rows(matrix, n, k)
        results[f"{n}x{k}"] = rows
    return results


def bnb_rows(matrix: Matrix, n: int, k: int) -> dict[str, float | str]:
    """Microseconds of bitsandbytes, over as many matrices in turn as ours."""
    if not matrix.quantised:
        return {}
    quantised = bnb_copies(n, k)

    def measure(tokens: int) -> float:
        x = matrix.x[:tokens]
        launch = lambda i: bnb_linear(x, quantised[i % len(quantised)])  # noqa: E731
        return round(time_graph(launch, len(quantised), repeats=9), 2)

    return {f"{tokens} bitsandbytes": or_error(partial(measure, tokens)) for tokens in (1, 32)}


def without_stages(report: Report) -> dict[str, Any]:
    """Microseconds with a stage left out; and with 512 inputs alone: what a launch costs beside its main loop."""
    jobs = [
        (family, n, k, m, replace(best(report, family, n, k, m), ablate=bits))
        for family in FAMILIES for n, k in MAIN for m in (1, 32) for bits in (0, *STAGES.values())
    ]  # fmt: skip
    compile_configs(job[-1] for job in jobs)
    results: dict[str, Any] = {}
    matrices = {shape: Matrix(*shape) for shape in MAIN} | {(n, 512): Matrix(n, 512) for n in (4096, 11008)}
    names = {bits: name for name, bits in STAGES.items()} | {0: "nothing"}
    for family, n, k, tokens, config in jobs:
        row = results.setdefault(f"{family} {n}x{k} {tokens}", {})
        row[f"without {names[config.ablate]}"] = matrices[n, k].time(tokens, config, repeats=5)
        if not config.ablate and k == 4096:
            row["512 inputs"] = matrices[n, 512].time(tokens, config, repeats=5)
    return results


def steps(which: int) -> Callable[[Report], Any]:
    """The whole 7B-shaped step with one family's best cuts, and its parts."""

    def part(report: Report) -> dict[str, Any]:
        chosen, kept = {}, report.best
        for (family, n, k, rows), config in kept.items():
            if family == which:
                chosen[Decode.NF4_TABLE, n, k, rows] = config
        report.best = chosen
        try:
            return step_parts("7B")(report)
        finally:
            report.best = kept

    return part


def print_summary(report: Report) -> None:
    for shape, rows in report.parts.get("table", {}).items():
        for name, row in rows.items() if isinstance(rows, dict) else ():
            if isinstance(row, dict):
                taken = f"{row['registers']} registers, {row['spilled_bytes']} spilled, "
                taken += f"{row['blocks_per_multiprocessor']} blocks of {row['grid']}"
                print(
                    f"{shape} {name}: {row['us']}, alone {row['us_alone']}, {row['gb_s']} GB/s, {row['cut']}, {taken}"
                )
            else:
                print(f"{shape} {name}: {row}")
    for part in ("check", "without_stages", "step_best"):
        value = report.parts.get(part, {})
        for name, row in value.items() if isinstance(value, dict) else ():
            print(f"{part} {name}: {row}"[:900])
    for name, value in report.parts.items():
        if isinstance(value, dict) and "error" in value:
            print(f"FAILED {name}: {value['error'][:400]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--time-limit", type=float, default=330.0)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    report = Report(arguments.out, arguments.time_limit, "nf4_search")
    report.run("environment", environment)
    report.run("bandwidth", bandwidth)
    report.run("compile", compile_search)
    report.run("check", check, 0.4)
    for tokens in (32, 1, 8, 16, 64):
        report.run(f"search_{tokens}", search(tokens, MAIN + LAYER), 0.7)
    report.run("without_stages", without_stages, 0.75)
    report.run("step_best", steps(BEST), 0.85)
    report.run("table", table, 0.95)
    print_summary(report)


if __name__ == "__main__":
    main()
