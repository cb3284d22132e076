"""README's table of figures, written from the kept results: `python -m engine.bench.readme_table`.

Nothing in that table is typed by hand: each file under results/ that is known here gives its rows. With --check the
README is only compared; exit code 1 where it differs.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["BEGIN", "END", "figures_table", "main", "with_table"]

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).resolve().parents[2] / "README.md"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
Report = dict[str, Any]


class Row(NamedTuple):
    """One line of the table; `command` is how to get the figure again."""

    what: str
    figure: str
    where: str
    command: str


def bench(report: Report) -> Iterator[Row]:
    """Rows of `launcher.py bench --peers --out`."""
    where = f"{report['hardware']['device']}, {report['date']}"
    command = "python launcher.py bench --peers"
    yield from _speed_rows(report, where, command)
    yield from _context_rows(report["contexts"], where, command)
    start, memory = report["start"], report["memory"]
    if "error" not in start:
        seconds = start["seconds_to_first_token"]["median"]
        yield Row("start of a process to its first token", f"{seconds:.1f} s", where, command)
    if "error" not in memory:
        yield Row(
            f"peak {memory['where']} behind {memory['context']:,} tokens / accounted for (weights, cache, heads)",
            f"{memory['peak_bytes'] / 1e6:.0f} / {memory['held_bytes'] / 1e6:.0f} MB",
            where,
            command,
        )


def bench_of_others(report: Report) -> Iterator[Row]:
    """Rows of the other programs alone: the engine's own on a GPU come from `gpu_engine`."""
    where = f"{report['hardware']['device']}, {report['date']}"
    rows = list(_speed_rows(report, where, "python launcher.py bench --peers"))
    yield from (row._replace(what=f"bundled model {row.what.removeprefix('the same ')}") for row in rows[1:])


def heads(report: Report) -> Iterator[Row]:
    """Rows of the heads' training."""
    where, command = f"{report['hardware'].split(',')[0]}, {report['date']}", "python -m engine.bench.train_heads"
    bundled = report["bundled"]
    steps = bundled["tokens_per_step"]
    figure = " / ".join(f"{steps[size]:.2f}" for size in ("1", "2", "4", "8", "16", "63"))
    what = "tokens per step of the bundled heads with 1 / 2 / 4 / 8 / 16 / 63 drafted nodes, greedy, unseen prompts"
    yield Row(what, figure, f"{bundled['hardware']}, {bundled['date']}", command)
    kept = report["distillation"]["kept_tokens_per_second"]
    yield Row("self-made training text", f"{kept:,} kept tokens/s", where, command)


def kernels(report: Report) -> Iterator[Row]:
    """Rows of the GPU kernels."""
    about = report["environment"]
    where, command = f"{about['gpu']}, {about['date']}", "python launcher.py bench --kernels"
    for shape, rows in report["time_nf4_main"].items():
        ours = " / ".join(f"{rows[count]['us']:.1f}" for count in ("1", "8", "32"))
        theirs = f"bitsandbytes, 1 row: {rows['1']['bnb_us']:.1f} µs"
        what = f"NF4 linear {shape.replace('x', ' x ')}, 1 / 8 / 32 rows ({theirs})"
        yield Row(what, f"{ours} µs", where, command)
    step = report["step_7B_nf4"]
    figure = " / ".join(f"{step[count]['ms']:.2f}" for count in ("1", "8", "32"))
    what = "projection: whole step of 7B shapes, NF4, random weights, 1 / 8 / 32 nodes"
    yield Row(what, f"{figure} ms", where, command)


def gpu_engine(report: Report) -> Iterator[Row]:
    """Rows of the engine on a GPU, a weight format each."""
    about = report["environment"]
    where, command = f"{about['gpu']}, {about['date']}", "python -m engine.bench.gpu_engine"
    for name, part in report.items():
        if not (name.endswith(" toggle") and isinstance(part, dict) and "on_over_off" in part):
            continue
        differ = sum(len(rows) for rows in part["differ"].values())
        same = "same tokens" if not differ else f"{differ} answers differ"
        speeds, best = part["tokens_per_second"], str(part["best"])
        kind = name.removesuffix(" toggle")
        what = f"bundled model, {kind}, Medusa off / on with {best} nodes ({same})"
        yield Row(what, f"{speeds['0']:.0f} / {speeds[best]:.0f} tokens/s", where, command)
        yield from _gpu_identity(report, kind, where, command)
        yield from _gpu_contexts(report, kind, where, command)


def _gpu_identity(report: Report, kind: str, where: str, command: str) -> Iterator[Row]:
    part = report.get(f"{kind} toggle 80", {})
    if "differ" in part:
        sizes = [size for size in part["differ"] if size != "0"]
        differ = sum(len(part["differ"][size]) for size in sizes)
        what = f"greedy answers that Medusa changes, {kind}: {part['prompts']} prompts x 256 tokens, trees of "
        what += f"{', '.join(sizes)} drafted nodes; off / on with {part['best']}"
        speeds = part["tokens_per_second"]
        figure = f"{differ} of {part['prompts'] * len(sizes)}; "
        figure += f"{speeds['0']:.0f} / {speeds[str(part['best'])]:.0f} tokens/s"
        yield Row(what, figure, where, command)


def _gpu_contexts(report: Report, kind: str, where: str, command: str) -> Iterator[Row]:
    rows = report.get(f"{kind} contexts", {})
    if rows and "error" not in rows:
        shown = " / ".join(f"{int(length):,}" for length in rows)
        figure = " / ".join(f"{row['first_token_ms']:.0f}" for row in rows.values())
        yield Row(f"time to the first token of a prompt of {shown} tokens, {kind}", f"{figure} ms", where, command)


