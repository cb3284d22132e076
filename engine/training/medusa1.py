"""MEDUSA-1: train draft heads on a frozen backbone's hidden states.

The states are read from a cache, so an epoch costs the heads alone and several variants can share it. A batch is a set
of windows of the flat text; in each, the positions whose next two tokens are labels of one answer are trained on.
A loss is divided by the labels of the whole step, so parts of a step that several processes take sum up to it.
"""

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import InvalidParameterError
from engine.heads import HeadsConfig, MedusaHeads, seen_embeddings
from engine.training.dataset import HiddenCache
from engine.training.dense import TrainingModel
from engine.training.loop import TrainingLoop, TrainingPlan
from engine.training.losses import IGNORED, head_loss
from engine.training.prefix_states import begin_scaled, end_scaled, heads_states
from engine.training.processes import ALONE, Processes
from engine.training.windows import HeadBatch, Lanes, WindowBatches

__all__ = [
    "PREFIX_WINDOW",
    "HeadBatch",
    "HeadSums",
    "HeadTrainer",
    "TrainingPlan",
    "Vocabulary",
    "build_heads",
    "count_labels",
    "heads_loss",
]

ROWS = 8192  # of the cache's states in float32 at a time
PREFIX_WINDOW = 1024  # tokens of a window where a prefix attention learns to look back
DEPTH_WEIGHT = 0.8  # head i counts 0.8^i (MEDUSA, section 2.2)


class Vocabulary:
    """The draft vocabulary over one model: its `lm_head` rows and where each token stands in it.

    `rows` [draft vocab, hidden]; `place` int64 [vocab], IGNORED outside; `embeddings` [vocab, hidden]: seen by heads.
    `backbone` is the model's, whose positions a prefix attention shares.
    """

    def __init__(self, model: TrainingModel, token_map: Tensor | None) -> None:
        weight = model.lm_head_weight
        self.backbone = model.backbone
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

    def first(self, count: int) -> "Vocabulary":
        """Return the vocabulary of the first `count` draft tokens, to measure heads whose outputs are cut there."""
        cut = copy(self)
        assert self.token_map is not None, "without a draft vocabulary there is no order of use"
        cut.token_map, cut.rows = self.token_map[:count], self.rows[:count]
        cut.place = torch.where(self.place < count, self.place, IGNORED)
        return cut

    def output_of(self, heads: MedusaHeads, head: int, shared: Tensor | None = None) -> Tensor:
        """Return the output matrix that `head` uses; `shared` stands in for the vocabulary's own rows."""
        if heads.config.output.startswith("own"):
            return heads.outputs[head].weight[: self.rows.shape[0]]
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


class HeadSums:
    """Sums since the last report, by head, on the device."""

    def __init__(self, num_heads: int, device: torch.device) -> None:
        self._sums = torch.zeros(4, num_heads, dtype=torch.float64, device=device)
        self.loss, self.top1, self.top5, self.count = self._sums
        self.tokens = 0

    def add_up(self, processes: Processes) -> None:
        """Sum over all processes."""
        processes.add_up(self._sums)
        self.tokens = int(processes.add_up(torch.tensor(self.tokens, device=self._sums.device)))

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
        """Return the loss and the top-1/top-5 accuracy of each head, as the end of a line."""
        parts = (self.loss, self.top1, self.top5)
        loss, top1, top5 = ((part / self.count.clamp(min=1)).tolist() for part in parts)
        ranks = " ".join(f"{one:.3f}/{five:.3f}" for one, five in zip(top1, top5, strict=True))
        return f"by head {' '.join(f'{value:.3f}' for value in loss)}, top-1/top-5 by head {ranks}"


def count_labels(run: Tensor, shortest: int, longest: int) -> Tensor:
    """Return how many positions have a run of at least `shortest` .. `longest` labels, float32 [that many]."""
    lengths = torch.arange(shortest, longest + 1, device=run.device)
    return (run.unsqueeze(1) >= lengths).sum(0).float()


