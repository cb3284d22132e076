"""The processes that train together, one per GPU: who is who, and the few things that they have to agree on.

A launcher (`accelerate launch`, `torchrun`) starts them and says so in the environment. What they train is not known
here. What returns numbers or changes tensors is called by all processes in the same order; alone, it is a formality.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.errors import InvalidParameterError

__all__ = ["ALONE", "Processes", "is_first_of_launch", "open_processes"]


@dataclass(frozen=True)
class Processes:
    """This process is number `index` of `count`; tensors that travel are on `device`."""

    index: int
    count: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and tells people."""
        return self.index == 0

    @property
    def is_alone(self) -> bool:
        return self.count == 1

    def spoken(self, report: Callable[[str], None]) -> Callable[[str], None]:
        """Return `report` for the first process and silence for the others."""
        return report if self.is_first else lambda line: None

    def add_up(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over all processes and return it."""
        if not self.is_alone:
            dist.all_reduce(tensor)
        return tensor

    def add_up_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace gradients by their sums; a process that has none counts as zero. All are float32."""
        if self.is_alone:
            return
        learning = list(parameters)
        parts = [torch.zeros_like(item) if item.grad is None else item.grad for item in learning]
        total = self.add_up(torch.cat([part.reshape(-1) for part in parts]))
        for item, part in zip(learning, total.split([part.numel() for part in parts]), strict=True):
            item.grad = part.view_as(item)

    def from_first(self, *values: float) -> tuple[float, ...]:
        """Return the first process's values: what depends on a clock has to be the same for all."""
        if self.is_alone:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.broadcast(tensor, 0)
        return tuple(tensor.tolist())

    def smallest(self, value: int) -> int:
        """Return the smallest of all processes' values."""
        if self.is_alone:
            return value
        tensor = torch.tensor(value, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MIN)
        return int(tensor)

    def copy_first(self, module: nn.Module) -> None:
        """Give a module the first process's values."""
        if self.is_alone:
            return
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, 0)

    def close(self) -> None:
        """Wait for all, then part: what follows may take one process longer than the others would wait."""
        if not self.is_alone:
            self.smallest(0)
            dist.destroy_process_group()


ALONE = Processes(0, 1, torch.device("cpu"))


def open_processes(device: str) -> Processes:
    """Join the processes that a launcher started on `device` ("cpu" or "cuda"); without a launcher, ALONE.

    Raises InvalidParameterError where there are more processes than GPUs.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return ALONE
    if device == "cpu":
        place = torch.device("cpu")
        dist.init_process_group("gloo")
    else:
        place = _own_gpu()
        dist.init_process_group("nccl", device_id=place)
    return Processes(dist.get_rank(), count, place)


def is_first_of_launch() -> bool:
    """Say whether this process speaks for all, before they have joined."""
    return os.environ.get("RANK", "0") == "0"


def _own_gpu() -> torch.device:
    number, wanted = (int(os.environ.get(name, "0")) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    if wanted > torch.cuda.device_count():
        raise InvalidParameterError(
            f"{wanted} processes were started and this machine has {torch.cuda.device_count()} GPUs; start one "
            "process a GPU with --num_processes."
        )
    place = torch.device("cuda", number)
    torch.cuda.set_device(place)
    return place
