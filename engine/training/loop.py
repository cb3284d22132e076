"""The loop that all training here shares: schedule, checkpoint, live line. What a step does is not known here.

The schedule follows the larger of steps done and time used, so a run that hits its time limit has still cooled down.
Of several processes, each learns from its part of a step, gradients are summed, and the first one's clock counts.
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.errors import InvalidParameterError
from engine.training.checkpoint import load_checkpoint, save_checkpoint
from engine.training.processes import ALONE, Processes

__all__ = ["TrainingLoop", "TrainingPlan"]

FINAL_RATE = 0.02  # of the plan's learning rate


@dataclass(frozen=True)
class TrainingPlan:
    """How long and how fast to learn.

    `seconds` bounds the time of all starts of a run together; `batch_tokens` are a step's over all processes; a line is
    reported every `report_seconds`, and every `report_steps` where that is not 0.
    """

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
    report_steps: int = 0
    seed: int = 0


class TrainingLoop(ABC):
    """`run` trains to the end of the plan. A subclass says what one step learns and what the live line shows.

    `module` is what a checkpoint holds; `groups` maps parameters to their multiple of the plan's learning rate.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: list[tuple[list[nn.Parameter], float]],
        plan: TrainingPlan,
        steps_per_epoch: int,
        checkpoint: Path | None,
        processes: Processes = ALONE,
    ) -> None:
        self.module, self.plan, self.checkpoint, self.processes = module, plan, checkpoint, processes
        self.rates = [rate for _, rate in groups]
        self.device = groups[0][0][0].device
        self.optimizer = torch.optim.AdamW(
            [{"params": parameters} for parameters, _ in groups],
            lr=plan.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=plan.weight_decay,
            fused=self.device.type == "cuda",
        )
        self.steps_per_epoch = max(1, steps_per_epoch)
        self.total_steps = max(1, math.ceil(plan.epochs * self.steps_per_epoch))
        self.step, self.elapsed = 0, 0.0

    def resume(self, settings: dict[str, object]) -> None:
        """Take up the checkpoint where there is one; `settings` beyond the plan's must be the same as then."""
        timing = ("seconds", "checkpoint_seconds", "report_seconds", "report_steps")
        plan = {name: value for name, value in asdict(self.plan).items() if name not in timing}
        self._settings = {**plan, **settings}
        if self.checkpoint is not None and self.checkpoint.is_file():
            self.step, self.elapsed = load_checkpoint(self.checkpoint, self.module, self.optimizer, self._settings)
        self.processes.copy_first(self.module)

    def run(self, report: Callable[[str], None]) -> dict[str, float]:
        """Train to the end of the plan; return the last report's figures."""
        start = time.monotonic() - self.elapsed
        saved, reported, figures, has_news = time.monotonic(), time.monotonic(), {}, False
        while True:
            now = time.monotonic()
            self.elapsed, silent = self.processes.from_first(now - start, now - reported)
            share = self.share
            if has_news and (share >= 1 or self._is_report_due(silent)):
                figures = self.report(share, silent, self.processes.spoken(report))
                if not math.isfinite(figures["loss"]):  # further steps would learn nothing
                    raise InvalidParameterError(
                        f"The loss is {figures['loss']} at step {self.step}; start again with a lower --learning-rate "
                        f"than {self.plan.learning_rate} and another --out."
                    )
                reported, has_news = time.monotonic(), False
            if share >= 1:
                break
            self._set_rate(share)
            has_news |= self.train_step(share)
            self.step += 1
            if time.monotonic() - saved > self.plan.checkpoint_seconds:
                self._save()
                saved = time.monotonic()
        self._save()
        return figures

    def run_reported(self, report: Callable[[str], None]) -> dict[str, float]:
        """`run`, but a run taken up again says so first."""
        if self.step:
            report(f"going on at step {self.step} of {self.total_steps}")
        return self.run(report)

    @property
    def share(self) -> float:
        """How much of the plan is done, by steps or by time."""
        return max(self.step / self.total_steps, self.elapsed / self.plan.seconds)

    @abstractmethod
    def train_step(self, share: float) -> bool:
        """Learn from step number `self.step`'s batch; return whether there was anything to learn from."""

    @abstractmethod
    def report(self, share: float, seconds: float, report: Callable[[str], None]) -> dict[str, float]:
        """Tell the figures of the last `seconds` in one line and begin new sums; return the figures."""

    def apply_gradients(self, loss: Tensor | None, learning: Iterable[nn.Parameter]) -> None:
        """Take one optimiser step for `learning`; each group's gradients are clipped on their own.

        `loss` is this process's part of the step's loss, None where it has none.
        """
        self.optimizer.zero_grad(set_to_none=True)
        if loss is not None:
            loss.backward()
        self.processes.add_up_gradients(learning)
        for group in self.optimizer.param_groups:
            nn.utils.clip_grad_norm_(group["params"], self.plan.clip_norm)
        self.optimizer.step()

    def _is_report_due(self, silent: float) -> bool:
        every = self.plan.report_steps
        return silent > self.plan.report_seconds or (every > 0 and self.step % every == 0)

    def _set_rate(self, share: float) -> None:
        warm = min(1.0, (self.step + 1) / self.plan.warmup_steps)
        cooled = FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * share))
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = self.plan.learning_rate * rate * warm * cooled

    def _save(self) -> None:
        if self.checkpoint is not None and self.processes.is_first:
            save_checkpoint(self.checkpoint, self.module, self.optimizer, self.step, self.elapsed, self._settings)
