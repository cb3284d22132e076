"""A suite's report as tables for people; no figures are made here, only laid out."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["report_text"]

_ALLOWED = 0.1  # memory beyond what is accounted for


def report_text(report: Mapping[str, Any]) -> str:
    """Return the report as plain text."""
    parts = [
        _head(report),
        _section("Answers", report["answers"], _answers),
        _section("Step time by tree size", report["tuning"], _tuning) if report["tuning"] else report["medusa"],
        _section("By length of the text before", report["contexts"], _contexts),
        _section("Memory", report["memory"], _memory),
        _section("Start", report["start"], _start),
    ]
    parts += [f"Left out: {name}. {reason}" for name, reason in report["left_out"].items()]
    return "\n\n".join(parts) + "\n"


def _head(report: Mapping[str, Any]) -> str:
    model, hardware = report["model"], report["hardware"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return (
        f"{model['name']}, {model['weights']}\n{hardware['device']}, {report['threads']} threads; {versions}; "
        f"{report['date']}"
    )


def _section(title: str, part: Any, lay_out: Any) -> str:
    if "error" in part:
        return f"{title}: this part failed. {part['error']}"
    return f"{title}\n{lay_out(part)}"


def _answers(part: Mapping[str, Any]) -> str:
    rows = []
    for name, figures in part["contenders"].items():
        speed, ratio = figures["tokens_per_second"], figures["over_medusa_off"]
        rows.append(
            (
                name,
                f"{speed['median']:.1f}",
                f"{speed['lowest']:.0f}-{speed['highest']:.0f}",
                f"{ratio['median']:.2f}x" if ratio else "-",
                f"{figures['tokens_per_step']:.2f}",
                f"{figures['step_ms']:.2f}",
                f"{figures['prefill_tokens_per_second']['median']:.0f}",
                str(speed["runs"]),
            )
        )
    head = ("", "tokens/s", "spread", "over off", "tokens/step", "step, ms", "prefill, tokens/s", "prompts")
    same = "no answer differs" if not part["answers_that_differ"] else f"{part['answers_that_differ']} ANSWERS DIFFER"
    note = (
        f"Medians of up to {part['prompts']} prompts x {part['max_tokens']} tokens, greedy, in turns; "
        f"with Medusa on and off {same}."
    )
    return f"{_table(head, rows)}\n{note}"


def _tuning(part: Mapping[str, Any]) -> str:
    times = {int(size): ms for size, ms in part["step_ms"].items()}  # JSON has turned sizes into text
    tokens = {int(size): value for size, value in part["tokens_per_step"].items()}
    depths = {int(size): str(depth) for size, depth in part.get("depths", {}).items()}  # older results lack them
    rows = []
    for size, ms in times.items():
        expected, gain = "-", "-"
        if size in tokens:
            expected, gain = f"{tokens[size]:.2f}", f"{tokens[size] * times[0] / ms:.2f}x"
        mark = " <- chosen" if size == part["chosen"] else ""
        row = (str(size), depths.get(size, "-"), f"{ms:.2f}", f"{ms / times[0]:.2f}x", expected, gain + mark)
        rows.append(row)
    head = ("drafted nodes", "depth", "step, ms", "to plain", "tokens/step", "expected gain")
    return f"{_table(head, rows)}\n{part['reason']}"


def _contexts(part: Mapping[str, Any]) -> str:
    tables = [
        _by_length(part, "first token, ms", lambda figures: f"{figures['first_token_ms']['median']:.0f}"),
        _by_length(part, "tokens/s", lambda figures: f"{figures['tokens_per_second']['median']:.0f}"),
    ]
    return "\n".join([*tables, *([part["left_out"]] if part["left_out"] else [])])


def _by_length(part: Mapping[str, Any], what: str, cell: Callable[[Mapping[str, Any]], str]) -> str:
    names = list(next(iter(part["lengths"].values()), {}))
    rows = []
    for length, by_name in part["lengths"].items():
        rows.append((f"{int(length):,}", *(cell(by_name[name]) if name in by_name else "-" for name in names)))
    return _table((f"tokens before: {what}", *names), rows)


def _memory(part: Mapping[str, Any]) -> str:
    rows = [(name, f"{size / 1e6:.1f}") for name, size in part["parts_bytes"].items()]
    for name, size in (("together", part["held_bytes"]), ("peak while answering", part["peak_bytes"])):
        rows.append((name, f"{size / 1e6:.1f}"))
    over = part["peak_over_held"]
    verdict = "within" if over <= 1 + _ALLOWED else "NOT within"
    return (
        f"{_table((part['where'], 'MB'), rows)}\nThe peak behind {part['context']:,} tokens is {over:.2f}x of what is "
        f"accounted for: {verdict} 10 %."
    )


def _start(part: Mapping[str, Any]) -> str:
    seconds = part["seconds_to_first_token"]
    return (
        f"From the start of a process to its first token: {seconds['median']:.2f} s "
        f"({seconds['lowest']:.2f}-{seconds['highest']:.2f})."
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = []
    for row in (head, *rows):
        others = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *others]).rstrip())
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)
