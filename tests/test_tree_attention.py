"""Tree attention against float64 and against itself, on a CPU through the emulator and on a GPU where there is one.

A token's result must have the same bits however the work is cut, whatever the other nodes are and whichever of its keys
are committed.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from cuda_emulator import COMPILER, load_emulated
from torch import Tensor

from engine.kernels import fused_ops, nvrtc, reference
from engine.kernels.tree_attention import (
    AttentionConfig,
    AttentionShape,
    AttentionWorkspace,
    ancestor_table,
    default_config,
    tree_attention,
)
from engine.tree import CandidateTree

DTYPES = [torch.bfloat16, torch.float16]
TOLERANCE = {torch.bfloat16: 3e-3, torch.float16: 4e-4}
TREE = CandidateTree.from_choices([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1), (0, 0, 0, 0)])
ROOT = CandidateTree(())


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.skipif(COMPILER is None, reason="the emulator is built with g++")),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def device(request):
    if request.param == "cuda" and not nvrtc.is_available():
        pytest.skip("no CUDA device with the run-time compiler")
    return request.param


def cuts(shape: AttentionShape, device: str) -> list[AttentionConfig]:
    """Ways to cut the work that must not change a bit."""
    base = default_config(shape, 1, cluster=False, shared_limit=nvrtc.shared_memory_limit())
    found = [base, replace(base, row_tiles=2)]
    if device == "cpu" or torch.cuda.get_device_capability() >= (9, 0):
        found += [replace(base, cluster=True), replace(base, cluster=True, row_tiles=2, stages=3 - base.stages)]
    return [config for config in found if config.shared_bytes <= nvrtc.shared_memory_limit()]


@dataclass
class Text:
    """A cache with committed rows, and rows of qkv that follow them."""

    shape: AttentionShape
    keys: Tensor
    values: Tensor
    qkv: Tensor
    angles: Tensor

    @classmethod
    def random(cls, shape: AttentionShape, rows: int, capacity: int, device: str) -> "Text":
        generator = torch.Generator().manual_seed(rows + capacity)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).to(device, shape.dtype)

        cache = [normal(shape.num_kv_heads, capacity, shape.head_dim) for _ in range(2)]
        qkv = normal(rows, (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim) * 1.5
        return cls(shape, *cache, qkv, fused_ops.rotary_angles(1e4, shape.head_dim, capacity).to(device))

    def attend(
        self,
        tree: CandidateTree,
        length: int,
        config: AttentionConfig,
        nodes: list[int] | None = None,
        cache: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the nodes (rows of qkv) see, and their scratch rows."""
        device, shape = self.qkv.device, self.shape
        qkv = self.qkv[: tree.num_nodes] if nodes is None else self.qkv[nodes].contiguous()
        scratch = [
            torch.full((len(qkv), shape.num_kv_heads, shape.head_dim), torch.nan, dtype=shape.dtype, device=device)
            for _ in range(2)
        ]
        workspace = AttentionWorkspace(shape, len(qkv), device, config=config)
        out = tree_attention(
            *(qkv, self.angles, int32([length], device), tree.depth.int().to(device)),
            *(ancestor_table(tree.ancestors, tree.depth).to(device), *(cache or (self.keys, self.values))),
            *((scratch[0], scratch[1]), workspace),
            load=loader(device),
        )
        assert int(workspace.counters.abs().max()) == 0
        return out, *scratch

    def split(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        shape = self.shape
        parts = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
        return self.qkv[:rows].view(rows, -1, shape.head_dim).split(parts, dim=1)

    def want(self, tree: CandidateTree, length: int) -> Tensor:
        """Return the float64 result over queries and keys rounded to the type of the cache."""
        query, key, value = self.split(tree.num_nodes)
        turn = self.angles[length + tree.depth.to(self.angles.device)].unsqueeze(1)
        turned = [reference.rotate(x, turn).to(self.shape.dtype) for x in (query, key)]
        ancestors = tree.ancestors.to(self.qkv.device)
        return reference.tree_attention(turned[0], self.keys, self.values, turned[1], value, length, ancestors)


def int32(numbers: list[int], device: torch.device | str) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=device)


def loader(device: torch.device):
    return load_emulated if device.type == "cpu" else nvrtc.load_kernel


def error(out, want):
    return float((out.double().cpu() - want.cpu()).norm() / want.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(2, 2, 128), (6, 2, 64)])
@pytest.mark.parametrize("length", [0, 1, 15, 17, 140, 300])
def test_it_is_close_to_float64_and_the_same_for_every_cut(device, dtype, heads, kv_heads, head_dim, length):
    shape = AttentionShape(heads, kv_heads, head_dim, dtype)
    text = Text.random(shape, TREE.num_nodes, 384, device)
    text.keys[:, length:] = text.values[:, length:] = torch.nan  # memory past the committed rows may hold anything
    results = [text.attend(TREE, length, config) for config in cuts(shape, device)]
    assert error(results[0][0], text.want(TREE, length)) < TOLERANCE[dtype]
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


