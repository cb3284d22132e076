"""Where a checkpoint keeps each part of its draft heads: tensor names only, no values.

Every public format is read into a `HeadLayout` by its own module; how many heads and layers there are follows from
the names, never from a config.json. A layout is complete: gaps are refused here.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, islice

from engine.errors import CheckpointMismatchError

__all__ = ["HeadLayout", "build_layout"]


@dataclass(frozen=True)
class HeadLayout:
    """Tensor names by role.

    `weights[head][layer]` and `biases[head][layer]` (None without bias) are the residual blocks; `outputs` names one
    matrix a head, the same name repeated where they share one, and is empty where the backbone's `lm_head` is used.
    """

    format: str
    weights: list[list[str]]
    biases: list[list[str | None]]
    outputs: list[str]
    token_map: str | None = None

    @property
    def num_heads(self) -> int:
        return len(self.weights)

    @property
    def num_layers(self) -> int:
        return len(self.weights[0])

    @property
    def names(self) -> list[str]:
        """Every tensor that belongs to the heads."""
        blocks = [*chain.from_iterable(self.weights), *chain.from_iterable(self.biases)]
        return list(dict.fromkeys(name for name in [*blocks, *self.outputs, self.token_map] if name is not None))


def build_layout(
    file_format: str,
    weights: Mapping[tuple[int, int], str],
    biases: Mapping[tuple[int, int], str],
    outputs: Mapping[int, str],
    token_map: str | None = None,
) -> HeadLayout:
    """Order names found by (head, layer) into a layout, or raise CheckpointMismatchError naming what is missing.

    `outputs` maps heads to matrices; none at all means the backbone's `lm_head`. Biases are all there or not at all.
    """
    num_heads = 1 + max(head for head, _ in weights)
    num_layers = 1 + max(layer for _, layer in weights)
    places = ((head, layer) for head in range(num_heads) for layer in range(num_layers))
    _need_all("the block weights (head, layer)", places, weights)
    if biases:
        _need_all("the block biases (head, layer)", weights, biases)
    if outputs:
        _need_all("the output matrices of heads", range(num_heads), outputs)
    for kind, unknown in (("biases", set(biases) - set(weights)), ("outputs", set(outputs) - set(range(num_heads)))):
        if unknown:
            raise CheckpointMismatchError(
                f"The heads have {kind} at {sorted(unknown)} without a residual block there; "
                "the checkpoint is incomplete, download or export it again."
            )
    return HeadLayout(
        format=file_format,
        weights=[[weights[head, layer] for layer in range(num_layers)] for head in range(num_heads)],
        biases=[[biases.get((head, layer)) for layer in range(num_layers)] for head in range(num_heads)],
        outputs=[outputs[head] for head in range(num_heads)] if outputs else [],
        token_map=token_map,
    )


def _need_all(what: str, expected: Iterable[object], found: Mapping) -> None:
    # Stops at a few gaps: a damaged name may count to a billion.
    missing = [str(place) for place in islice((place for place in expected if place not in found), 4)]
    if missing:
        raise CheckpointMismatchError(
            f"The heads lack {what} at {', '.join(missing)}; the checkpoint is incomplete, download or export it again."
        )
