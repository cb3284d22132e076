"""Launch the CUDA linear for few tokens: its packed matrices, its buffers and the call.

How weights are packed is known in `nf4_linear` and `int8_linear`, how a launch is cut in `linear_config`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels.linear_config import MAX_WORKSPACE, Decode, LinearConfig
from engine.kernels.linear_inputs import Norm, Seen
from engine.kernels.nvrtc import Kernel, load_kernel

__all__ = ["LoadKernel", "PackedLinear", "Workspace", "run_linear"]

PLAIN, ADD_RESIDUAL, SWIGLU, FLOAT32, SILU = 0, 1, 2, 3, 4
LoadKernel = Callable[..., Kernel]


@dataclass(frozen=True)
class PackedLinear:
    """A matrix [N, K] in the kernel's order; N is a multiple of 16, K of 64.

    weights uint8, scales float32 and tables int32 as cuda/linear.cuh says; `decode` a value of `Decode`. With
    `gate_up` the rows of gate and up alternate and the kernel answers silu(gate) * up, [tokens, N / 2]. `is_normed`
    says that an RMSNorm stands before it, which a launch may do as well.
    """

    weights: Tensor
    scales: Tensor | None
    byte_tables: Tensor | None
    n: int
    k: int
    dtype: torch.dtype
    decode: int
    gate_up: bool = False
    is_normed: bool = False

    def table(self, decode: int) -> Tensor | None:
        return self.byte_tables if decode == Decode.NF4_PERMUTE else None

    @property
    def num_bytes(self) -> int:
        return self.weights.nbytes + (0 if self.scales is None else self.scales.nbytes)


class Workspace:
    """Partial sums and arrival counters that linears on one stream share.

    It is made at the first need, outside of graph capture, with room for every configuration that `is_frugal`.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.partial = torch.empty(0, dtype=torch.float32, device=device)
        self.counters = torch.zeros(4096, dtype=torch.int32, device=device)

    def reserve(self, num_floats: int) -> None:
        if self.partial.numel() < num_floats:
            size = max(num_floats, MAX_WORKSPACE)
            self.partial = torch.empty(size, dtype=torch.float32, device=self.partial.device)


def run_linear(
    x: Tensor,
    weight: PackedLinear,
    config: LinearConfig,
    workspace: Workspace,
    *,
    residual: Tensor | None = None,
    norm: Norm | None = None,
    seen: Seen | None = None,
    silu: bool = False,
    best: bool = False,
    out: Tensor | None = None,
    load: LoadKernel = load_kernel,
) -> Tensor:
    """Compute x W^T (+ residual), silu(x W^T), or silu(gate) * up: x [tokens, K] of 1 to 64 -> [tokens, N] (or N / 2).

    `residual` and `out` are contiguous and may be the same tensor; a residual [1, N] is added to all tokens, by
    `resident` configurations. A float32 `out` gets unrounded sums (for logits). For configurations that can: with
    `norm`, x is normalised first, to the bits of `fused_ops.rms_norm`; with `seen`, x is the hidden state [1, hidden]
    behind the inputs; with `best`, `out` int64 [tokens, places] gets keys whose largest is a token's largest result,
    as `fused_ops.argmax_keys` gives them.
    """
    tokens = x.shape[0] if seen is None else len(seen.row_nodes)
    width = weight.n // 2 if weight.gate_up else weight.n
    slots = weight.k // x.shape[1]
    assert x.is_contiguous() and x.dtype == weight.dtype and (slots == 1 or seen), "x: contiguous, the weight's type"
    assert tokens <= 8 * config.token_tiles, f"{tokens} tokens in a launch built for {8 * config.token_tiles}"
    assert norm is None or config.can_normalize(weight.k), f"{config} cannot normalise {weight.k} features"
    assert seen is None or (norm is None and slots > 1 and config.can_gather(slots, tokens)), f"{config}: {slots} parts"
    assert config.resident or not best, f"{config} does not look for the best"
    out = torch.empty(tokens, width, dtype=x.dtype, device=x.device) if out is None else out
    kernel = load(*config.kernel(weight.k, x.dtype, norm=norm is not None, seen=slots - 1 if seen else 0, best=best))
    epilogue = PLAIN if best else _epilogue(weight, residual, silu, out)
    arguments = [x, weight.weights, weight.scales, weight.table(config.decode), residual]
    if config.resident:
        stride = weight.n if residual is not None and len(residual) == tokens else 0
        arguments += [seen.table if seen else norm and norm.weight, norm and norm.out, out, tokens, weight.n, stride]
        arguments += [epilogue, norm.eps if norm else 0.0]
        arguments += [seen.tokens, seen.record, seen.ancestor_at, seen.row_nodes] if seen else [None] * 4
    else:
        assert residual is None or residual.shape == out.shape, "this configuration adds a residual for each token"
        workspace.reserve(config.workspace_floats(weight.n))
        arguments += [out, workspace.partial, workspace.counters, tokens, weight.n, weight.k, epilogue]
    kernel(config.grid(weight.n), config.threads, arguments, config.shared_bytes(weight.k))
    return out


def _epilogue(weight: PackedLinear, residual: Tensor | None, silu: bool, out: Tensor) -> int:
    if out.dtype == torch.float32:
        assert residual is None and not weight.gate_up and not silu, "float32 results are plain"
        return FLOAT32
    if weight.gate_up or silu:
        assert residual is None and not (weight.gate_up and silu), "an activated result has no residual"
        return SWIGLU if weight.gate_up else SILU
    return PLAIN if residual is None else ADD_RESIDUAL
