"""What a captured step takes from others: who fills its tree, and who chooses the tokens that follow its nodes."""

from collections.abc import Hashable
from typing import Protocol

from torch import Tensor

from engine.cuda_plan import TreePlan, VerifiedNodes
from engine.kernels.draft_guesses import Unsettled

__all__ = ["ChoosesTokens", "LaunchesDrafts"]


class LaunchesDrafts(Protocol):
    """A drafter that fills the memory's tokens by launches alone; it may leave the last guesses unsettled."""

    sees_path: bool

    def launch(self, plan: TreePlan) -> Unsettled | None: ...

    def settle(self, unsettled: Unsettled) -> None: ...

    def prepare(self, plan: TreePlan) -> None: ...


class ChoosesTokens(Protocol):
    """Chooses the token to follow at every node by launches alone; `kind` says which launches."""

    @property
    def kind(self) -> Hashable: ...

    def launch(self, logits: Tensor, nodes: VerifiedNodes) -> Tensor: ...

    def note_accepted(self) -> None: ...
