"""Variants of draft heads at equal budgets: each sees the same tokens once, in the same batches, at the same rates.

    python -m engine.bench.heads_variants --data DIR --out DIR --time-limit 300

For each: parameters, bytes that a draft of depth i reads, training tokens/s, accuracies, and tokens per step on prompts
that nobody trained on, from int8 storage as users have it. A variant that fails is recorded and the others go on.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from engine.bench.train_heads import import_data
from engine.heads import HeadsConfig, MedusaHeads, parameter_count
from engine.models.heads_file import load_heads, save_heads
from engine.training.calibrate import calibrate, tokens_per_step
from engine.training.chat_format import read_chat_format
from engine.training.dataset import HiddenCache, TextSet, build_cache, load_text, most_used_tokens, split_text
from engine.training.dense import TrainingModel, load_model
from engine.training.evaluate import evaluation_prompts, greedy_answers
from engine.training.medusa1 import HeadTrainer, TrainingPlan, Vocabulary, build_heads
from engine.training.ranks import measure_ranks

SIZES = (1, 2, 3, 4, 8, 16, 63)

Report = Callable[[str], None]


@dataclass(frozen=True)
class Variant:
    """One row of the table: what differs from the bundled heads' shape."""

    name: str
    changes: dict[str, object] = field(default_factory=dict)


BUNDLED = {
    "num_heads": 4,
    "num_layers": 2,
    "width": 2048,
    "sees": "path",
    "output": "truncated",
    "draft_vocab": 16384,
    "frequent_first": True,
}
PAPER = {"num_layers": 1, "width": None, "sees": "hidden"}
VARIANTS = (
    Variant("path (bundled)"),
    Variant("root", {"sees": "root"}),
    Variant("hidden", {"sees": "hidden"}),
    Variant("paper block", PAPER),
    Variant("paper block, own output", {**PAPER, "output": "own_truncated"}),
    Variant("8k vocabulary", {"draft_vocab": 8192}),
    Variant("1 block", {"num_layers": 1}),
    Variant("3 blocks", {"num_layers": 3}),
    Variant("width 1024", {"width": 1024}),
    Variant("5 heads", {"num_heads": 5}),
    Variant("own output", {"output": "own_truncated"}),
)


@dataclass
class Bench:
    """What all variants share."""

    args: argparse.Namespace
    model: TrainingModel
    train: HiddenCache
    held: HiddenCache
    evaluated: HiddenCache
    text: TextSet
    report: Report

    def measure(self, variant: Variant) -> dict[str, object]:
        """Train one variant, store it as int8, calibrate and evaluate what a reader of the file gets."""
        config = self.model.backbone.config
        shape: dict[str, object] = {**BUNDLED, **variant.changes}
        shape["draft_vocab"] = min(int(str(shape["draft_vocab"])), config.vocab_size)
        vocab = most_used_tokens(self.text, int(str(shape["draft_vocab"])), config.vocab_size)
        vocabulary = Vocabulary(self.model, vocab)
        heads_config = HeadsConfig(hidden_size=config.hidden_size, vocab_size=config.vocab_size, **shape)  # type: ignore[arg-type]
        heads = build_heads(heads_config, vocabulary)
        plan = TrainingPlan(epochs=1, learning_rate=self.args.learning_rate, batch_tokens=self.args.batch_tokens)
        started = time.monotonic()
        figures = HeadTrainer(heads, vocabulary, self.train, plan).run(lambda line: None)
        seconds = time.monotonic() - started
        path = self.args.out / "variant.safetensors"
        save_heads(path, heads, {"base_model": self.model.name}, storage="int8")
        stored, size = load_heads(path).to(self.model.device), path.stat().st_size
        path.unlink()
        calibration = calibrate(measure_ranks(stored, self.held, vocabulary))
        ranks = measure_ranks(stored, self.evaluated, vocabulary)
        steps = tokens_per_step(calibration.order, ranks, SIZES)
        top1, top5 = ((ranks.ranks < limit).float().mean(0).tolist() for limit in (1, 5))
        return {
            "variant": variant.name,
            "shape": heads_config.to_dict(),
            "parameters": parameter_count(heads),
            "file_bytes": size,
            "bytes_by_depth": bytes_by_depth(heads),
            "seconds": round(seconds, 1),
            **figures,
            "top1": top1,
            "top5": top5,
            "tokens_per_step": dict(zip(map(str, SIZES), steps, strict=True)),
        }


