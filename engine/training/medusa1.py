"""MEDUSA-1: train draft heads on a frozen backbone's hidden states.

The states are read from a cache, so an epoch costs the heads alone and several variants can share it. A batch is a set
of windows of the flat text; in each, the positions whose next two tokens are labels of one answer are trained on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.heads import HeadsConfig, MedusaHeads, seen_embeddings
from engine.training.dataset import HiddenCache
from engine.training.dense import TrainingModel
from engine.training.loop import TrainingLoop, TrainingPlan
from engine.training.losses import IGNORED, head_loss

__all__ = ["HeadBatch", "HeadSums", "HeadTrainer", "TrainingPlan", "Vocabulary", "build_heads", "heads_loss"]

DEPTH_WEIGHT = 0.8  # head i counts 0.8^i (MEDUSA, section 2.2)


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

    def output_of(self, heads: MedusaHeads, head: int, shared: Tensor | None = None) -> Tensor:
        """Return the output matrix that `head` uses; `shared` stands in for the vocabulary's own rows."""
        if heads.config.output.startswith("own"):
            return heads.outputs[head].weight
        return self.rows if shared is None else shared


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
class HeadBatch:
    """Text one behind the other: hidden [n, hidden], tokens [n]; `rows` to learn at and their runs of labels."""

    hidden: Tensor
    tokens: Tensor
    rows: Tensor
    run: Tensor


class HeadSums:
    """Sums since the last report, by head, on the device."""

    def __init__(self, num_heads: int, device: torch.device) -> None:
        self.loss, self.top1, self.top5, self.count = torch.zeros(4, num_heads, device=device)
        self.tokens = 0

    def add(self, head: int, loss: Tensor, rank: Tensor, weight: Tensor) -> None:
        """Count one head's rows: their summed loss, their ranks, and the weight of each."""
        self.loss[head] += loss.detach()
        self.count[head] += weight.sum()
        self.top1[head] += ((rank < 1) * weight).sum()
        self.top5[head] += ((rank < 5) * weight).sum()

    def figures(self, seconds: float) -> dict[str, float]:
        """Return mean loss and rate."""
        loss = self.loss / self.count.clamp(min=1)
        return {"loss": float(loss.mean()), "tokens_per_second": self.tokens / max(seconds, 1e-9)}

    def by_head(self) -> str:
        """Return top-1/top-5 accuracy of each head."""
        top1, top5 = ((part / self.count.clamp(min=1)).tolist() for part in (self.top1, self.top5))
        return " ".join(f"{one:.3f}/{five:.3f}" for one, five in zip(top1, top5, strict=True))


def heads_loss(
    heads: MedusaHeads,
    vocabulary: Vocabulary,
    batch: HeadBatch,
    teacher: Tensor,
    sums: HeadSums,
    shared: Tensor | None = None,
) -> Tensor:
    """Return the sum over heads of 0.8^i times the mean loss of head i.

    teacher [n, draft vocab]: each position's own next-token scores. `shared` [draft vocab, hidden] stands in for the
    vocabulary's rows where `lm_head` learns too. Differentiable in the heads, `batch.hidden` and `shared`.
    """
    hidden, last = batch.hidden[batch.rows], batch.tokens.numel() - 1
    total = torch.zeros((), device=hidden.device)
    for head in range(heads.config.num_heads):
        seen = vocabulary.seen_by(heads, head, batch.tokens, batch.rows)
        with torch.autocast(hidden.device.type, torch.bfloat16):
            features = heads.features(head, hidden, seen).to(hidden.dtype)
        gold = vocabulary.place[batch.tokens[(batch.rows + head + 2).clamp(max=last)]]
        weight = (batch.run >= head + 2).float()
        output = vocabulary.output_of(heads, head, shared)
        teacher_rows = (batch.rows + head + 1).clamp(max=last)
        loss, rank = head_loss(features, output, teacher, teacher_rows, gold, weight)
        total = total + DEPTH_WEIGHT**head * loss / weight.sum().clamp(min=1)
        sums.add(head, loss, rank, weight)
    return total


class HeadTrainer(TrainingLoop):
    """One variant's training. Goes on from `checkpoint` where that exists."""

    def __init__(
        self,
        heads: MedusaHeads,
        vocabulary: Vocabulary,
        cache: HiddenCache,
        plan: TrainingPlan,
        checkpoint: Path | None = None,
    ) -> None:
        self.heads, self.vocabulary, self.cache = heads, vocabulary, cache
        self.halo = heads.config.num_heads + 1
        self.windows_per_step = max(1, plan.batch_tokens // plan.window)
        self.num_windows = max(1, cache.num_tokens // plan.window)
        groups = [(list(heads.parameters()), 1.0)]
        super().__init__(heads, groups, plan, self.num_windows // self.windows_per_step, checkpoint)
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))
        self._sums = HeadSums(heads.config.num_heads, self.device)
        self.resume({**heads.config.to_dict(), "tokens": cache.num_tokens})

    def train_step(self, share: float) -> bool:
        batch = self._batch()
        if batch is None:  # nothing to learn from in these windows
            return False
        teacher = batch.hidden @ self.vocabulary.rows.T
        self.apply_gradients(heads_loss(self.heads, self.vocabulary, batch, teacher, self._sums))
        self._sums.tokens += batch.tokens.numel()
        return True

    def report(self, share: float, seconds: float, report: Callable[[str], None]) -> dict[str, float]:
        sums, self._sums = self._sums, HeadSums(self.heads.config.num_heads, self.device)
        figures = sums.figures(seconds)
        report(
            f"step {self.step} of {self.total_steps} ({min(share, 1):.0%}), loss {figures['loss']:.4f}, "
            f"top-1/top-5 by head {sums.by_head()}, {figures['tokens_per_second']:,.0f} tokens/s"
        )
        return {**figures, "epochs": self.step / self.steps_per_epoch}

    def _batch(self) -> HeadBatch | None:
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
        return HeadBatch(cache.hidden[index], cache.tokens[index], rows, run[rows])

    def _window_starts(self) -> Tensor:
        epoch, place = divmod(self.step, self.steps_per_epoch)
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.plan.seed * 1000 + epoch)
            shift = int(torch.randint(self.plan.window, (1,), generator=generator)) if self.num_windows > 1 else 0
            starts = torch.randperm(self.num_windows, generator=generator) * self.plan.window + shift
            self._order = (epoch, starts.to(self.device))
        return self._order[1][place * self.windows_per_step : (place + 1) * self.windows_per_step]
