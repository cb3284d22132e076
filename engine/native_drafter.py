"""A Drafter on the C kernels: all depths of a tree in one call.

Guesses need no exactness, so the heads' blocks are rounded to 4 bits, which halves what a draft reads from memory. The
output matrix keeps the backbone's codes, or gets int8: rounded further, it would guess worse. Of a draft vocabulary in
order of use only the first tokens are scored: the rest costs more time than its guesses save.
"""

import ctypes
from ctypes import POINTER, Array, c_float, c_int, c_int32, c_size_t, c_void_p

import torch
from torch import Tensor, nn

from engine.block_weights import BLOCK, DenseWeight, Q4Affine, Q8Symmetric, Weight, quantize_q4
from engine.draft import Draft
from engine.errors import OutOfMemoryError
from engine.heads import MedusaHeads, WideBlock
from engine.kernels.cpu_build import CpuKernelsUnavailableError
from engine.kernels.cpu_native import (
    NativeArena,
    NativeMatrix,
    Signatures,
    declare,
    int32s,
    pointer,
    release_with,
    to_q8,
)
from engine.native_runner import NativeRunner
from engine.tree import CandidateTree

__all__ = ["FREQUENT_TOKENS", "NativeDrafter"]

_NO_MEMORY = 1
_Shape = tuple[Array[c_int32], Array[c_int32]]  # parents and ranks of a tree's nodes
# Bundled heads, 2 cores, 2 and 4 nodes: of 16,384 tokens 1.85 and 2.02 tokens a step, of 6,144 1.80 and 1.98, and a
# depth's scores cost 4 MB read instead of 10: 9 and 13 % more tokens a second.
FREQUENT_TOKENS = 6144


class _Config(ctypes.Structure):
    _fields_ = [(name, c_int32) for name in ("hidden", "width", "heads", "blocks")]


_SIGNATURES: Signatures = {
    "drafter_create": (c_void_p, [c_void_p, POINTER(_Config), c_void_p, c_void_p, c_void_p, c_void_p]),
    "drafter_free": (None, [c_void_p]),
    "drafter_bytes": (c_size_t, [c_void_p]),
    "drafter_run": (c_int, [*[c_void_p] * 2, c_int32, *[c_void_p] * 2, c_int, *[c_void_p] * 2]),
}