def bytes_by_depth(heads: MedusaHeads) -> list[int]:
    """Return what drafting reads for each depth, in int8: the head's own weights and its output rows."""
    config = heads.config
    shared = 0 if config.output.startswith("own") else config.output_size * config.hidden_size
    total = parameter_count(heads)
    each = [parameter_count(head) for head in heads.heads]  # type: ignore[arg-type]
    own = (total - sum(each)) // len(each)
    return [size + own + shared for size in each]


def prepare(args: argparse.Namespace, report: Report) -> Bench:
    """Load the model, take the first `--tokens` of the text, answer the evaluation prompts."""
    model = load_model(args.model, args.device)
    chat = read_chat_format(model.tokenizer)
    text = import_data(args.data) if any(args.data.glob("data-*.npz")) else load_text(args.data)
    train, held = split_text(text, min(args.held_back, text.num_documents // 10))
    order = torch.randperm(train.num_documents, generator=torch.Generator().manual_seed(1))
    train = train.select(order[train.lengths[order].cumsum(0) <= args.tokens])
    answers = greedy_answers(model, chat, evaluation_prompts()[: args.eval_prompts], args.eval_tokens)
    report(f"{train.num_documents:,} conversations, {train.num_tokens:,} tokens, each seen once by each variant")
    caches = (build_cache(model, part) for part in (train, held, answers))
    return Bench(args, model, *caches, train, report)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all variants; return the exit status."""
    args = arguments(argv)
    start = time.monotonic()

    def report(line: str) -> None:
        print(f"[{time.monotonic() - start:7.1f} s] {line}", file=sys.stderr, flush=True)

    args.out.mkdir(parents=True, exist_ok=True)
    bench = prepare(args, report)
    about = {
        "hardware": torch.cuda.get_device_name() if args.device == "cuda" else "CPU",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "tokens": bench.train.num_tokens,
        "batch_tokens": args.batch_tokens,
        "learning_rate": args.learning_rate,
        "eval_prompts": args.eval_prompts,
    }
    rows: list[dict[str, object]] = []
    slowest = 0.0
    for variant in VARIANTS:
        before = time.monotonic()
        if before - start + 1.2 * slowest > args.time_limit:
            rows.append({"variant": variant.name, "skipped": "no time left"})
        else:
            rows.append(attempt(bench, variant))
        slowest = max(slowest, time.monotonic() - before)
        report(json.dumps(rows[-1])[:600])
        (args.out / "heads_variants.json").write_text(json.dumps({"about": about, "variants": rows}, indent=1))
    print_table(rows)
    return 0


def attempt(bench: Bench, variant: Variant) -> dict[str, object]:
    """Measure one variant, or say why that failed."""
    try:
        return bench.measure(variant)
    except Exception as error:  # one variant must not cost the others
        return {"variant": variant.name, "error": f"{type(error).__name__}: {error}"}


def print_table(rows: Sequence[dict]) -> None:
    """Print one line a variant."""
    print(f"variant | parameters | file MB | training tokens/s | loss | tokens/step at {'/'.join(map(str, SIZES))}")
    for row in rows:
        if "tokens_per_step" not in row:
            print(f"{row['variant']} | {row.get('error') or row.get('skipped')}")
            continue
        steps = " / ".join(f"{value:.3f}" for value in row["tokens_per_step"].values())
        megabytes, rate = row["file_bytes"] / 1e6, row["tokens_per_second"]
        print(f"{row['variant']} | {row['parameters']:,} | {megabytes:.1f} | {rate:,.0f} | {row['loss']:.3f} | {steps}")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--time-limit", type=float, default=300)
    parser.add_argument("--tokens", type=int, default=12_000_000)
    parser.add_argument("--batch-tokens", type=int, default=16384)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--held-back", type=int, default=1500)
    parser.add_argument("--eval-prompts", type=int, default=100)
    parser.add_argument("--eval-tokens", type=int, default=256)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