@pytest.mark.parametrize(("heads", "head_dim"), [(4, 128), (7, 64), (20, 64)])
def test_any_group_of_query_heads(device, heads, head_dim):
    shape = AttentionShape(heads, 1, head_dim, torch.float16)
    text = Text.random(shape, TREE.num_nodes, 256, device)
    results = [text.attend(TREE, 150, config)[0] for config in cuts(shape, device)]
    assert error(results[0], text.want(TREE, 150)) < TOLERANCE[shape.dtype]
    assert all(torch.equal(result, results[0]) for result in results[1:])


@pytest.mark.parametrize(("head_dim", "far_block"), [(64, 128), (128, 64), (128, 128)])
def test_slots_go_through_several_blocks(device, head_dim, far_block):
    shape = AttentionShape(1, 1, head_dim, torch.bfloat16)
    length = 2 * 8 * far_block + 50
    text = Text.random(shape, TREE.num_nodes, length + 30, device)
    configs = [replace(config, far_block=far_block) for config in cuts(shape, device)]
    configs = [config for config in configs if config.shared_bytes <= nvrtc.shared_memory_limit()]
    results = [text.attend(TREE, length, config)[0] for config in configs]
    assert error(results[0], text.want(TREE, length)) < TOLERANCE[shape.dtype]
    assert all(torch.equal(result, results[0]) for result in results[1:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_scratch_rows_are_the_rotated_keys_and_the_values(device, dtype):
    shape = AttentionShape(3, 1, 64, dtype)
    text = Text.random(shape, TREE.num_nodes, 64, device)
    _, keys, values = text.attend(TREE, 20, cuts(shape, device)[0])
    _, key, value = text.split(TREE.num_nodes)
    turn = text.angles[20 + TREE.depth.to(device)].unsqueeze(1)
    assert error(keys, reference.rotate(key, turn)) < TOLERANCE[dtype]
    assert torch.equal(values, value)


@pytest.mark.parametrize("length", [0, 3, 17, 130])
def test_a_token_is_the_same_from_scratch_and_committed(device, length):
    """Every node of the tree, against plain decoding of its path one token at a time."""
    shape = AttentionShape(4, 2, 64, torch.bfloat16)
    text = Text.random(shape, TREE.num_nodes, 256, device)
    configs = cuts(shape, device)
    together, *scratch = text.attend(TREE, length, configs[-1])
    for node in (0, 3, 9):
        cache = text.keys.clone(), text.values.clone()
        for depth, step in enumerate(TREE.path_to(node)):
            alone, *own = text.attend(ROOT, length + depth, configs[0], [step], cache)
            assert torch.equal(alone[0], together[step])
            for rows, new, row in zip(cache, scratch, own, strict=True):
                assert torch.equal(row[0], new[step])
                rows[:, length + depth] = new[step]


def test_a_node_does_not_depend_on_the_nodes_that_are_not_above_it(device):
    shape = AttentionShape(6, 2, 64, torch.bfloat16)
    text = Text.random(shape, 64, 256, device)
    wide = CandidateTree.from_choices([(0,), (0, 0), *((rank,) for rank in range(1, 61))])
    clean = text.attend(wide, 140, cuts(shape, device)[0])[0]
    path = wide.path_to(next(n for n in range(wide.num_nodes) if wide.depth[n] == 2))
    text.qkv[[n for n in range(64) if n not in path]] = torch.nan
    for config in cuts(shape, device):
        dirty = text.attend(wide, 140, config)[0]
        assert torch.equal(clean[path], dirty[path]) and dirty[[n for n in range(63) if n not in path]].isnan().all()


@pytest.mark.parametrize("before", [0, 30, 200])
def test_a_prompts_rows_have_the_bits_of_decoding_them_one_by_one(device, before):
    """A prompt's keys go straight to the cache; depths count back from the end, so that all of them are committed."""
    shape, chunk = AttentionShape(2, 1, 64, torch.bfloat16), 20
    text = Text.random(shape, chunk, 256, device)
    length, depth = int32([before + chunk], device), int32(list(range(-chunk, 0)), device)
    configs = cuts(shape, device)
    cache = text.keys.clone(), text.values.clone()
    fused_ops.rotate_into_cache(text.qkv, text.angles, length, depth, *cache, load=loader(text.qkv.device))
    for config in configs:
        together = tree_attention(
            *(text.qkv, text.angles, length, depth, None, *cache, None),
            AttentionWorkspace(shape, chunk, device, config=config),
            load=loader(text.qkv.device),
        )
        assert together.isfinite().all()
        for row in range(chunk):
            alone, key, value = text.attend(ROOT, before + row, configs[0], [row], cache)
            assert torch.equal(alone[0], together[row])
            assert torch.equal(key[0], cache[0][:, before + row]) and torch.equal(value[0], cache[1][:, before + row])
