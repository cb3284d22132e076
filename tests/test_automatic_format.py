"""Which weight format is chosen where a person did not choose."""

import pytest
import torch

from engine.backbone import BackboneWeights, LayerWeights
from engine.block_weights import DenseWeight
from engine.build import _automatic


def weights(hidden: int, layers: int) -> BackboneWeights:
    """Return weights that have shapes and no content."""

    def matrix(rows: int, columns: int) -> DenseWeight:
        return DenseWeight(torch.empty(rows, columns, device="meta"))

    square, wide = matrix(hidden, hidden), matrix(3 * hidden, hidden)
    norm = torch.empty(hidden, device="meta")
    layer = LayerWeights(square, square, square, square, wide, wide, matrix(hidden, 3 * hidden), norm, norm)
    return BackboneWeights(square, [layer] * layers, norm, square)


@pytest.mark.parametrize(
    ("device", "hidden", "layers", "chosen"),
    [("cuda", 576, 30, "int8"), ("cuda", 4096, 32, "nf4"), ("cpu", 576, 30, "int4"), ("cpu", 4096, 32, "int4")],
)
def test_small_models_keep_more_bits_on_a_gpu(device: str, hidden: int, layers: int, chosen: str) -> None:
    assert _automatic(device, weights(hidden, layers)) == chosen
