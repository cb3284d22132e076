"""Quantised linears: packing keeps codes, results are close to the dense product, rows do not feel their neighbours."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, dequantize, quantize

from engine.block_weights import DenseWeight, Q4Affine, Q8Symmetric, concat_rows, quantize_q4
from engine.linear import Int8Linear, PackedInt4Linear, QuantizedEmbedding, RowwiseLinear
from engine.models.gguf_file import _read_q4, _read_q8

ROWS = [1, 2, 3, 5, 8, 17, 33, 64]


def values(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns) / columns**0.5


@pytest.mark.parametrize(("kind", "has_minimum"), [("Q4_1", True), ("Q4_0", False)])
def test_q4_blocks_read_as_the_gguf_package_reads_them(kind: str, has_minimum: bool) -> None:
    format_ = GGMLQuantizationType[kind]
    data = quantize(values(16, 64).numpy(), format_)
    ours = _read_q4(data, has_minimum).dequantize().numpy()
    np.testing.assert_allclose(ours, dequantize(data, format_), rtol=0, atol=1e-6)


def test_q8_blocks_read_as_the_gguf_package_reads_them() -> None:
    data = quantize(values(16, 64).numpy(), GGMLQuantizationType.Q8_0)
    expected = dequantize(data, GGMLQuantizationType.Q8_0)
    np.testing.assert_allclose(_read_q8(data).dequantize().numpy(), expected, rtol=0, atol=1e-7)


def test_int4_packing_changes_no_code() -> None:
    """With an identity input every weight comes out by itself: code by code against the blocks' own values."""
    codes = torch.randint(0, 16, (32, 64), dtype=torch.uint8)
    scale = torch.tensor([0.5, 0.25]).half().repeat(32, 1)
    weight = Q4Affine(codes, scale, -8 * scale)
    out = PackedInt4Linear(weight)(torch.eye(64, dtype=torch.bfloat16))
    assert torch.equal(out.float().t(), weight.dequantize())


@pytest.mark.parametrize("build", [lambda w: PackedInt4Linear(quantize_q4(w)), lambda w: Int8Linear(DenseWeight(w))])
def test_quantised_products_are_close(build) -> None:
    weight, x = values(96, 128), torch.randn(7, 128)
    expected = x @ weight.t()
    error = (build(weight)(x.bfloat16()).float() - expected).norm() / expected.norm()
    assert error < 0.12


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", [(960, 576), (576, 1536), (4096, 576)])
def test_a_rows_result_is_the_same_whatever_stands_beside_it(shape: tuple[int, int], rows: int) -> None:
    weight, x = values(*shape), torch.randn(rows, shape[1]).bfloat16()
    for linear in (
        PackedInt4Linear(quantize_q4(weight)),
        Int8Linear(DenseWeight(weight)),
        RowwiseLinear(DenseWeight(weight), torch.bfloat16),
    ):
        together = linear(x)
        alone = torch.cat([linear(row) for row in x.split(1)])
        assert torch.equal(together, alone), type(linear).__name__


def test_embedding_rows_are_the_blocks_values() -> None:
    weight = Q8Symmetric(torch.randint(-127, 128, (10, 64), dtype=torch.int8), torch.rand(10, 2).half())
    rows = QuantizedEmbedding(weight, torch.float32)(torch.tensor([[3, 9]]))
    assert torch.equal(rows, weight.dequantize()[[3, 9]].unsqueeze(0))


def test_concatenation_keeps_blocks_of_one_kind_and_values_of_several() -> None:
    one, two = quantize_q4(values(4, 64)), quantize_q4(values(8, 64))
    joined = concat_rows([one, two])
    assert isinstance(joined, Q4Affine)
    expected = torch.cat([one.dequantize(), two.dequantize()])
    assert torch.equal(joined.dequantize(), expected)
    mixed = concat_rows([one, DenseWeight(two.dequantize())])
    assert torch.equal(mixed.dequantize(), expected)


def test_quantize_q4_keeps_constant_blocks_finite() -> None:
    assert torch.equal(quantize_q4(torch.zeros(2, 32)).dequantize(), torch.zeros(2, 32))
