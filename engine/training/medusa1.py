"""MEDUSA-1: train draft heads on a frozen backbone's cached hidden states.

A batch is one run of consecutive tokens, so that the backbone's own distributions are computed once and every head
reads them shifted. User turns carry no labels; a batch without any is skipped. The schedule ends with the last step or
with the time allowed, whichever comes first, so that heads are always finished at a small learning rate.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from engine.heads import MedusaHeads, seen_embeddings
from engine.training.checkpoint import load_checkpoint, save_checkpoint
from engine.training.losses import head_weights, mixture_cross_entropy
from engine.training.states import StateCache

__all__ = ["HeadTraining", "HeadsObjective", "train_heads"]


@dataclass(frozen=True)
class HeadTraining:
    """How to train: `learning_rate` is the peak, reached after `warmup` steps; `seconds` bounds the whole run."""

    learning_rate: float = 1.5e-3
    epochs: float = 4
    batch_tokens: int = 16384
    warmup: int = 100
    weight_decay: float = 0.0
    decay: float = 0.8
    hard_share: float = 0.5
    seconds: float = math.inf
    seed: int = 0
    report_every: int = 50
    checkpoint_seconds: float = 60.0


class HeadsObjective(nn.Module):
    """The heads with all that their loss needs of the frozen backbone.

    `embedding` [vocab, hidden] and `output` [output_size, hidden] are the backbone's; `output` holds the draft
    vocabulary's rows of `lm_head` and gives the teacher's distribution for every kind of head.
    """

    def __init__(self, heads: MedusaHeads, embedding: Tensor, output: Tensor, settings: HeadTraining) -> None:
        super().__init__()
        self.heads, self.settings = heads, settings
        self._frozen = {"embedding": embedding, "output": output, "class_of": _class_of(heads, embedding)}

    def forward(self, cache: StateCache, start: int) -> tuple[Tensor, Tensor]:
        """Return the loss and, for each head, [labels, top-1 hits, top-5 hits, loss]: float32 [heads, 4]."""
        rows = min(self.settings.batch_tokens, cache.num_tokens - start - self.heads.config.num_heads - 1)
        anchors = cache.hidden[start : start + rows]
        tokens = cache.tokens[start : start + rows + self.heads.config.num_heads + 1]
        teacher = self._teacher(cache.hidden[start + 1 : start + rows + self.heads.config.num_heads])
        has_label = _labelled(cache, start, rows, self.heads.config.num_heads)
        losses, figures = [], []
        for head, share in enumerate(head_weights(self.heads.config.num_heads, self.settings.decay)):
            logits = self._logits(head, anchors, tokens)
            weights = has_label[head].float()
            classes = self._frozen["class_of"][tokens[head + 2 : head + 2 + rows]]
            loss = mixture_cross_entropy(
                logits, teacher[head : head + rows], classes, weights, self.settings.hard_share
            ) / weights.sum().clamp(min=1)
            losses.append(share * loss)
            figures.append(_figures(logits.detach(), classes, has_label[head], loss.detach()))
        return torch.stack(losses).sum(), torch.stack(figures)

    @torch.no_grad()
    def _teacher(self, hidden: Tensor) -> Tensor:
        return torch.softmax(hidden @ self._frozen["output"].t(), dim=-1)

    def _logits(self, head: int, anchors: Tensor, tokens: Tensor) -> Tensor:
        rows, count = anchors.shape[0], self.heads.config.num_seen(head)
        seen = None
        if count:
            embeddings = seen_embeddings(self._frozen["embedding"][tokens[1 : rows + count]])
            seen = torch.stack([embeddings[slot : slot + rows] for slot in range(count)], dim=1)
        with torch.autocast(anchors.device.type, dtype=torch.bfloat16):
            return self.heads.logits(head, self.heads.features(head, anchors, seen), self._shared_output)

    def _shared_output(self, features: Tensor) -> Tensor:
        return features @ self._frozen["output"].t()


def train_heads(
    objective: HeadsObjective,
    cache: StateCache,
    *,
    accelerator: Accelerator,
    checkpoint: Path | None,
    report: Callable[[str], None],
) -> list[dict[str, object]]:
    """Train in place and return the history of reported figures; resumes from `checkpoint` where it exists."""
    settings = objective.settings
    optimizer = torch.optim.AdamW(
        objective.heads.parameters(),
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        betas=(0.9, 0.95),
        fused=cache.hidden.device.type == "cuda",
    )
    clock = _Clock(settings, _steps_an_epoch(cache, settings))
    state = load_checkpoint(checkpoint, objective.heads, optimizer, asdict(settings) | {"seconds": None})
    step, spent, history = state.step, state.seconds, list(state.history)
    wrapped, optimizer = accelerator.prepare(objective, optimizer)
    began = saved = time.monotonic()
    window = torch.zeros(objective.heads.config.num_heads, 4, device=cache.hidden.device)
    for start in _starts(cache, settings, step, accelerator):
        seconds = spent + time.monotonic() - began
        if clock.progress(step, seconds) >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * clock.factor(step, seconds)
        if bool(_labelled(cache, start, *_shape(cache, start, objective)).any()):
            loss, figures = wrapped(cache, start)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(objective.heads.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            window += figures
        step += 1
        if step % settings.report_every == 0 or clock.progress(step, seconds) >= 1:
            history.append(_summary(window, step, clock.total, seconds, settings.batch_tokens))
            report(describe(history[-1]))
            window.zero_()
        if checkpoint and time.monotonic() - saved > settings.checkpoint_seconds and accelerator.is_main_process:
            save_checkpoint(checkpoint, objective.heads, optimizer, step, seconds, history, state.settings)
            saved = time.monotonic()
    if checkpoint and accelerator.is_main_process:
        seconds = spent + time.monotonic() - began
        save_checkpoint(checkpoint, objective.heads, optimizer, step, seconds, history, state.settings)
    return history


def describe(row: dict) -> str:
    """Return one live line."""
    top1, top5 = (" ".join(f"{value:.3f}" for value in row[name]) for name in ("top1", "top5"))
    return (
        f"step {row['step']:,}/{row['steps']:,}  loss {' '.join(f'{value:.3f}' for value in row['loss'])}  "
        f"top-1 {top1}  top-5 {top5}  {row['tokens_per_second']:,.0f} tokens/s"
    )


@dataclass(frozen=True)
class _Clock:
    """How far a run is, by steps or by time, and the learning rate's share of its peak there."""

    settings: HeadTraining
    steps_an_epoch: int

    @property
    def total(self) -> int:
        return max(1, math.ceil(self.steps_an_epoch * self.settings.epochs))

    def progress(self, step: int, seconds: float) -> float:
        return max(step / self.total, seconds / self.settings.seconds)

    def factor(self, step: int, seconds: float) -> float:
        warm = min(1.0, (step + 1) / max(1, self.settings.warmup))
        return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, self.progress(step, seconds)))))


