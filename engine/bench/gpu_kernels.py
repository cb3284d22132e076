"""Check and time the GPU kernels: `python -m engine.bench.gpu_kernels --out DIR --time-limit 280`.

Correctness first, then times from CUDA graphs over weights that do not fit the cache, beside bitsandbytes' NF4 and
16-bit `F.linear`. Every part stands alone: results are written after each, and a part that fails is reported.
"""

import argparse
from pathlib import Path

import torch

from engine.bench.gpu_linears import compile_all, correctness, short_correctness, time_shapes, tune_shapes
from engine.bench.gpu_report import Report, bandwidth, environment
from engine.bench.gpu_step import attention_times, small_ops, step_parts, whole_step

MAIN = [(4096, 4096), (11008, 4096), (4096, 11008)]
MORE = [(12288, 4096), (22016, 4096), (6144, 4096), (14336, 4096), (28672, 4096), (4096, 14336)]
SMALL = [(960, 576), (576, 576), (3072, 576), (576, 1536)]


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
    parser.add_argument("--short", action="store_true", help="NF4 and the 7B-shaped step alone, in about a minute")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    report = Report(arguments.out, arguments.time_limit)
    report.run("environment", environment)
    report.run("bandwidth", bandwidth)
    report.run("compile", compile_all)
    report.run("correctness", short_correctness if arguments.short else correctness)
    report.run("tune_main", tune_shapes(MAIN), 0.6)
    report.run("time_nf4_main", time_shapes(MAIN), 0.7)
    report.run("tune_more", tune_shapes(MORE[:2]), 0.75)
    report.run("step_7B_nf4", whole_step("7B"), 0.8)
    if arguments.short:
        print_table(report)
        return
    report.run("parts_7B_nf4", step_parts("7B"), 0.8)
    report.run("attention", attention_times, 0.8)
    report.run("small_ops", small_ops, 0.8)
    report.run("step_bundled_int8", whole_step("bundled", "int8"), 0.8)
    report.run("time_nf4_more", time_shapes(MORE), 0.9)
    report.run("time_nf4_small", time_shapes(SMALL), 0.9)
    report.run("step_8B_nf4", whole_step("8B"), 0.9)
    report.run("time_int8_main", time_shapes(MAIN, "int8", peers=False), 0.95)
    report.run("time_dense_lm_head", time_shapes([(49152, 576), (32000, 4096)], "dense"), 0.97)
    print_table(report)


if __name__ == "__main__":
    main()
