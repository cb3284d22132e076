"""MEDUSA-2: train the backbone (through adapters) and its draft heads together (arXiv 2401.10774, section 2.2.2).

The backbone's loss is its divergence from itself with the adapters switched off, on answers it wrote, so it may move
only where that changes little of what it says. The heads' loss reaches it through the hidden states, times lambda0.
First the heads may learn alone; then lambda0 rises along a quarter of a sine.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine.errors import InvalidParameterError
from engine.heads import MedusaHeads
from engine.training.dataset import TextSet
from engine.training.dense import TrainingModel, attend_causal
from engine.training.joint_batches import DocumentBatches, PaddedBatch
from engine.training.joint_loss import divergence
from engine.training.loop import TrainingLoop, TrainingPlan
from engine.training.lora import LoraAdapters
from engine.training.medusa1 import HeadBatch, HeadSums, Vocabulary, count_labels, heads_loss
from engine.training.prefix_states import begin_scaled, end_scaled, heads_states, middle_features
from engine.training.processes import ALONE, Processes

__all__ = ["JointPlan", "JointTrainer"]

SAMPLED = 4  # batches by which the scale of channels is measured
HEAD_RATE = 4.0  # the heads' learning rate over the backbone's (paper, section 2.2.2)


@dataclass(frozen=True)
class JointPlan(TrainingPlan):
    """A plan whose learning rate is the backbone's.

    For the share `heads_first` of it only the heads learn; over the share `ramp` after that lambda0 rises to its value.
    """

    learning_rate: float = 5e-4
    lambda0: float = 0.1
    heads_first: float = 0.0
    ramp: float = 0.25

    def __post_init__(self) -> None:
        if not (0 <= self.heads_first < 1 and 0 <= self.ramp <= 1 and self.lambda0 >= 0):
            raise InvalidParameterError(
                f"heads_first is {self.heads_first}, ramp {self.ramp} and lambda0 {self.lambda0}; the first two are "
                "shares of the training from 0 to 1, and lambda0 is 0 or more."
            )

    def lambda_at(self, share: float) -> float:
        """Return the weight of the heads' loss when `share` of the plan is done."""
        since = share - self.heads_first
        return self.lambda0 * (math.sin(math.pi / 2 * min(1.0, since / self.ramp)) if self.ramp else 1.0)


class _States(NamedTuple):
    """Of the texts' tokens, one document behind the other: hidden states, and what heads read, [tokens, hidden]."""

    hidden: Tensor
    read: Tensor