def identity(report: Report) -> Iterator[Row]:
    """Row of the greedy toggle's comparison."""
    where, model = f"{report['hardware']['device']}, {report['date']}", report["model"]
    rows = report["by_drafted_nodes"]
    sizes = " and ".join(rows)
    compared = sum(row["tokens_compared"] for row in rows.values())
    count = report["prompts"] * len(rows)
    what = (
        f"greedy answers that Medusa changes, {model['name']}, {model['weights']}: {report['prompts']} prompts x "
        f"{report['max_tokens']} tokens, trees of {sizes} nodes"
    )
    figure = f"{report['answers_that_differ']} of {count} ({compared:,} tokens)"
    yield Row(what, figure, where, "python -m engine.bench.identity --out")


def page(report: Report) -> Iterator[Row]:
    """Rows of what the page costs; that file keeps no date."""
    where, command, frames = report["machine"]["cpu"], "python tests/page_cost.py --out", report["frames"]
    speed = frames["answer"].split()[0]
    what = f"frames while an answer of {speed} tokens/s streams into {frames['messages']} messages beside a tree of "
    what += f"{frames['tree_nodes']} nodes, 50th / 95th percentile"
    yield Row(what, f"{frames['p50_ms']:.1f} / {frames['p95_ms']:.1f} ms", where, command)
    speeds = report["engine"]["tokens_per_second"]
    what = "the engine alone / in the app / with headless Chromium painting on the same two cores "
    what += f"({report['engine']['chromium_cores']:.2f} of them)"
    figure = " / ".join(f"{speeds[name]:.0f}" for name in ("alone", "app", "browser"))
    yield Row(what, f"{figure} tokens/s", where, command)


READERS: tuple[tuple[str, Callable[[Report], Iterator[Row]]], ...] = (
    ("bench_cpu*.json", bench),
    ("bench_cuda*.json", bench_of_others),
    ("identity_*.json", identity),
    ("gpu_engine*.json", gpu_engine),
    ("gpu_kernels*.json", kernels),
    ("train_heads*.json", heads),
    ("page_cost*.json", page),
)


def figures_table(folder: Path = RESULTS) -> str:
    """Return the table in Markdown; a file that holds no such figures gives no rows."""
    lines = ["| what | figure | measured on | command, results |", "|---|---|---|---|"]
    for pattern, reader in READERS:
        for path in sorted(folder.glob(pattern)):
            report = json.loads(path.read_text(encoding="utf-8"))
            for row in reader(report):
                link = f"`{row.command}`, [results](engine/bench/results/{path.name})"
                lines.append(f"| {row.what} | {row.figure} | {row.where} | {link} |")
    return "\n".join(lines)


def with_table(readme: str, table: str) -> str:
    """Return the text with the table between its markers; raises ValueError where they are missing."""
    before, found, rest = readme.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not found or not ended:
        raise ValueError(f"README.md holds no place for the figures; write {BEGIN} and {END} on two lines of it.")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only")
    args = parser.parse_args(argv)
    readme = README.read_text(encoding="utf-8")
    wanted = with_table(readme, figures_table())
    if args.check:
        return int(readme != wanted)
    README.write_text(wanted, encoding="utf-8")
    return 0


def _speed_rows(report: Report, where: str, command: str) -> Iterator[Row]:
    answers, model = report["answers"], report["model"]
    speeds = {name: row["tokens_per_second"]["median"] for name, row in answers["contenders"].items()}
    library = [name for name in speeds if name.startswith("transformers")]
    others = [name for name in speeds if name not in library]
    about = f"medians of {answers['prompts']} prompts; {_sameness(answers)}"
    yield Row(
        f"{model['name']}, {model['weights']}: {' / '.join(others)} ({about})",
        " / ".join(f"{speeds[name]:.0f}" for name in others) + " tokens/s",
        where,
        command,
    )
    if library:
        yield Row(
            f"the same in transformers' `generate`: {' / '.join(_short(name) for name in library)}",
            " / ".join(f"{speeds[name]:.0f}" for name in library) + " tokens/s",
            where,
            command,
        )


def _context_rows(contexts: Report, where: str, command: str) -> Iterator[Row]:
    if "error" in contexts or not contexts["lengths"]:
        return
    lengths, names = list(contexts["lengths"]), list(next(iter(contexts["lengths"].values())))
    shown = " / ".join(f"{int(length):,}" for length in lengths)
    own = [name for name in names if name.startswith("Medusa")]
    first = " / ".join(f"{contexts['lengths'][n][own[0]]['first_token_ms']['median']:,.0f}" for n in lengths)
    yield Row(f"time to the first token of a prompt of {shown} tokens", f"{first} ms", where, command)
    for name in names:
        rows = [contexts["lengths"][length].get(name) for length in lengths]
        speed = " / ".join(f"{row['tokens_per_second']['median']:.0f}" if row else "-" for row in rows)
        yield Row(f"decode speed behind {shown} tokens, {_short(name)}", f"{speed} tokens/s", where, command)


def _short(name: str) -> str:
    return name.removeprefix("transformers ")


def _sameness(answers: Report) -> str:
    differ = answers["answers_that_differ"]
    return f"{differ} answers differ with Medusa" if differ else "the same tokens with Medusa on and off"


if __name__ == "__main__":
    sys.exit(main())
