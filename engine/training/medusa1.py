"""MEDUSA-1: train draft heads on a frozen backbone's hidden states.

The states are read from a cache, so an epoch costs the heads alone and several variants can share it. A batch is a set
of windows of the flat text; in each, the positions whose next two tokens are labels of one answer are trained on. The
schedule follows the larger of steps done and time used, so a run that hits its time limit has still cooled down.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.heads import HeadsConfig, MedusaHeads, seen_embeddings
from engine.training.checkpoint import load_checkpoint, save_checkpoint
from engine.training.dataset import HiddenCache
from engine.training.dense import TrainingModel
from engine.training.losses import IGNORED, head_loss

__all__ = ["HeadTrainer", "TrainingPlan", "Vocabulary", "build_heads"]

DEPTH_WEIGHT = 0.8  # head i counts 0.8^i (MEDUSA, section 2.2)


@dataclass(frozen=True)
class TrainingPlan:
    """How long and how fast to learn; `seconds` bounds the time of all starts of a run together."""

    epochs: float = 3.0
    seconds: float = float("inf")
    batch_tokens: int = 16384
    window: int = 256
    learning_rate: float = 1.5e-3
    warmup_steps: int = 100
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    checkpoint_seconds: float = 60.0
    report_seconds: float = 5.0
    seed: int = 0


class Vocabulary:
    """The draft vocabulary over one model: its `lm_head` rows and where each token stands in it.

    `rows` [draft vocab, hidden]; `place` int64 [vocab], IGNORED outside; `embeddings` [vocab, hidden]: seen by heads.
    """

    def __init__(self, model: TrainingModel, token_map: Tensor | None) -> None:
        weight = model.lm_head_weight
        self.token_map = None if token_map is None else token_map.to(weight.device)
        self.rows = weight if self.token_map is None else weight[self.token_map]
        ids = torch.arange(weight.shape[0], device=weight.device) if self.token_map is None else self.token_map
        self.place = torch.full((weight.shape[0],), IGNORED, dtype=torch.int64, device=weight.device)
        self.place[ids] = torch.arange(ids.numel(), device=weight.device)
        self.embeddings = seen_embeddings(model.embed(torch.arange(weight.shape[0], device=weight.device)))

    def seen_by(self, heads: MedusaHeads, head: int, tokens: Tensor, rows: Tensor) -> Tensor | None:
        """Return what `head` sees at `rows` of a text: [rows, num_seen, hidden], or None."""
        count = heads.config.num_seen(head)
        if count == 0:
            return None
        steps = torch.arange(1, count + 1, device=rows.device)
        return self.embeddings[tokens[(rows.unsqueeze(1) + steps).clamp(max=tokens.numel() - 1)]]

    def output_of(self, heads: MedusaHeads, head: int) -> Tensor:
        """Return the output matrix that `head` uses."""
        return heads.outputs[head].weight if heads.config.output.startswith("own") else self.rows


def build_heads(config: HeadsConfig, vocabulary: Vocabulary, seed: int = 0) -> MedusaHeads:
    """Return fresh heads on the vocabulary's device; own outputs begin as the backbone's rows."""
    torch.manual_seed(seed)
    heads = MedusaHeads(config, None if vocabulary.token_map is None else vocabulary.token_map.cpu())
    heads = heads.to(vocabulary.rows.device)
    if config.output.startswith("own"):
        for output in heads.outputs:
            output.weight.data.copy_(vocabulary.rows)
    return heads


@dataclass(frozen=True)
class _Batch:
    """Windows one behind the other: hidden [n, hidden], tokens [n]; `rows` to learn at and their runs of labels."""

    hidden: Tensor
    tokens: Tensor
    rows: Tensor
    run: Tensor


@dataclass
class _Sums:
    """Sums since the last report, by head, on the device."""

    loss: Tensor
    top1: Tensor
    top5: Tensor
    count: Tensor
    tokens: int = 0
    since: float = field(default_factory=time.monotonic)


class HeadTrainer:
    """One variant's training; `run` returns when the plan is done. Goes on from `checkpoint` where that exists."""

    def __init__(
        self,
        heads: MedusaHeads,
        vocabulary: Vocabulary,
        cache: HiddenCache,
        plan: TrainingPlan,
        checkpoint: Path | None = None,
    ) -> None:
        self.heads, self.vocabulary, self.cache, self.plan = heads, vocabulary, cache, plan
        self.checkpoint, self.device = checkpoint, cache.hidden.device
        self.optimizer = torch.optim.AdamW(
            heads.parameters(),
            lr=plan.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=plan.weight_decay,
            fused=self.device.type == "cuda",
        )
        self.halo = heads.config.num_heads + 1
        self.windows_per_step = max(1, plan.batch_tokens // plan.window)
        self.num_windows = max(1, cache.num_tokens // plan.window)
        self.steps_per_epoch = max(1, self.num_windows // self.windows_per_step)
        self.total_steps = max(1, math.ceil(plan.epochs * self.steps_per_epoch))
        self.step, self.elapsed = 0, 0.0
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))
        if checkpoint is not None and checkpoint.is_file():
            self.step, self.elapsed = load_checkpoint(checkpoint, heads, self.optimizer, self._settings())

    def run(self, report: Callable[[str], None]) -> dict[str, float]:
        """Train to the end of the plan; return the last report's figures."""
        start = time.monotonic() - self.elapsed
        saved, sums, figures = time.monotonic(), self._fresh_sums(), {}
        while True:
            self.elapsed = time.monotonic() - start
            share = max(self.step / self.total_steps, self.elapsed / self.plan.seconds)
            if (share >= 1 and sums.tokens) or time.monotonic() - sums.since > self.plan.report_seconds:
                figures = self._report(sums, share, report)
                sums = self._fresh_sums()
            if share >= 1:
                break
            self._set_rate(share)
            self._train_step(sums)
            self.step += 1
            if time.monotonic() - saved > self.plan.checkpoint_seconds:
                self._save()
                saved = time.monotonic()
        self._save()
        return figures

    def _train_step(self, sums: _Sums) -> None:
        batch = self._batch()
        if batch is None:  # nothing to learn from in these windows
            return
        loss = self._loss(batch, sums)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.heads.parameters(), self.plan.clip_norm)
        self.optimizer.step()
        sums.tokens += batch.tokens.numel()

    def _loss(self, batch: _Batch, sums: _Sums) -> Tensor:
        teacher = batch.hidden @ self.vocabulary.rows.T  # each position's own next-token scores [tokens, draft vocab]
        hidden = batch.hidden[batch.rows]
        total = torch.zeros((), device=self.device)
        for head in range(self.heads.config.num_heads):
            seen = self.vocabulary.seen_by(self.heads, head, batch.tokens, batch.rows)
            with torch.autocast(self.device.type, torch.bfloat16):
                features = self.heads.features(head, hidden, seen).to(batch.hidden.dtype)
            gold = self.vocabulary.place[batch.tokens[batch.rows + head + 2]]
            weight = (batch.run >= head + 2).float()
            output = self.vocabulary.output_of(self.heads, head)
            loss, rank = head_loss(features, output, teacher, batch.rows + head + 1, gold, weight)
            total = total + DEPTH_WEIGHT**head * loss / weight.sum().clamp(min=1)
            sums.loss[head] += loss.detach()
            sums.count[head] += weight.sum()
            sums.top1[head] += ((rank < 1) * weight).sum()
            sums.top5[head] += ((rank < 5) * weight).sum()
        return total

    def _batch(self) -> _Batch | None:
        cache, last = self.cache, self.cache.num_tokens - 1
        columns = torch.arange(self.plan.window + self.halo, device=self.device)
        starts = self._window_starts()
        index = (starts.unsqueeze(1) + columns).flatten()
        # A window's halo is read, not learnt at; nothing is learnt past the end of the text.
        may_learn = (columns < self.plan.window).repeat(starts.numel()) & (index < last)
        run = cache.run[(index + 1).clamp(max=last)].masked_fill(~may_learn, 0)
        rows = (run >= 2).nonzero().flatten()
        if rows.numel() == 0:
            return None
        index = index.clamp(max=last)
        return _Batch(cache.hidden[index], cache.tokens[index], rows, run[rows])

    def _window_starts(self) -> Tensor:
        epoch, place = divmod(self.step, self.steps_per_epoch)
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.plan.seed * 1000 + epoch)
            shift = int(torch.randint(self.plan.window, (1,), generator=generator)) if self.num_windows > 1 else 0
            starts = torch.randperm(self.num_windows, generator=generator) * self.plan.window + shift
            self._order = (epoch, starts.to(self.device))
        return self._order[1][place * self.windows_per_step : (place + 1) * self.windows_per_step]

    def _set_rate(self, share: float) -> None:
        warm = min(1.0, (self.step + 1) / self.plan.warmup_steps)
        rate = self.plan.learning_rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _report(self, sums: _Sums, share: float, report: Callable[[str], None]) -> dict[str, float]:
        count = sums.count.clamp(min=1)
        loss, top1, top5 = (part / count for part in (sums.loss, sums.top1, sums.top5))
        rate = sums.tokens / max(time.monotonic() - sums.since, 1e-9)
        by_head = " ".join(f"{one:.3f}/{five:.3f}" for one, five in zip(top1.tolist(), top5.tolist(), strict=True))
        report(
            f"step {self.step} of {self.total_steps} ({min(share, 1):.0%}), loss {loss.mean():.4f}, "
            f"top-1/top-5 by head {by_head}, {rate:,.0f} tokens/s"
        )
        return {"loss": float(loss.mean()), "tokens_per_second": rate, "epochs": self.step / self.steps_per_epoch}

    def _fresh_sums(self) -> _Sums:
        return _Sums(*torch.zeros(4, self.heads.config.num_heads, device=self.device))

    def _settings(self) -> dict[str, object]:
        timing = ("seconds", "checkpoint_seconds", "report_seconds")
        plan = {name: value for name, value in asdict(self.plan).items() if name not in timing}
        return {**plan, **self.heads.config.to_dict(), "tokens": self.cache.num_tokens}

    def _save(self) -> None:
        if self.checkpoint is not None:
            save_checkpoint(self.checkpoint, self.heads, self.optimizer, self.step, self.elapsed, self._settings())
