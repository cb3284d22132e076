"""Put a read model onto a device: choose the linears once, and say what was chosen.

Every choice between formats and every fallback is made here, with its reason, before the first token.
"""

import ctypes
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine.backbone import Backbone, BackboneConfig, BackboneWeights, LinearFactory
from engine.block_weights import DenseWeight, Q4Affine, Q8Symmetric, Weight, quantize_q4
from engine.bnb_linear import BnbInt8Linear, NF4Linear
from engine.cuda_drafter import CudaDrafter
from engine.cuda_runner import WARM_ROWS, CudaRunner
from engine.cuda_tuning import compile_candidates
from engine.cuda_weights import CudaKernelsUnavailableError, pack_backbone
from engine.draft import Drafter, HeadsDrafter
from engine.errors import InvalidParameterError, UnsupportedDeviceError
from engine.heads import MedusaHeads
from engine.kernels import nvrtc
from engine.kernels.cpu_build import CpuKernelsUnavailableError
from engine.kernels.cpu_native import NativeLinear
from engine.kernels.nvrtc import KernelCompileError
from engine.linear import DenseLinear, Int8Linear, PackedInt4Linear, QuantizedEmbedding, RowwiseLinear
from engine.native_drafter import NativeDrafter
from engine.native_runner import NativeRunner
from engine.runner import Runner
from engine.step_times import SIZES
from engine.torch_runner import TorchRunner

__all__ = [
    "Built",
    "build_drafter",
    "build_heads_drafter",
    "build_runner",
    "build_torch_runner",
    "choose_device",
    "pack_int4",
    "return_freed_memory",
    "use_all_cores",
]

QUANTIZE = {"cpu": ("int4", "int8", "none"), "cuda": ("nf4", "int8", "none")}
_SMALL_MODEL = 1_000_000_000  # parameters in the layers
_MAX_THREADS = 16  # decode is bound by memory; more threads only wait for each other


def choose_device(device: str) -> str:
    """Resolve "auto"; raises UnsupportedDeviceError where CUDA is asked for and absent."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UnsupportedDeviceError("No CUDA device is available to torch; use --device cpu or install its driver.")
    if device not in QUANTIZE:
        raise InvalidParameterError(f"device is {device!r}; allowed is auto, cpu or cuda.")
    return device


def use_all_cores() -> None:
    """Give torch the cores this process may run on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(min(cores, _MAX_THREADS))


def return_freed_memory() -> None:
    """Give the system back what reading and repacking a model left over; glibc and torch alone would keep it."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


class Built(NamedTuple):
    """A runner, how its drafter's matrices are made, and what a person should know of the choice."""

    runner: Runner
    head_linear: LinearFactory
    notes: tuple[str, ...] = ()


def _automatic(device: str, weights: BackboneWeights) -> str:
    """Choose a format: on a GPU int8 for small models, NF4 for others; elsewhere the first one.

    A small model's step is bound by launches, so fewer bytes bring no speed, while a second rounding of a 4-bit file
    costs quality and accepted drafts (2.24 against 2.59 tokens a step with the bundled model).
    """
    if device != "cuda":
        return QUANTIZE[device][0]
    layer = weights.layers[0]
    matrices = [value for value in vars(layer).values() if hasattr(value, "shape") and len(value.shape) == 2]
    size = len(weights.layers) * sum(rows * columns for rows, columns in (matrix.shape for matrix in matrices))
    return "int8" if size < _SMALL_MODEL else "nf4"


def build_runner(
    config: BackboneConfig,
    weights: BackboneWeights,
    *,
    device: str,
    quantize: str,
    source_format: str,
    say: Callable[[str], None] | None = None,
) -> Built:
    """Quantise or repack a model's weights for `device` and wrap it in a runner; `say` hears what takes long."""
    chosen = _automatic(device, weights) if quantize == "auto" else quantize
    if chosen not in QUANTIZE[device]:
        allowed = ", ".join(QUANTIZE[device])
        raise InvalidParameterError(f"quantize is {quantize!r}; on {device} allowed is auto, {allowed}.")
    if device == "cuda":
        return _build_cuda(config, weights, chosen, source_format, say or (lambda message: None))
    if chosen != "int4":
        return Built(build_torch_runner(config, weights, device, chosen, source_format), _head_linear(device))
    try:
        runner = NativeRunner(config, weights, source_format=source_format)
        torch.set_num_threads(1)  # the kernels bring their own threads, and torch's would spin on the same cores
        return Built(runner, partial(NativeLinear.from_weight, runner.threads))
    except CpuKernelsUnavailableError as error:
        note = f"Slower torch operations are in use: {error}"
        return Built(build_torch_runner(config, weights, device, chosen, source_format), pack_int4, (note,))


def _build_cuda(
    config: BackboneConfig, weights: BackboneWeights, quantize: str, source_format: str, say: Callable[[str], None]
) -> Built:
    """Build on the package's own kernels; where they cannot run, on bitsandbytes, with a note."""
    try:
        if not nvrtc.is_available():
            raise CudaKernelsUnavailableError("They need compute capability 7.5 and torch's run-time compiler.")
        runner = _cuda_runner(config, weights, quantize, say)
    except (CudaKernelsUnavailableError, KernelCompileError) as error:
        note = f"The engine's own CUDA kernels are not in use, so answers are slower. {error}"
        slower = build_torch_runner(config, weights, "cuda", quantize, source_format)
        return Built(slower, _head_linear("cuda"), (note,))
    return Built(runner, _head_linear("cuda"))


