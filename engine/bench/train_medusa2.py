"""MEDUSA-2 against MEDUSA-1 on one GPU: from the same heads, for the same time, with the backbone's quality measured.

    python -m engine.bench.train_medusa2 run --data DIR --out DIR --time-limit 530
    python -m engine.bench.train_medusa2 fold --parts DIR --out FOLDER

`run` trains both ways from the bundled heads, then as many joint runs with other values of lambda0 as fit. Every phase
has its own time and may fail without losing the others. `fold` makes a model folder of what `run` brought back.
"""

import argparse
import json
import sys
import tarfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from engine.backbone import BackboneWeights, LayerWeights
from engine.bench.train_heads import PART_BYTES, SIZES, import_data
from engine.block_weights import DenseWeight, quantize_q4
from engine.heads import MedusaHeads
from engine.models.heads_file import load_heads, save_heads
from engine.models.loader import bundled_heads_path
from engine.nested_tree import tree_file
from engine.training.calibrate import Calibration, calibrate, tokens_per_step, write_calibration
from engine.training.chat_format import read_chat_format
from engine.training.dataset import TextSet, build_cache, load_text, split_text
from engine.training.dense import TrainingModel, dense_backbone, load_model
from engine.training.evaluate import evaluation_prompts, greedy_answers
from engine.training.joint_quality import compare
from engine.training.joint_result import HEADS_FILE, adapter_tensors, merged_model, merged_weights, save_model
from engine.training.kernel_checks import check_kernels
from engine.training.lora import LoraAdapters
from engine.training.medusa1 import PREFIX_WINDOW, HeadTrainer, TrainingPlan, Vocabulary
from engine.training.medusa2 import JointPlan, JointTrainer
from engine.training.ranks import measure_ranks

BEST = "joint"  # the run that is brought back
ADAPTERS = "adapters.safetensors"
EVALUATION_SECONDS = 20.0  # kept free after each training

Report = Callable[[str], None]


@dataclass(frozen=True)
class Texts:
    """What to train on, and what nobody trained on: greedy and sampled conversations, and answers to the prompts."""

    train: TextSet
    greedy: TextSet
    sampled: TextSet
    answers: TextSet