class NativeDrafter:
    """See `engine.draft.Drafter`. `shared_output` is the backbone's `lm_head`, of which truncated heads use rows.

    Raises CpuKernelsUnavailableError for heads of narrow blocks or of odd sizes.
    """

    def __init__(self, heads: MedusaHeads, runner: NativeRunner, shared_output: Weight) -> None:
        config = heads.config
        if config.width is None or config.width % BLOCK or config.hidden_size % BLOCK:
            raise CpuKernelsUnavailableError(
                f"The C kernels know wide blocks of sizes in steps of {BLOCK}; these heads are "
                f"{config.width or 'narrow'} over {config.hidden_size}."
            )
        self.max_depth = config.num_heads
        self._threads, self._library = runner.threads, runner.threads.library
        self._hidden_size = config.hidden_size
        declare(self._library, _SIGNATURES)
        self._matrices, self._arena = _pack(heads, shared_output)
        self._embedding = runner.embedding
        self.num_scored = config.output_size if heads.token_map is None else len(_drafted_tokens(heads))
        self._token_map = None if heads.token_map is None else _drafted_tokens(heads).to(torch.int32).contiguous()
        self._drafter = self._create(heads)
        self._trees: dict[CandidateTree, _Shape] = {}

    def draft(self, hidden: Tensor, root: int, tree: CandidateTree) -> Draft:
        """Guess from the hidden state [hidden] behind `root`, the token that the backbone chose there."""
        if tree.max_depth > self.max_depth:
            raise ValueError(f"A tree of depth {tree.max_depth} needs as many heads; these are {self.max_depth}.")
        if not 0 <= root < self._embedding.shape[0]:
            raise ValueError(f"Token {root} is not in 0..{self._embedding.shape[0] - 1}.")
        nodes, state = tree.num_nodes, hidden.float().contiguous()
        parents, ranks = self._shape(tree)
        tokens, probabilities = (c_int32 * nodes)(), (c_float * nodes)()
        with self._threads.lock:
            status = self._library.drafter_run(
                self._drafter,
                pointer(state, torch.float32, (self._hidden_size,)),
                root,
                parents,
                ranks,
                nodes,
                tokens,
                probabilities,
            )
        if status == _NO_MEMORY:
            raise OutOfMemoryError("There is no memory for the heads' scores; close other programs.")
        if status:
            raise ValueError(f"A guess of rank {max(ranks)} was asked for; the heads give ranks 0 to 63.")
        return Draft(tokens[:], probabilities[:])

    def memory_bytes(self) -> int:
        """Bytes held by the heads and their work memory."""
        return self._arena.num_bytes + self._library.drafter_bytes(self._drafter)

    def _shape(self, tree: CandidateTree) -> _Shape:
        if tree not in self._trees:
            self._trees[tree] = int32s(tree.parents), int32s(tree.rank.tolist())
        return self._trees[tree]

    def _create(self, heads: MedusaHeads) -> int:
        config = heads.config
        shape = _Config(config.hidden_size, config.width, config.num_heads, config.num_layers)
        seen = torch.tensor([config.num_seen(head) for head in range(config.num_heads)], dtype=torch.int32)
        handles = (c_void_p * len(self._matrices))(*(matrix.handle for matrix in self._matrices))
        token_map = None if self._token_map is None else self._token_map.data_ptr()
        handle = self._library.drafter_create(
            self._threads.handle, shape, seen.data_ptr(), handles, self._embedding.handle, token_map
        )
        if not handle:
            raise OutOfMemoryError("There is no memory for the draft heads; close other programs.")
        release_with(self, self._library.drafter_free, handle)
        return handle


def _pack(heads: MedusaHeads, shared_output: Weight) -> tuple[list[NativeMatrix], NativeArena]:
    """Pack each head's blocks and output in the order of `drafter_create`; a shared output is packed once."""
    blocks = [matrix for block in heads.modules() if isinstance(block, WideBlock) for matrix in _block(block)]
    if heads.config.output.startswith("own"):
        own = [module for module in heads.get_submodule("outputs").modules() if isinstance(module, nn.Linear)]
        used = None if heads.token_map is None else len(_drafted_tokens(heads))
        outputs = [_output(DenseWeight(linear.weight.detach()[:used])) for linear in own]
    elif heads.token_map is None:
        outputs = [_output(shared_output)]
    else:
        outputs = [_output(shared_output.permute_rows(_drafted_tokens(heads)))]
    arena = NativeArena([*blocks, *outputs])
    packed_blocks = [NativeMatrix(arena, weight) for weight in blocks]
    packed_outputs = [NativeMatrix(arena, weight) for weight in outputs]
    ordered: list[NativeMatrix] = []
    per_head = 2 * heads.config.num_layers
    for head in range(heads.config.num_heads):
        ordered += packed_blocks[head * per_head : (head + 1) * per_head]
        ordered.append(packed_outputs[head % len(packed_outputs)])
    return ordered, arena


def _drafted_tokens(heads: MedusaHeads) -> Tensor:
    """Tokens of the draft vocabulary that are scored here."""
    assert heads.token_map is not None
    return heads.token_map[:FREQUENT_TOKENS] if heads.config.frequent_first else heads.token_map


def _block(block: WideBlock) -> list[Q4Affine]:
    """Up, with the matrices of the tokens seen beside it along the inputs, and down."""
    linears = [block.up, *(module for module in block.seen if isinstance(module, nn.Linear))]
    up = torch.cat([linear.weight.detach() for linear in linears], dim=1)
    return [quantize_q4(up), quantize_q4(block.down.weight.detach())]


def _output(weight: Weight) -> Q4Affine | Q8Symmetric:
    return to_q8(weight) if isinstance(weight, DenseWeight) else weight