def _cuda_runner(
    config: BackboneConfig, weights: BackboneWeights, quantize: str, say: Callable[[str], None]
) -> CudaRunner:
    dtype = _cuda_dtype()
    packed = pack_backbone(config, weights, quantize=quantize, dtype=dtype, device="cuda")
    label = str(dtype).removeprefix("torch.") if quantize == "none" else quantize
    runner = CudaRunner(config, packed, label=f"{label} on CUDA kernels")
    runner.measure_in_passes()
    say("Preparing the GPU's kernels (longer at the first start on a machine)")
    compile_candidates(packed.matrices, (*WARM_ROWS, *(size + 1 for size in SIZES)))
    runner.warm_up()
    return runner


def build_torch_runner(
    config: BackboneConfig, weights: BackboneWeights, device: str, quantize: str, source_format: str
) -> TorchRunner:
    """Build the runner over torch operations; `quantize` is one of QUANTIZE[device]."""
    plan = _plan_cpu(quantize, source_format) if device == "cpu" else _plan_cuda(quantize)
    backbone = Backbone(
        config,
        weights,
        embed=_embedding(weights.embedding, plan.dtype),
        linear=plan.linear,
        lm_head=plan.lm_head(weights.lm_head),
        dtype=plan.dtype,
    ).to(device)
    return TorchRunner(backbone, device=device, dtype=plan.dtype, weights=plan.label, exact=device == "cpu")


def build_drafter(heads: MedusaHeads, built: Built, lm_head: Weight) -> tuple[Drafter, tuple[str, ...]]:
    """Put heads beside their backbone; return the drafter, and a note where its kernels cannot draft for it.

    Raises CheckpointMismatchError where the heads' prefix attention is not one for this backbone.
    """
    if heads.prefix is not None:
        built.runner.attach(heads.prefix)
        heads.prefix = None  # held and counted by the runner alone
    if isinstance(built.runner, CudaRunner):
        try:
            return CudaDrafter(heads, built.runner, lm_head), ()
        except CudaKernelsUnavailableError as error:
            return build_heads_drafter(heads, built, lm_head), (f"Drafting is slower: {error}",)
    if isinstance(built.runner, NativeRunner):
        try:
            return NativeDrafter(heads, built.runner, lm_head), ()
        except CpuKernelsUnavailableError as error:
            return build_heads_drafter(heads, built, lm_head), (f"Drafting is slower: {error}",)
    return build_heads_drafter(heads, built, lm_head), ()


def build_heads_drafter(heads: MedusaHeads, built: Built, lm_head: Weight) -> HeadsDrafter:
    """Put heads of any shape beside their backbone, with matrices of the kind that suits its device."""
    shared = None
    if not heads.config.output.startswith("own"):
        rows = lm_head if heads.token_map is None else lm_head.permute_rows(heads.token_map)
        shared = built.head_linear(rows)
    _swap_linears(heads, built.head_linear)
    device = built.runner.device
    return HeadsDrafter(heads.to(device), built.runner.embed, shared.to(device) if shared else None)


def _head_linear(device: str) -> LinearFactory:
    return pack_int4 if device == "cpu" else partial(DenseLinear, dtype=_cuda_dtype())


@dataclass(frozen=True)
class _Plan:
    linear: LinearFactory
    lm_head: LinearFactory
    dtype: torch.dtype
    label: str


def _plan_cpu(quantize: str, source_format: str) -> _Plan:
    if quantize == "int4":
        return _Plan(pack_int4, Int8Linear, torch.bfloat16, _int4_label(source_format))
    if quantize == "int8":
        return _Plan(Int8Linear, Int8Linear, torch.bfloat16, "int8")
    dense = partial(RowwiseLinear, dtype=torch.bfloat16)
    return _Plan(dense, dense, torch.bfloat16, "bfloat16")


def _int4_label(source_format: str) -> str:
    return (
        f"{source_format} as packed int4" if source_format.startswith("Q4") else "int4, rounded from the file's values"
    )


def _plan_cuda(quantize: str) -> _Plan:
    dtype = _cuda_dtype()
    dense = partial(DenseLinear, dtype=dtype)
    if quantize == "none":
        return _Plan(dense, dense, dtype, str(dtype).removeprefix("torch."))
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UnsupportedDeviceError(
            f"{quantize} on a GPU needs bitsandbytes ({error}); run python launcher.py --repair or use --quantize none."
        ) from error
    kind = NF4Linear if quantize == "nf4" else BnbInt8Linear
    return _Plan(partial(kind, device="cuda", dtype=dtype), dense, dtype, f"{quantize} (bitsandbytes)")


def _cuda_dtype() -> torch.dtype:
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def pack_int4(weight: Weight) -> nn.Module:
    """Pack a matrix for torch's int4 kernel, rounding it to 4 bits where the file did not."""
    return PackedInt4Linear(weight if isinstance(weight, Q4Affine) else quantize_q4(weight.dequantize()))


def _embedding(weight: Weight, dtype: torch.dtype) -> nn.Module:
    if isinstance(weight, Q8Symmetric):
        return QuantizedEmbedding(weight, dtype)
    return nn.Embedding.from_pretrained(weight.dequantize().to(dtype))


def _swap_linears(module: nn.Module, linear: LinearFactory) -> None:
    """Replace every bias-free nn.Linear below `module`; a paper block's biased one becomes a sum."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, _Biased(linear(DenseWeight(child.weight.detach())), child.bias))
        else:
            _swap_linears(child, linear)


class _Biased(nn.Module):
    def __init__(self, linear: nn.Module, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.linear = linear
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x)
        return out if self.bias is None else out + self.bias.to(out.dtype)
