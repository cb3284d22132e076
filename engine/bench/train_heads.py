"""Make data, train a table of head variants, calibrate and evaluate them on one GPU, each phase inside a time limit.

    python -m engine.bench.train_heads distil --model M.gguf --data DIR --time-limit 560 --tokens 40000000
    python -m engine.bench.train_heads train --model M.gguf --data DIR --work DIR --out DIR --time-limit 560

Both phases go on where an earlier call stopped and save what they have when the time is up; the table comes last.
"""

import argparse
import json
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch

from engine.heads import HeadsConfig, MedusaHeads, parameter_count
from engine.models.heads_file import load_heads, save_heads
from engine.prefix_attention import PrefixConfig, middle_layers
from engine.training.batch_decoder import BatchDecoder
from engine.training.calibrate import Calibration, calibrate, tokens_per_step, write_calibration
from engine.training.chat_format import ChatFormat, read_chat_format
from engine.training.dataset import (
    HiddenCache,
    TextSet,
    build_cache,
    load_text,
    most_used_tokens,
    split_text,
)
from engine.training.dense import TrainingModel, load_model
from engine.training.dialogues import DialoguePlan, Script
from engine.training.distill import DistillGoal, distill, remember_queries
from engine.training.evaluate import evaluation_prompts, greedy_answers, kept_out_prompts
from engine.training.filters import QueryFilter
from engine.training.kernel_checks import check_kernels
from engine.training.medusa1 import PREFIX_WINDOW, HeadTrainer, TrainingPlan, Vocabulary, build_heads
from engine.training.ranks import measure_ranks
from engine.training.shards import ShardWriter

SIZES = (1, 2, 4, 8, 16, 32, 63)
PART_BYTES = 15 * 2**20

Report = Callable[[str], None]


@dataclass(frozen=True)
class Variant:
    """One row of the table; `share` is its part of the training time, `prefix` whether heads look back."""

    name: str
    shape: dict[str, object]
    share: float
    prefix: bool = False


VARIANTS = (
    Variant("prefix", {"num_layers": 2, "width": 2048, "sees": "path", "output": "truncated"}, 0.5, prefix=True),
    Variant("path", {"num_layers": 2, "width": 2048, "sees": "path", "output": "truncated"}, 0.5),
    Variant("root", {"num_layers": 2, "width": 2048, "sees": "root", "output": "truncated"}, 0.2),
    Variant("hidden", {"num_layers": 2, "width": 2048, "sees": "hidden", "output": "truncated"}, 0.16),
    Variant("paper", {"num_layers": 1, "width": None, "sees": "hidden", "output": "truncated"}, 0.14),
)


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    start = time.monotonic()

    def report(line: str) -> None:
        print(f"[{time.monotonic() - start:7.1f} s] {line}", file=sys.stderr, flush=True)

    torch.set_float32_matmul_precision("highest")
    model = load_model(args.model, args.device)
    report(f"{model.name} loaded on {args.device}")
    if args.device == "cuda":
        check_kernels(report)
    phase = run_distil if args.phase == "distil" else run_train
    phase(args, model, read_chat_format(model.tokenizer), report, lambda: args.time_limit - (time.monotonic() - start))
    return 0


def run_distil(
    args: argparse.Namespace, model: TrainingModel, chat: ChatFormat, report: Report, left: Callable[[], float]
) -> None:
    """Fill the data folder."""
    writer = ShardWriter(args.data, {"model": model.name}, args.shard_tokens)
    queries = QueryFilter(kept_out_prompts())
    if writer.num_shards:
        remember_queries(args.data, queries, model.tokenizer, chat)
    ends = sorted(model.tokenizer.end_token_ids)
    decoder = BatchDecoder(model.backbone, args.slots, args.capacity, ends, chat.default_opening)
    decoder.capture()
    report(f"{args.slots} slots of {args.capacity} tokens, step captured")
    plan = DialoguePlan(max_answer=args.max_answer)
    script = Script(model.tokenizer, chat, plan, queries, args.capacity, Random(args.seed + writer.num_shards))
    goal = DistillGoal(args.tokens, min(args.distil_seconds, left() - args.reserve))
    distill(decoder, script, writer, goal, report)
    if args.export is not None and writer.num_shards:
        export_data(args.data, args.export, report)
    totals = {name: sum(shard[name] for shard in writer.index["shards"]) for name in ("documents", "tokens", "labels")}
    print(json.dumps({"data": totals, "rejected_turns": script.num_rejected}))


