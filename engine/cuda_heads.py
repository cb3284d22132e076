"""Draft heads in the order that the CUDA kernels read: int8 matrices, as guesses need no exactness.

What a head sees lies side by side, so that its first block is one matrix over all of it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.block_weights import DenseWeight, Weight
from engine.cuda_weights import pack_matrix
from engine.heads import MedusaHead, MedusaHeads, PaperBlock
from engine.kernels.small_batch_linear import PackedLinear

__all__ = ["PackedBlock", "PackedHead", "pack_heads"]


@dataclass(frozen=True)
class PackedBlock:
    """A paper block (no `down`, a bias) or a wide one."""

    up: PackedLinear
    bias: Tensor | None
    down: PackedLinear | None


@dataclass(frozen=True)
class PackedHead:
    blocks: list[PackedBlock]
    output: PackedLinear
    num_seen: int

    @property
    def block_matrices(self) -> list[PackedLinear]:
        return [matrix for block in self.blocks for matrix in (block.up, block.down) if matrix is not None]


def pack_heads(heads: MedusaHeads, shared_output: Weight, dtype: torch.dtype, device: str) -> list[PackedHead]:
    """Pack all heads; those that share the backbone's `lm_head` share one matrix of it."""

    def pack(*values: Tensor) -> PackedLinear:
        return pack_matrix([DenseWeight(torch.cat([v.detach() for v in values], dim=1))], "int8", dtype, device)

    def blocks(head: MedusaHead) -> list[PackedBlock]:
        packed = []
        for block in head.blocks:
            if isinstance(block, PaperBlock):
                bias = block.linear.bias.detach().to(device, dtype)
                packed.append(PackedBlock(pack(block.linear.weight), bias, None))
            else:
                seen = [linear.weight for linear in block.seen]
                packed.append(PackedBlock(pack(block.up.weight, *seen), None, pack(block.down.weight)))
        return packed

    if heads.config.output.startswith("own"):
        outputs = [pack(output.weight) for output in heads.outputs if isinstance(output, nn.Linear)]
    else:
        rows = shared_output if heads.token_map is None else shared_output.permute_rows(heads.token_map)
        outputs = [pack_matrix([rows], "int8", dtype, device)] * heads.config.num_heads
    return [PackedHead(blocks(head), output, head.num_seen) for head, output in zip(heads.heads, outputs, strict=True)]
