"""The decode loop: prefill, then draft -> verify -> accept -> commit until the answer ends.

Tokens in, `DecodeStep`s out; no text, no messages, no clock but each step's own. The root of a step's tree is a token
that is already text; the step emits the accepted drafts and the bonus token after them.
"""

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor, tensor

from engine.accept import accept_exact, accept_typical
from engine.draft import Draft, Drafter
from engine.records import DecodeStep
from engine.runner import Runner
from engine.sampler import sample, target_probabilities
from engine.sampling import SamplingParams
from engine.tree import CandidateTree

__all__ = ["PLAIN", "DecodeLoop"]

PLAIN = CandidateTree.from_choices([])  # the root alone: plain decoding


class Verified(NamedTuple):
    """What a step settled: the accepted path and the token after it."""

    path: list[int]
    bonus: int


class DecodeLoop:
    """One answer in the making. `drafter` None decodes plainly; `seed` is the answer's own."""

    def __init__(self, runner: Runner, drafter: Drafter | None, params: SamplingParams, seed: int) -> None:
        self._runner = runner
        self._drafter = drafter
        self._params = params
        self._seed = seed
        self._hidden: Tensor  # behind the root: where the heads read
        self._root: int

    def prefill(self, tokens: Sequence[int]) -> int:
        """Run the prompt's new tokens and return the answer's first token."""
        self._hidden = self._runner.prefill(tokens)
        self._root = self._next(self._hidden, depth=-1)
        return self._root

    def steps(self, tree: CandidateTree) -> Iterator[DecodeStep]:
        """Yield one record a step, without end; the caller decides when the answer is over."""
        while True:
            started = time.perf_counter()
            fitting = self._fit(tree)
            draft = self._draft(fitting)
            hidden = self._runner.verify(tensor(draft.tokens), fitting)
            path, bonus = self._accept(fitting, draft, hidden)
            self._commit(path, bonus, hidden)
            yield DecodeStep(
                tokens=(*(draft.tokens[node] for node in path[1:]), bonus),
                num_accepted=len(path) - 1,
                path=tuple(path),
                node_tokens=tuple(draft.tokens),
                node_parents=fitting.parents,
                node_probabilities=tuple(draft.probabilities),
                duration_ms=(time.perf_counter() - started) * 1e3,
            )

    def _draft(self, tree: CandidateTree) -> Draft:
        if self._drafter is None or tree.num_drafted == 0:
            return Draft([self._root], [1.0])
        return self._drafter.draft(self._hidden, self._root, tree)

    def _accept(self, tree: CandidateTree, draft: Draft, hidden: Tensor) -> Verified:
        if self._params.acceptance == "typical" and self._params.temperature > 0:
            return self._accept_typical(tree, draft, hidden)
        if self._params.temperature == 0:  # all nodes at once: lm_head is read once
            return Verified(*accept_exact(tree, draft.tokens, self._runner.greedy(hidden).tolist().__getitem__))
        depths = tree.depth.tolist()

        def target(node: int) -> int:  # a draw costs more than lm_head: only nodes on the path pay for it
            return self._next(hidden[node], depths[node])

        return Verified(*accept_exact(tree, draft.tokens, target))

    def _accept_typical(self, tree: CandidateTree, draft: Draft, hidden: Tensor) -> Verified:
        logits = self._runner.logits(hidden)
        probabilities = target_probabilities(logits, self._params)
        path = accept_typical(tree, draft.tokens, probabilities, self._params.epsilon, self._params.delta)
        return Verified(path, self._sample(logits[path[-1]], depth=len(path) - 1))

    def _commit(self, path: list[int], bonus: int, hidden: Tensor) -> None:
        self._runner.commit(path)
        self._hidden, self._root = hidden[path[-1]], bonus

    def _next(self, hidden: Tensor, depth: int) -> int:
        """Choose the token after a hidden state [hidden]."""
        if self._params.temperature == 0:
            return int(self._runner.greedy(hidden.unsqueeze(0)))
        return self._sample(self._runner.logits(hidden.unsqueeze(0))[0], depth)

    def _sample(self, logits: Tensor, depth: int) -> int:
        """Choose the token after the node at `depth`; the root stands at position `num_committed`."""
        return sample(logits, self._params, self._seed, self._runner.num_committed + depth + 1)

    def _fit(self, tree: CandidateTree) -> CandidateTree:
        """Fall back to the root alone where the tree would reach past the model's last position."""
        room = self._runner.config.max_positions - self._runner.num_committed
        return tree if tree.max_depth < room else PLAIN