def export_data(folder: Path, out: Path, report: Report, parts: int = 7, max_tokens: int = 40_000_000) -> None:
    """Pack the data small enough to be carried: ids in 16 bits, labels in one, deflated."""
    out.mkdir(parents=True, exist_ok=True)
    text = load_text(folder)
    groups = (text.lengths.cumsum(0) <= max_tokens).nonzero().flatten().chunk(parts)

    def pack(number: int) -> None:
        group = text.select(groups[number])
        np.savez_compressed(
            out / f"data-{number}.npz",
            tokens=group.tokens.numpy().astype(np.uint16),
            labels=np.packbits(group.labels.numpy()),
            lengths=group.lengths.numpy().astype(np.uint16),
            greedy=group.greedy.numpy(),
        )

    with ThreadPoolExecutor(parts) as pool:
        list(pool.map(pack, range(len(groups))))
    report(f"exported {sum(file.stat().st_size for file in out.glob('data-*.npz')) / 2**20:.1f} MiB")


def import_data(folder: Path) -> TextSet:
    """Read what `export_data` wrote."""
    parts = []
    for file in sorted(folder.glob("data-*.npz")):
        with np.load(file) as content:
            tokens = torch.from_numpy(content["tokens"].astype(np.int32))
            labels = torch.from_numpy(np.unpackbits(content["labels"], count=tokens.numel()))
            lengths = torch.from_numpy(content["lengths"].astype(np.int64))
            parts.append(TextSet(tokens, labels, lengths, torch.from_numpy(content["greedy"])))
    fields = ("tokens", "labels", "lengths", "greedy")
    return TextSet(*(torch.cat([getattr(part, name) for part in parts]) for name in fields))