class JointTrainer(TrainingLoop):
    """Trains heads and the adapters that it puts into `model`'s backbone. Goes on from `checkpoint` where that exists.

    `vocabulary` has to be of the same model, made before; its rows and embeddings stay the frozen ones.
    """

    plan: JointPlan

    def __init__(
        self,
        model: TrainingModel,
        heads: MedusaHeads,
        vocabulary: Vocabulary,
        text: TextSet,
        plan: JointPlan,
        checkpoint: Path | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.model, self.heads, self.vocabulary = model, heads.requires_grad_(True), vocabulary
        self.teacher_output = model.lm_head_weight
        self.adapters = LoraAdapters(model.backbone, seed=plan.seed)
        self.batches = DocumentBatches(text, plan.batch_tokens, model.device, plan.seed, processes)
        if heads.prefix is not None:  # before the optimiser takes the parameters
            begin_scaled(heads.prefix, self._features(), processes)
        module = nn.ModuleDict({"heads": heads, "adapters": self.adapters})
        groups = [(list(self.adapters.parameters()), 1.0), (list(heads.parameters()), HEAD_RATE)]
        super().__init__(module, groups, plan, self.batches.num_batches, checkpoint, processes)
        self._begin_sums()
        rank = {"rank": self.adapters.rank, "alpha": self.adapters.alpha}
        self.resume({**heads.config.to_dict(), **rank, "tokens": text.num_tokens, "quantize": model.quantize})

    def run(self, report: Callable[[str], None]) -> dict[str, float]:
        figures = super().run(report)
        if self.heads.prefix is not None:
            end_scaled(self.heads.prefix)
        return figures

    def train_step(self, share: float) -> bool:
        batch = self.batches.batch(*divmod(self.step, self.batches.num_batches))
        counts = count_labels(batch.run, 1, self.heads.config.num_heads + 1)
        has_labels = bool(counts[0])
        counts = self.processes.add_up(counts)
        if not bool(counts[0]):  # nothing to learn from
            return False
        learning = self.heads if share < self.plan.heads_first else self.module
        self.apply_gradients(self._loss(batch, share, counts) if has_labels else None, learning.parameters())
        return True

    def _loss(self, batch: PaddedBatch, share: float, counts: Tensor) -> Tensor:
        """counts: the positions of the whole step with runs of 1, 2, ... labels."""
        self._sums.tokens += batch.run.numel()
        if share < self.plan.heads_first:
            with self.adapters.switched_off():
                return self._heads_loss(batch, self._states(batch, learns=False), None, counts[1:])
        with torch.no_grad(), self.adapters.switched_off():
            teacher = self._run(batch)[0][batch.is_text]
        states, output = self._states(batch), self.output()
        loss = self._backbone_loss(batch, states.hidden, output, teacher) / counts[0]
        return loss + self.plan.lambda_at(share) * self._heads_loss(batch, states, output, counts[1:])

    def report(self, share: float, seconds: float, report: Callable[[str], None]) -> dict[str, float]:
        kl, same, count = self.processes.add_up(torch.stack([self._kl, self._same, self._count])).tolist()
        moved = {"kl": kl / max(1, count), "same_best": same / count if count else 1.0}
        sums = self._sums
        sums.add_up(self.processes)
        figures = sums.figures(seconds)
        self._begin_sums()
        report(
            f"step {self.step} of {self.total_steps} ({min(share, 1):.0%}), KL {moved['kl']:.5f}, "
            f"same best token {moved['same_best']:.2%}, lambda {self._lambda(share):.3f}, "
            f"heads' loss {figures['loss']:.4f}, {sums.by_head()}, {figures['tokens_per_second']:,.0f} tokens/s"
        )
        return {**figures, **moved, "epochs": self.step / self.steps_per_epoch}

    def output(self) -> Tensor:
        """Return the adapted output matrix [vocab, hidden], rounded as the merged one will be."""
        return (self.teacher_output.float() + self.adapters.lm_head.delta()).to(self.teacher_output.dtype)

    def _states(self, batch: PaddedBatch, learns: bool = True) -> _States:
        """Run the backbone on a batch; only where it `learns` gradients reach it."""
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            hidden, middle = self._run(batch)
        read = heads_states(self.heads.prefix, self.model.backbone, hidden, middle)
        return _States(hidden[batch.is_text], read[batch.is_text])

    def _run(self, batch: PaddedBatch) -> tuple[Tensor, Tensor | None]:
        """Return hidden states and middle layers' features, [documents, longest, ...] each."""
        positions = torch.arange(batch.tokens.shape[1], device=batch.tokens.device).expand_as(batch.tokens)
        layers = () if self.heads.prefix is None else self.heads.prefix.config.layers
        hidden, *left = self.model.backbone.states(batch.tokens, positions, attend_causal, layers)
        return hidden, middle_features(left)

    @torch.no_grad()
    def _features(self) -> Iterator[Tensor]:
        """Yield the features of the first batches' tokens, [tokens, features x hidden]; what is empty is not run."""
        for place in range(min(SAMPLED, self.batches.num_batches)):
            batch = self.batches.batch(0, place)
            if batch.tokens.numel():
                hidden, middle = self._run(batch)
                assert middle is not None
                yield torch.cat([hidden, middle], dim=-1)[batch.is_text]

    def _backbone_loss(self, batch: PaddedBatch, hidden: Tensor, output: Tensor, teacher: Tensor) -> Tensor:
        """Return the summed divergence."""
        rows = (batch.run >= 1).nonzero().flatten()
        total, same = divergence(hidden[rows], output, teacher[rows], self.teacher_output)
        self._kl += total.detach()
        self._same += same
        self._count += rows.numel()
        return total

    def _heads_loss(
        self, batch: PaddedBatch, states: _States, output: Tensor | None, counts: Tensor | None = None
    ) -> Tensor:
        """Let the heads learn the text and what the backbone, as it is now, would say; `output` None: unadapted."""
        rows = (batch.run >= 2).nonzero().flatten()
        learnt = HeadBatch(states.read, batch.tokens[batch.is_text], rows, batch.run[rows])
        shared = self.vocabulary.rows if output is None else self._drafted(output)
        teacher = states.hidden.detach() @ shared.detach().T
        return heads_loss(self.heads, self.vocabulary, learnt, teacher, self._sums, shared, counts)

    def _drafted(self, output: Tensor) -> Tensor:
        return output if self.vocabulary.token_map is None else output[self.vocabulary.token_map]

    def _lambda(self, share: float) -> float:
        return 0.0 if share < self.plan.heads_first else self.plan.lambda_at(share)

    def _begin_sums(self) -> None:
        self._sums = HeadSums(self.heads.config.num_heads, self.device)
        self._kl, self._same, self._count = torch.zeros(3, dtype=torch.float64, device=self.device)