class Bench:
    """The state that the phases share; results are written after each of them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.start = args, time.monotonic()
        args.out.mkdir(parents=True, exist_ok=True)
        torch.set_float32_matmul_precision("highest")
        self.model = load_model(args.model, args.device)
        self.chat = read_chat_format(self.model.tokenizer)
        self.report(f"{self.model.name} loaded on {args.device}")
        if args.device == "cuda":
            check_kernels(self.report)
        self.results: dict[str, object] = {"about": about(args), "rows": [], "failures": {}}
        self.texts = self._texts()

    def report(self, line: str) -> None:
        print(f"[{time.monotonic() - self.start:7.1f} s] {line}", file=sys.stderr, flush=True)

    def left(self) -> float:
        return self.args.time_limit - (time.monotonic() - self.start)

    def heads(self) -> MedusaHeads:
        """Return a fresh copy of the heads that all runs start from."""
        return load_heads(self.args.heads).to(self.model.device)

    def phase(self, name: str, run: Callable[[], None]) -> None:
        """Run one phase; a failure is recorded and the next phase goes on."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            run()
        except Exception as error:
            self.report(f"{name} failed: {traceback.format_exc()}")
            self.results["failures"][name] = f"{type(error).__name__}: {error}"  # type: ignore[index]
        (self.args.out / "results.json").write_text(json.dumps(self.results, indent=1))

    def add(self, row: dict[str, object]) -> None:
        self.results["rows"].append(row)  # type: ignore[attr-defined]

    def _texts(self) -> Texts:
        args = self.args
        text = import_data(args.data) if any(args.data.glob("data-*.npz")) else load_text(args.data)
        train, greedy = split_text(text, min(args.held_back, text.num_documents // 10))
        sampled = (~train.greedy).nonzero().flatten()[-max(1, min(args.held_sampled, text.num_documents // 20)) :]
        kept = torch.ones(train.num_documents, dtype=torch.bool)
        kept[sampled] = False
        chosen = kept.nonzero().flatten()
        if args.max_tokens < train.num_tokens:
            chosen = chosen[torch.randperm(chosen.numel(), generator=torch.Generator().manual_seed(3))]
            chosen = chosen[train.lengths[chosen].cumsum(0) <= args.max_tokens]
        greedy = greedy.select(torch.arange(min(args.calibrate_on, greedy.num_documents)))
        answers = greedy_answers(self.model, self.chat, evaluation_prompts()[: args.eval_prompts], args.eval_tokens)
        texts = Texts(train.select(chosen), greedy, train.select(sampled), answers)
        self.report(
            f"{texts.train.num_documents:,} conversations, {texts.train.num_tokens:,} tokens to train on; "
            f"{greedy.num_documents:,} greedy and {texts.sampled.num_documents:,} sampled ones held back; "
            f"{args.eval_prompts} prompts answered"
        )
        return texts


def run(args: argparse.Namespace) -> None:
    """Train and measure everything that fits into the time."""
    bench = Bench(args)
    bench.phase("start", lambda: measure(bench, "start", bench.model, bench.heads(), {}))
    if args.device == "cuda":
        bench.phase("profile", lambda: profile(bench))
    bench.phase(BEST, lambda: train_joint(bench, BEST, args.lambda0, args.joint_seconds))
    bench.phase("medusa1", lambda: train_single(bench, args.joint_seconds))
    for place, lambda0 in enumerate(args.sweep):
        others = len(args.sweep) - place
        seconds = min(args.sweep_seconds, (bench.left() - args.reserve) / others - EVALUATION_SECONDS)
        if seconds < 10:
            bench.report(f"no time left for lambda0 {lambda0}")
            break
        name = f"joint, lambda0 {lambda0}"
        bench.phase(
            name, lambda name=name, lambda0=lambda0, seconds=seconds: train_joint(bench, name, lambda0, seconds)
        )
    pack(args.out, [ADAPTERS, HEADS_FILE, tree_file(Path(HEADS_FILE)).name])
    print_table(bench.results["rows"])  # type: ignore[arg-type]


def train_joint(bench: Bench, name: str, lambda0: float, seconds: float) -> None:
    """Train backbone and heads together from the start heads, then measure."""
    args, heads = bench.args, bench.heads()
    vocabulary = Vocabulary(bench.model, heads.token_map)
    plan = JointPlan(
        epochs=args.epochs,
        seconds=seconds,
        batch_tokens=args.batch_tokens,
        learning_rate=args.learning_rate,
        lambda0=lambda0,
        ramp=args.ramp,
    )
    trainer = JointTrainer(bench.model, heads, vocabulary, bench.texts.train, plan)
    try:
        figures = trainer.run(lambda line: bench.report(f"{name}: {line}"))
        tuned, weights = merged_model(bench.model), merged_weights(bench.model)
    finally:
        trainer.adapters.take_out(bench.model.backbone)
    figures |= {"lambda0": lambda0, "seconds": round(seconds), "steps": trainer.step, **peak_memory()}
    if name == BEST:
        save_file(adapter_tensors(trainer.adapters), bench.args.out / ADAPTERS)
        save_heads(bench.args.out / HEADS_FILE, heads, {"base_model": "tuned"}, storage="int8")
    calibration = measure(bench, name, tuned, heads, figures)
    if name == BEST:
        path = tree_file(bench.args.out / HEADS_FILE)
        write_calibration(path, calibration, {"heads": HEADS_FILE, "model": "tuned"})
        rounded = TrainingModel(
            tuned.name,
            dense_backbone(tuned.backbone.config, in_four_bits(weights), args.device, tuned.backbone.cos.dtype),
            tuned.tokenizer,
            tuned.path,
        )
        measure(bench, f"{name}, rounded to 4 bits again", rounded, heads, {})


def train_single(bench: Bench, seconds: float) -> None:
    """Train the heads alone from the same start for the same time, the backbone's forward over the text included."""
    args, start, heads = bench.args, time.monotonic(), bench.heads().requires_grad_(True)
    vocabulary = Vocabulary(bench.model, heads.token_map)
    chosen = bench.texts.train.lengths.cumsum(0) <= args.cache_tokens
    text = bench.texts.train.select(chosen.nonzero().flatten())
    layers = () if heads.prefix is None else heads.prefix.config.layers
    cache = build_cache(bench.model, text, report=bench.report, layers=layers)
    rest = max(5.0, seconds - (time.monotonic() - start))
    plan = TrainingPlan(epochs=1e6, seconds=rest, batch_tokens=args.batch_tokens, learning_rate=args.single_rate)
    if heads.prefix is not None:
        plan = replace(plan, window=PREFIX_WINDOW)
    trainer = HeadTrainer(heads, vocabulary, cache, plan)
    figures = trainer.run(lambda line: bench.report(f"medusa1: {line}"))
    del cache, trainer.cache
    measure(bench, "medusa1", bench.model, heads, figures | {"seconds": round(seconds), "steps": trainer.step})


def measure(
    bench: Bench, name: str, model: TrainingModel, heads: MedusaHeads, figures: dict[str, float]
) -> Calibration:
    """Calibrate on the held-back text, then count tokens per step on the model's own answers to the prompts."""
    args, texts = bench.args, bench.texts
    vocabulary = Vocabulary(model, heads.token_map)
    calibration = calibrate(measure_ranks(heads, build_cache(model, texts.greedy, heads=heads), vocabulary))
    is_original = model is bench.model
    prompts = evaluation_prompts()[: args.eval_prompts]
    answers = texts.answers if is_original else greedy_answers(model, bench.chat, prompts, args.eval_tokens)
    row: dict[str, object] = {"run": name, **figures, "estimator": calibration.estimator}
    for label, text in (("own answers", answers), ("original's answers", texts.answers)):
        measured = measure_ranks(heads, build_cache(model, text, heads=heads), vocabulary)
        steps = tokens_per_step(calibration.order, measured, SIZES)
        top1, top5 = ((measured.ranks < limit).float().mean(0).tolist() for limit in (1, 5))
        row[label] = {"tokens_per_step": dict(zip(map(str, SIZES), steps, strict=True)), "top1": top1, "top5": top5}
        if is_original:
            break
    row["answers"] = text_figures(answers)
    if not is_original:
        for label, text in (("greedy", texts.greedy), ("sampled", texts.sampled), ("prompts", texts.answers)):
            row[f"quality, {label}"] = compare(bench.model, model, text).to_dict()
        same = answers.lengths.numel() == texts.answers.lengths.numel()
        row["identical_answers"] = identical(answers, texts.answers) if same else None
    bench.add(row)
    bench.report(f"{name}: {json.dumps(row)}")
    return calibration


def text_figures(text: TextSet) -> dict[str, float]:
    """Return what a collapse into repetition would show in: answer length and the share of distinct tokens."""
    answers = [
        part[mask.bool()] for part, mask in zip(*(split(text, name) for name in ("tokens", "labels")), strict=True)
    ]
    lengths = [answer.numel() for answer in answers]
    distinct = [answer.unique().numel() / max(1, answer.numel()) for answer in answers]
    return {"mean_length": sum(lengths) / len(lengths), "mean_distinct_share": sum(distinct) / len(distinct)}


def identical(ours: TextSet, theirs: TextSet) -> float:
    """Return the share of documents that are the same token for token."""
    pairs = zip(split(ours, "tokens"), split(theirs, "tokens"), strict=True)
    return sum(torch.equal(one, other) for one, other in pairs) / ours.num_documents


def split(text: TextSet, field: str) -> tuple[torch.Tensor, ...]:
    return getattr(text, field).split(text.lengths.tolist())


def in_four_bits(weights: BackboneWeights) -> BackboneWeights:
    """Round the layers' matrices as the app's int4 does with a plain model folder."""
    parts = ("query", "key", "value", "attention_output", "gate", "up", "down")
    layers = [
        LayerWeights(
            **{part: DenseWeight(quantize_q4(getattr(layer, part).values.cpu()).dequantize()) for part in parts},
            attention_norm=layer.attention_norm,
            mlp_norm=layer.mlp_norm,
        )
        for layer in weights.layers
    ]
    return BackboneWeights(weights.embedding, layers, weights.norm, weights.lm_head)


def profile(bench: Bench) -> None:
    """Record where a joint step's GPU time goes."""
    heads = bench.heads()
    vocabulary = Vocabulary(bench.model, heads.token_map)
    text = bench.texts.train.select(torch.arange(min(2000, bench.texts.train.num_documents)))
    plan = JointPlan(batch_tokens=bench.args.batch_tokens, warmup_steps=100)
    trainer = JointTrainer(bench.model, heads, vocabulary, text, plan)
    try:
        for trainer.step in range(4):
            trainer.train_step(0.5)
        torch.cuda.synchronize()
        start = time.monotonic()
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiler:
            for trainer.step in range(4, 8):
                trainer.train_step(0.5)
            torch.cuda.synchronize()
        seconds = time.monotonic() - start
    finally:
        trainer.adapters.take_out(bench.model.backbone)
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)
    busy = sum(event.self_device_time_total for event in events) / 1e6
    bench.results["profile"] = {
        "seconds": seconds,
        "gpu_busy_seconds": busy,
        "tokens": trainer._sums.tokens / 2,
        "kernels": [
            [event.key[:90], event.count, round(event.self_device_time_total / 1e3, 2)] for event in events[:25]
        ],
    }
    bench.report(f"profile of 4 steps: {json.dumps(bench.results['profile'])}")


def peak_memory() -> dict[str, float]:
    return {"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if torch.cuda.is_available() else {}


def about(args: argparse.Namespace) -> dict[str, object]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    return {"hardware": device, "torch": torch.__version__, "settings": settings}


def pack(out: Path, names: Iterable[str]) -> None:
    """Put the files that exist into one archive, cut into parts small enough to be carried."""
    archive = out / "model.tar"
    with tarfile.open(archive, "w") as tar:
        for name in names:
            if (out / name).is_file():
                tar.add(out / name, arcname=name)
                (out / name).unlink()
    content = archive.read_bytes()
    archive.unlink()
    for number, start in enumerate(range(0, len(content), PART_BYTES)):
        (out / f"model.tar.part{number}").write_bytes(content[start : start + PART_BYTES])


def fold(args: argparse.Namespace) -> None:
    """Join the parts, put the adapters into the model and write the folder."""
    args.out.mkdir(parents=True, exist_ok=True)
    parts = sorted(args.parts.glob("model.tar.part*"))
    archive = args.out / "model.tar"
    archive.write_bytes(b"".join(part.read_bytes() for part in parts))
    with tarfile.open(archive) as tar:
        tar.extractall(args.out, filter="data")
    archive.unlink()
    model = load_model(args.model, "cpu")
    adapters = LoraAdapters(model.backbone)
    factors = args.out / ADAPTERS
    adapters.load_state_dict({name: tensor.float() for name, tensor in load_file(factors).items()})
    factors.unlink()
    save_model(args.out, model, merged_weights(model), load_heads(args.out / HEADS_FILE))
    print(f"Wrote {args.out}.")


def print_table(rows: Sequence[dict]) -> None:
    """Print one line a run."""
    print(f"run | tokens/step at {'/'.join(map(str, SIZES))} | KL | same best | perplexity, sampled (original)")
    for row in rows:
        steps = " / ".join(f"{value:.2f}" for value in row["own answers"]["tokens_per_step"].values())
        quality = row.get("quality, sampled")
        kept = "-"
        if quality:
            kept = (
                f"{quality['kl']:.4f} | {quality['same_best']:.2%} | {quality['perplexity_tuned']:.3f} "
                f"({quality['perplexity_original']:.3f})"
            )
        print(f"{row['run']} | {steps} | {kept}")


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    {"run": run, "fold": fold}[args.phase](args)
    return 0


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=("run", "fold"))
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--parts", type=Path, default=Path("out"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--heads", type=Path, default=bundled_heads_path())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--time-limit", type=float, default=530, help="seconds for the whole call")
    parser.add_argument("--reserve", type=float, default=10, help="seconds kept for writing at the end")
    parser.add_argument("--joint-seconds", type=float, default=150, help="of the main joint run and of medusa1")
    parser.add_argument(
        "--sweep", type=lambda text: [float(part) for part in text.split(",") if part], default=[1.0, 0.02]
    )
    parser.add_argument("--sweep-seconds", type=float, default=60)
    parser.add_argument("--lambda0", type=float, default=0.2)
    parser.add_argument("--ramp", type=float, default=0.25)
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="of the backbone; heads four times that")
    parser.add_argument("--single-rate", type=float, default=1.5e-3, help="of medusa1")
    parser.add_argument("--batch-tokens", type=int, default=16384)
    parser.add_argument("--max-tokens", type=int, default=50_000_000, help="of the training text")
    parser.add_argument("--cache-tokens", type=int, default=30_000_000, help="of these, for medusa1")
    parser.add_argument("--held-back", type=int, default=1500, help="greedy conversations nobody trains on")
    parser.add_argument("--calibrate-on", type=int, default=700, help="of these, for calibration and quality")
    parser.add_argument("--held-sampled", type=int, default=500)
    parser.add_argument("--eval-prompts", type=int, default=100)
    parser.add_argument("--eval-tokens", type=int, default=256)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