def run_train(
    args: argparse.Namespace, model: TrainingModel, chat: ChatFormat, report: Report, left: Callable[[], float]
) -> None:
    """Train, calibrate and evaluate the variants."""
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    text = import_data(args.data) if any(args.data.glob("data-*.npz")) else load_text(args.data)
    train, held = split_text(text, min(args.held_back, text.num_documents // 10))
    if train.num_tokens > args.max_tokens:
        share = int(train.num_documents * args.max_tokens / train.num_tokens)
        train = train.select(torch.arange(share))
    vocab = model.backbone.config.vocab_size
    token_map = most_used_tokens(train, min(args.draft_vocab, vocab), vocab)
    vocabulary = Vocabulary(model, token_map)
    report(f"{train.num_documents:,} documents, {train.num_tokens:,} tokens; {held.num_documents:,} held back")
    prompts = evaluation_prompts()[: args.eval_prompts]
    evaluated = greedy_answers(model, chat, prompts, args.eval_tokens)
    report(f"{len(prompts)} evaluation prompts answered greedily, {evaluated.num_tokens:,} tokens")
    rows: list[dict[str, object]] = []
    wanted = args.variants.split(",")
    chosen = [variant for name in wanted for variant in VARIANTS if variant.name == name]
    layers = middle_layers(model.backbone.config) if any(variant.prefix for variant in chosen) else ()
    cache = build_cache(model, train, report=report, layers=layers)
    for place, variant in enumerate(chosen):
        share = variant.share / sum(later.share for later in chosen[place:])
        seconds = (left() - args.reserve) * share - args.evaluate_seconds
        if seconds < 5:
            report(f"no time left for {variant.name}")
            break
        heads, figures = train_variant(args, variant, vocabulary, cache, model, seconds, report)
        rows.append(finish_variant(args, variant, heads, figures, vocabulary, held, evaluated, model, report))
        (args.out / "results.json").write_text(json.dumps(rows, indent=1))
    carry(args, report)
    print_table(rows)


def train_variant(
    args: argparse.Namespace,
    variant: Variant,
    vocabulary: Vocabulary,
    cache: HiddenCache,
    model: TrainingModel,
    seconds: float,
    report: Report,
) -> tuple[MedusaHeads, dict[str, float]]:
    """Train one variant for at most `seconds`."""
    config = model.backbone.config
    shape = HeadsConfig(
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        num_heads=args.heads,
        draft_vocab=vocabulary.rows.shape[0],
        frequent_first=True,
        prefix=PrefixConfig.of(config) if variant.prefix else None,
        **variant.shape,  # type: ignore[arg-type]
    )
    heads = build_heads(shape, vocabulary)
    window = args.window if variant.prefix else TrainingPlan.window
    plan = TrainingPlan(epochs=args.epochs, seconds=seconds, learning_rate=args.learning_rate, window=window)
    report(f"{variant.name}: {parameter_count(heads):,} parameters, {seconds:.0f} s")
    checkpoint = args.work / f"{variant.name}.ckpt"
    trainer = HeadTrainer(heads, vocabulary, cache, plan, checkpoint)
    figures = trainer.run(lambda line: report(f"{variant.name}: {line}"))
    return heads, figures


def finish_variant(
    args: argparse.Namespace,
    variant: Variant,
    heads: MedusaHeads,
    figures: dict[str, float],
    vocabulary: Vocabulary,
    held: TextSet,
    evaluated: TextSet,
    model: TrainingModel,
    report: Report,
) -> dict[str, object]:
    """Save one variant as int8, then calibrate and evaluate what a reader of that file gets."""
    path = args.out / f"{variant.name}.safetensors"
    save_heads(path, heads, {"base_model": model.name}, storage="int8")
    heads = load_heads(path).to(model.device)
    ranks = measure_ranks(heads, build_cache(model, held, heads=heads), vocabulary)
    calibration = calibrate(ranks)
    write_calibration(path.with_suffix(".json"), calibration, {"heads": path.name})
    measured = measure_ranks(heads, build_cache(model, evaluated, heads=heads), vocabulary)
    steps = tokens_per_step(calibration.order, measured, SIZES)
    top1, top5 = ((measured.ranks < limit).float().mean(0).tolist() for limit in (1, 5))
    report(f"{variant.name}: tokens/step " + ", ".join(f"{n}: {v:.3f}" for n, v in zip(SIZES, steps, strict=True)))
    report(f"{variant.name}: {calibration.estimator}; {json.dumps(calibration.scores)}")
    return {
        "variant": variant.name,
        "shape": heads.config.to_dict(),
        "parameters": parameter_count(heads),
        **figures,
        "top1": top1,
        "top5": top5,
        "tokens_per_step": dict(zip(map(str, SIZES), steps, strict=True)),
        "held_back_tokens_per_step": {
            str(size): calibration.expected[size] for size in SIZES if _has(calibration, size)
        },
        "estimator_scores": calibration.scores,
        "file_bytes": path.stat().st_size,
    }


def _has(calibration: Calibration, size: int) -> bool:
    return size < len(calibration.expected)


def carry(args: argparse.Namespace, report: Report) -> None:
    """Cut the wanted heads into parts small enough to be returned; `cat` joins them."""
    for name in args.bring.split(","):
        path = args.out / f"{name}.safetensors"
        if not path.is_file() or path.stat().st_size <= PART_BYTES:
            continue
        content = path.read_bytes()
        for number, start in enumerate(range(0, len(content), PART_BYTES)):
            path.with_name(f"{path.name}.part{number}").write_bytes(content[start : start + PART_BYTES])
        path.unlink()
        report(f"{path.name} cut into {number + 1} parts")
    with tarfile.open(args.out / "reports.tar", "w") as archive:
        for path in sorted(args.out.glob("*.json")):
            archive.add(path, arcname=path.name)
            path.unlink()
    for path in args.out.glob("*.safetensors*"):
        if path.name.split(".")[0] not in args.bring.split(","):
            path.rename(args.work / path.name)


def print_table(rows: Sequence[dict]) -> None:
    """Print one line a variant."""
    sizes = "/".join(map(str, SIZES))
    print(f"variant | parameters | epochs | loss | tokens/s | top-1 by head | top-5 by head | tokens/step at {sizes}")
    for row in rows:
        top1, top5 = (" ".join(f"{value:.3f}" for value in row[name]) for name in ("top1", "top5"))
        steps = " / ".join(f"{value:.2f}" for value in row["tokens_per_step"].values())
        print(
            f"{row['variant']} | {row['parameters']:,} | {row.get('epochs', 0):.2f} | {row.get('loss', 0):.3f} | "
            f"{row.get('tokens_per_second', 0):,.0f} | {top1} | {top5} | {steps}"
        )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=("distil", "train"))
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--time-limit", type=float, default=560, help="seconds for the whole call")
    parser.add_argument("--reserve", type=float, default=20, help="seconds kept for writing at the end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=40_000_000)
    parser.add_argument("--distil-seconds", type=float, default=float("inf"))
    parser.add_argument("--slots", type=int, default=3072)
    parser.add_argument("--capacity", type=int, default=832)
    parser.add_argument("--max-answer", type=int, default=320)
    parser.add_argument("--shard-tokens", type=int, default=2_000_000)
    parser.add_argument("--export", type=Path)
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--variants", default=",".join(variant.name for variant in VARIANTS))
    parser.add_argument("--bring", default="path,root")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--window", type=int, default=PREFIX_WINDOW, help="tokens that a prefix attention learns over")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--draft-vocab", type=int, default=16384)
    parser.add_argument("--held-back", type=int, default=1500)
    parser.add_argument("--max-tokens", type=int, default=50_000_000, help="of the training text: GPU memory's limit")
    parser.add_argument("--eval-prompts", type=int, default=100)
    parser.add_argument("--eval-tokens", type=int, default=256)
    parser.add_argument("--evaluate-seconds", type=float, default=8)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
