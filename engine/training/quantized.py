"""The number formats that a frozen backbone may have in training, and the matrix behind a linear of any of them.

A format is tried on this machine before a model is read: what bitsandbytes can do depends on the device and its build.
"""

from functools import partial

import torch
from torch import Tensor, nn

from engine.backbone import BackboneConfig, LinearFactory
from engine.block_weights import DenseWeight
from engine.bnb_linear import BnbInt8Linear, NF4Linear
from engine.errors import UnsupportedDeviceError
from engine.linear import DenseLinear

__all__ = ["QUANTIZE", "linear_factory", "plain_matrix"]

QUANTIZE = ("none", "nf4", "int8")
_LINEARS = {"nf4": NF4Linear, "int8": BnbInt8Linear}
_LARGEST_ERROR = {"nf4": 0.12, "int8": 0.02}  # mean, of a matrix of normal numbers; sound ones have 0.073 and 0.006


def linear_factory(
    quantize: str, config: BackboneConfig, device: str | torch.device, dtype: torch.dtype
) -> LinearFactory:
    """Return what makes the layers' linears; raises UnsupportedDeviceError where the format does not work here."""
    if quantize == "none":
        return partial(DenseLinear, dtype=dtype)
    make = partial(_LINEARS[quantize], device=device, dtype=dtype)
    try:
        for columns in {config.hidden_size, config.num_heads * config.head_dim, config.intermediate_size}:
            _try_out(quantize, make, columns, device, dtype)
    except (ImportError, RuntimeError, NotImplementedError, AttributeError) as error:
        raise UnsupportedDeviceError(
            f"--quantize {quantize} does not work on {device} here ({type(error).__name__}: {error}); use --quantize "
            "none, or run python launcher.py --repair if bitsandbytes is missing."
        ) from error
    return make


@torch.no_grad()
def plain_matrix(linear: nn.Module, columns: int, device: str | torch.device, dtype: torch.dtype) -> Tensor:
    """Return the matrix [out, columns] that a linear of any format stands for, float32.

    It is exact, as every product is with 1 or 0. `dtype` is the activations'.
    """
    if isinstance(linear, DenseLinear):
        return linear.weight.float()
    return linear(torch.eye(columns, device=device, dtype=dtype)).T.float()


def _try_out(quantize: str, make: LinearFactory, columns: int, device: str | torch.device, dtype: torch.dtype) -> None:
    """Raise RuntimeError where a matrix of so many columns does not come back from its format."""
    values = torch.randn(128, columns, generator=torch.Generator().manual_seed(0))
    back = plain_matrix(make(DenseWeight(values)), columns, device, dtype)
    error = float((back.cpu() - values).abs().mean())
    if not error <= _LARGEST_ERROR[quantize]:
        raise RuntimeError(f"a matrix of {columns} columns comes back with a mean error of {error:.3f}")