def _starts(cache: StateCache, settings: HeadTraining, skip: int, accelerator: Accelerator) -> Iterator[int]:
    """First tokens of the batches, epoch after epoch, each shuffled and cut at another offset; `skip` were done."""
    size = settings.batch_tokens
    number = 0
    epoch = 0
    while True:
        generator = torch.Generator().manual_seed(settings.seed * 1000 + epoch)
        offset = int(torch.randint(0, size, (1,), generator=generator)) if cache.num_tokens > 4 * size else 0
        starts = torch.arange(0, _steps_an_epoch(cache, settings)) * size + offset
        for start in starts[torch.randperm(len(starts), generator=generator)].tolist():
            number += 1
            if number > skip and number % accelerator.num_processes == accelerator.process_index:
                yield min(start, cache.num_tokens - objective_margin(size, cache))
        epoch += 1


def objective_margin(size: int, cache: StateCache) -> int:
    """Tokens that the last batch keeps from the end, so that it is full where the data allows."""
    return min(size + 16, cache.num_tokens)


def _steps_an_epoch(cache: StateCache, settings: HeadTraining) -> int:
    return max(1, cache.num_tokens // settings.batch_tokens)


def _shape(cache: StateCache, start: int, objective: HeadsObjective) -> tuple[int, int]:
    heads = objective.heads.config.num_heads
    return min(objective.settings.batch_tokens, cache.num_tokens - start - heads - 1), heads


def _labelled(cache: StateCache, start: int, rows: int, num_heads: int) -> Tensor:
    """Where each head has a label: the root and the label are the model's own, in one document; bool [heads, rows]."""
    last = start + rows
    document, is_answer = cache.document, cache.is_answer
    root = is_answer[start + 1 : last + 1] & (document[start + 1 : last + 1] == document[start:last])
    shifted = [slice(start + 2 + head, last + 2 + head) for head in range(num_heads)]
    return torch.stack([root & is_answer[at] & (document[at] == document[start:last]) for at in shifted])


def _class_of(heads: MedusaHeads, embedding: Tensor) -> Tensor:
    """Class of every token id in the heads' output, -1 for tokens that are none; int64 [vocab]."""
    if heads.token_map is None:
        return torch.arange(embedding.shape[0], device=embedding.device)
    classes = torch.full((embedding.shape[0],), -1, dtype=torch.int64, device=embedding.device)
    classes[heads.token_map.to(embedding.device)] = torch.arange(heads.token_map.numel(), device=embedding.device)
    return classes


def _figures(logits: Tensor, classes: Tensor, has_label: Tensor, loss: Tensor) -> Tensor:
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices == classes.unsqueeze(1)
    top1, top5 = (best[:, 0] & has_label).sum(), (best.any(dim=1) & has_label).sum()
    count = has_label.sum()
    return torch.stack([count.float(), top1.float(), top5.float(), loss.float() * count])


def _summary(window: Tensor, step: int, steps: int, seconds: float, batch_tokens: int) -> dict[str, object]:
    counts = window[:, 0].clamp(min=1)
    top1, top5, loss = ((window[:, column] / counts).tolist() for column in (1, 2, 3))
    speed = step * batch_tokens / max(seconds, 1e-9)
    return {
        "step": step,
        "steps": steps,
        "loss": loss,
        "top1": top1,
        "top5": top5,
        "seconds": seconds,
        "tokens_per_second": speed,
    }