def heads_loss(
    heads: MedusaHeads,
    vocabulary: Vocabulary,
    batch: HeadBatch,
    teacher: Tensor,
    sums: HeadSums,
    shared: Tensor | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """Return the sum over heads of 0.8^i times the mean loss of head i.

    teacher [n, draft vocab]: each position's own next-token scores. `shared` [draft vocab, hidden] stands in for the
    vocabulary's rows where `lm_head` learns too. `counts` [heads] are the labels that the means are taken over, of the
    whole step where this batch is a part of it. Differentiable in the heads, `batch.hidden` and `shared`.
    """
    hidden, last = batch.hidden[batch.rows], batch.tokens.numel() - 1
    total = torch.zeros((), device=hidden.device)
    if counts is None:
        counts = count_labels(batch.run, 2, heads.config.num_heads + 1)
    for head in range(heads.config.num_heads):
        seen = vocabulary.seen_by(heads, head, batch.tokens, batch.rows)
        with torch.autocast(hidden.device.type, torch.bfloat16, enabled=hidden.dtype == torch.bfloat16):
            features = heads.features(head, hidden, seen).to(hidden.dtype)
        gold = vocabulary.place[batch.tokens[(batch.rows + head + 2).clamp(max=last)]]
        weight = (batch.run >= head + 2).float()
        output = vocabulary.output_of(heads, head, shared)
        teacher_rows = (batch.rows + head + 1).clamp(max=last)
        loss, rank = head_loss(features, output, teacher, teacher_rows, gold, weight)
        total = total + DEPTH_WEIGHT**head * loss / counts[head].clamp(min=1)
        sums.add(head, loss, rank, weight)
    return total


class HeadTrainer(TrainingLoop):
    """One variant's training, on a cache or on a process's lanes. Goes on from `checkpoint` where that exists."""

    def __init__(
        self,
        heads: MedusaHeads,
        vocabulary: Vocabulary,
        text: HiddenCache | Lanes,
        plan: TrainingPlan,
        checkpoint: Path | None = None,
        processes: Processes = ALONE,
    ) -> None:
        lanes = Lanes.of(text) if isinstance(text, HiddenCache) else text
        self.heads, self.vocabulary, self.cache = heads.requires_grad_(True), vocabulary, lanes.cache
        windows_per_step = max(1, plan.batch_tokens // plan.window)
        halo = heads.config.num_heads + 1
        self.batches = WindowBatches(lanes, plan.window, windows_per_step, halo, plan.seed)
        if heads.prefix is not None:  # before the optimiser takes the parameters
            begin_scaled(heads.prefix, self._features(), processes)
        groups = [(list(heads.parameters()), 1.0)]
        super().__init__(heads, groups, plan, self.batches.num_steps, checkpoint, processes)
        self._sums = HeadSums(heads.config.num_heads, self.device)
        self.resume({**heads.config.to_dict(), "tokens": lanes.num_tokens, "quantize": lanes.quantize})

    def run(self, report: Callable[[str], None]) -> dict[str, float]:
        figures = super().run(report)
        if self.heads.prefix is not None:
            end_scaled(self.heads.prefix)
        return figures

    def train_step(self, share: float) -> bool:
        batch = self.batches.batch(self.step)
        run = self.cache.run[:0] if batch is None else batch.run
        counts = self.processes.add_up(count_labels(run, 2, self.heads.config.num_heads + 1))
        if not bool(counts[0]):  # nothing to learn from in these windows
            return False
        self.apply_gradients(None if batch is None else self._loss(batch, counts), self.heads.parameters())
        return True

    def _loss(self, batch: HeadBatch, counts: Tensor) -> Tensor:
        teacher = batch.hidden @ self.vocabulary.rows.T
        self._sums.tokens += batch.tokens.numel()
        return heads_loss(self.heads, self.vocabulary, self._read(batch), teacher, self._sums, counts=counts)

    def _read(self, batch: HeadBatch) -> HeadBatch:
        """Return a batch whose hidden states are what heads read; a prefix attention looks back within windows."""
        if self.heads.prefix is None or batch.middle is None:
            return batch
        length = self.batches.window + self.batches.halo
        hidden, middle = (part.unflatten(0, (-1, length)) for part in (batch.hidden, batch.middle))
        read = heads_states(self.heads.prefix, self.vocabulary.backbone, hidden, middle)
        return replace(batch, hidden=read.flatten(0, 1))

    def _features(self) -> Iterator[Tensor]:
        """Yield the features of all tokens, [rows, features x hidden]."""
        hidden, middle = self.cache.hidden, self.cache.middle
        if middle is None:
            raise InvalidParameterError(
                "A prefix attention learns from middle layers; build the lanes with its layers."
            )
        for ours, theirs in zip(hidden.split(ROWS), middle.split(ROWS), strict=True):
            yield torch.cat([ours.float(), theirs.float()], dim=-1)

    def report(self, share: float, seconds: float, report: Callable[[str], None]) -> dict[str, float]:
        sums, self._sums = self._sums, HeadSums(self.heads.config.num_heads, self.device)
        sums.add_up(self.processes)
        figures = sums.figures(seconds)
        report(
            f"step {self.step} of {self.total_steps} ({min(share, 1):.0%}), loss {figures['loss']:.4f}, "
            f"{sums.by_head()}, {figures['tokens_per_second']:,.0f} tokens/s"
        )
        return {**figures, "epochs": self.step / self.steps_per_epoch}
