"""Build `MedusaHeads` from the tensors that a layout names, and refuse what does not fit the loaded model.

Every tensor is checked before it is used: sizes against the model's with both numbers, values for NaN, draft token ids
for their range. Which format the names came from is not known here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import CheckpointMismatchError
from engine.heads import HeadsConfig, MedusaHeads
from engine.models.head_layout import HeadLayout
from engine.models.tensor_files import TensorFiles

__all__ = ["HeadsAssembler", "Target", "check_finite", "check_size"]


@dataclass(frozen=True)
class Target:
    """The model that heads are loaded for; `lm_head` gives its output matrix [vocab, hidden] where that is known."""

    hidden_size: int
    vocab_size: int
    name: str | None = None
    lm_head: Callable[[], Tensor] | None = None


def check_size(file: Path, what: str, size: int, target: Target, base_name: str | None) -> None:
    wanted = {"hidden size": target.hidden_size, "vocabulary": target.vocab_size}[what]
    if size != wanted:
        made_for = f" ({base_name})" if base_name else ""
        raise CheckpointMismatchError(
            f"The heads in {file} were made for a {what} of {size}{made_for}, but {target.name or 'the loaded model'} "
            f"has {wanted}. Load the model they were made for, or train heads for this one."
        )


def check_finite(tensor: Tensor, name: str, file: Path) -> None:
    if not torch.isfinite(tensor).all():
        raise CheckpointMismatchError(
            f"{name} in {file} holds NaN or infinite values; "
            "its training failed or the file is damaged, get another copy."
        )


class HeadsAssembler:
    """Reads the tensors of one layout, checks each, and builds the heads."""

    def __init__(self, source: TensorFiles, layout: HeadLayout, target: Target, base_name: str | None) -> None:
        self.source = source
        self.layout = layout
        self.target = target
        self.base_name = base_name

    def heads(self) -> MedusaHeads:
        self.check_sizes()
        dtype = self._dtype()
        token_map = self._token_map()
        state = self._blocks(dtype)
        outputs = self._outputs(dtype, token_map)
        state |= outputs
        if token_map is not None:
            state["token_map"] = token_map
        with torch.device("meta"):  # the values come from the checkpoint; initial ones would only cost time
            heads = MedusaHeads(self._config(bool(outputs), token_map), token_map)
        heads.load_state_dict(state, assign=True)
        return heads.requires_grad_(False)

    def _config(self, has_outputs: bool, token_map: Tensor | None) -> HeadsConfig:
        full, truncated = ("own", "own_truncated") if has_outputs else ("shared", "truncated")
        return HeadsConfig(
            hidden_size=self.target.hidden_size,
            vocab_size=self.target.vocab_size,
            num_heads=self.layout.num_heads,
            num_layers=self.layout.num_layers,
            output=full if token_map is None else truncated,
            draft_vocab=0 if token_map is None else len(token_map),
        )

    def check_sizes(self) -> None:
        """Compare the file with the target by its first matrices, which give the clearest message."""
        self._check("hidden size", self._matrix_shape(self.layout.weights[0][0])[1])
        if self.layout.outputs:
            rows, columns = self._matrix_shape(self.layout.outputs[0])
            self._check("hidden size", columns)
            if self.layout.token_map is None:
                self._check("vocabulary", rows)

    def _matrix_shape(self, name: str) -> tuple[int, int]:
        shape = self.source.shape(name)
        if len(shape) != 2:
            raise CheckpointMismatchError(
                f"{name} in {self.source.path} has shape {list(shape)}, not a matrix's; get another copy."
            )
        return shape[0], shape[1]

    def _check(self, what: str, size: int) -> None:
        check_size(self.source.path, what, size, self.target, self.base_name)

    def _dtype(self) -> torch.dtype:
        return self.source.tensor(self.layout.weights[0][0]).dtype

    def _token_map(self) -> Tensor | None:
        name = self.layout.token_map
        if name is None:
            return None
        tokens = self.source.tensor(name)
        if tokens.dim() != 1 or tokens.is_floating_point() or not len(tokens):
            raise CheckpointMismatchError(f"{name} is {tokens.dtype} of shape {list(tokens.shape)}, not token ids.")
        tokens = tokens.long().clone()
        lowest, highest = int(tokens.min()), int(tokens.max())
        if lowest < 0 or highest >= self.target.vocab_size:
            raise CheckpointMismatchError(
                f"{name} holds token ids from {lowest} to {highest}, but the loaded model has "
                f"{self.target.vocab_size} tokens; these heads belong to another model."
            )
        if len(tokens.unique()) != len(tokens):
            raise CheckpointMismatchError(f"{name} names a token twice; export the heads again.")
        return tokens

    def _blocks(self, dtype: torch.dtype) -> dict[str, Tensor]:
        hidden = self.target.hidden_size
        state = {}
        for head in range(self.layout.num_heads):
            for layer in range(self.layout.num_layers):
                place = f"heads.{head}.blocks.{layer}.linear"
                state[f"{place}.weight"] = self._take(self.layout.weights[head][layer], (hidden, hidden), dtype)
                bias = self.layout.biases[head][layer]
                zeros = torch.zeros(hidden, dtype=dtype)
                state[f"{place}.bias"] = zeros if bias is None else self._take(bias, (hidden,), dtype)
        return state

    def _outputs(self, dtype: torch.dtype, token_map: Tensor | None) -> dict[str, Tensor]:
        """Return one matrix a head; heads that share one share its memory. Empty if all are the target's lm_head."""
        taken: dict[str, Tensor] = {}
        for name in self.layout.outputs:
            if name not in taken:
                taken[name] = self._output(name, dtype, token_map)
        if taken and self._are_lm_head(list(taken.values()), token_map):
            return {}
        return {f"outputs.{head}.weight": taken[name] for head, name in enumerate(self.layout.outputs)}

    def _output(self, name: str, dtype: torch.dtype, token_map: Tensor | None) -> Tensor:
        vocab, hidden = self.target.vocab_size, self.target.hidden_size
        if token_map is None:
            return self._take(name, (vocab, hidden), dtype)
        is_full = self.source.shape(name) == (vocab, hidden) and len(token_map) < vocab
        matrix = self._take(name, (vocab if is_full else len(token_map), hidden), dtype)
        return matrix[token_map] if is_full else matrix

    def _are_lm_head(self, outputs: list[Tensor], token_map: Tensor | None) -> bool:
        if self.target.lm_head is None:
            return False
        rows = self.target.lm_head()
        rows = (rows if token_map is None else rows[token_map]).to(outputs[0].dtype)
        return all(torch.equal(output, rows) for output in outputs)

    def _take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Read a tensor into memory of its own, or refuse its shape, type or values."""
        found = self.source.shape(name)
        if found != shape:
            raise CheckpointMismatchError(
                f"{name} in {self.source.path} has shape {list(found)}, but {list(shape)} is needed; "
                "the heads are damaged or belong to another model."
            )
        tensor = self.source.tensor(name)
        if not tensor.is_floating_point():
            raise CheckpointMismatchError(f"{name} is stored as {tensor.dtype}; only float types can be loaded.")
        check_finite(tensor, name, self.source.path)
        return tensor.to(dtype, copy=True)
