"""The decode loop: prefill, then draft -> verify -> accept -> commit until the answer ends.

Tokens in, `DecodeStep`s out; no text, no messages, no clock but each step's own. The root of a step's tree is a token
that is already text; the step emits the accepted drafts and the bonus token after them.
"""

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, tensor

from engine.accept import accept_exact, accept_typical
from engine.draft import Draft, Drafter
from engine.pruned_tree import PrunedTree, Tree
from engine.records import DecodeStep
from engine.runner import Runner
from engine.sampler import Sampler
from engine.sampling import SamplingParams
from engine.tree import CandidateTree

__all__ = ["PLAIN", "DecodeLoop"]

_SCORED_TOGETHER = 12  # rows of lm_head; more cost more than the few that lie on a path

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
        self._sampler = None if params.is_argmax else Sampler(runner.config.vocab_size, runner.device)
        self._root: int

    def prefill(self, tokens: Sequence[int], cached: Sequence[int] = ()) -> int:
        """Run the prompt's new tokens, after those that are cached, and return the answer's first token."""
        if self._sampler:
            self._sampler.start(self._params, self._seed, [*cached, *tokens])
        hidden = self._runner.prefill(tokens).unsqueeze(0)
        if self._sampler:
            self._root = int(self._sampler.choose(*self._row(self._runner.logits(hidden), [])))
        else:
            self._root = self._runner.greedy(hidden)[0]
        return self._root

    def steps(self, tree: Tree) -> Iterator[DecodeStep]:
        """Yield one record a step, without end; the caller decides when the answer is over."""
        while True:
            started = time.perf_counter()
            fitting, draft = self._draft(self._fit(tree))
            hidden = self._runner.verify(draft.tokens, fitting, for_heads=self._drafter is not None)
            path, bonus = self._accept(fitting, draft, hidden)
            self._commit(path, bonus, draft.tokens)
            yield DecodeStep(
                tokens=(*(draft.tokens[node] for node in path[1:]), bonus),
                num_accepted=len(path) - 1,
                path=tuple(path),
                node_tokens=tuple(draft.tokens),
                node_parents=fitting.parents,
                node_probabilities=tuple(draft.probabilities),
                duration_ms=(time.perf_counter() - started) * 1e3,
            )

    def _draft(self, tree: Tree) -> tuple[CandidateTree, Draft]:
        """Return the tree to verify and its guesses: of a pruned one what this step keeps."""
        if self._drafter is None or tree.num_drafted == 0:
            return PLAIN, Draft([self._root], [1.0])
        draft = self._drafter.draft(self._runner.heads_state(), self._root, tree.filled)
        if not isinstance(tree, PrunedTree):
            return tree, draft
        kept = tree.kept(draft.probabilities)
        return tree.tree_of(kept), draft.of(kept)

    def _accept(self, tree: CandidateTree, draft: Draft, hidden: Tensor) -> Verified:
        sampler, params = self._sampler, self._params
        if sampler is None:  # all nodes at once: lm_head is read once
            return Verified(*accept_exact(tree, draft.tokens, self._runner.greedy(hidden).__getitem__))

        # lm_head is read once for a few rows, which costs as much as for one; only nodes on the way are drawn for.
        scored = self._runner.logits(hidden) if len(hidden) <= _SCORED_TOGETHER else None

        def row(node: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            here = slice(node, node + 1)
            logits = self._runner.logits(hidden[here]) if scored is None else scored[here]
            return self._row(logits, [draft.tokens[above] for above in tree.path_to(node)])

        def target(node: int) -> int:
            return int(sampler.choose(*row(node)))

        def probabilities(node: int) -> Tensor:
            logits, _, tokens, is_above = row(node)
            return sampler.probabilities(logits, tokens, is_above)[0]

        if not params.is_typical:
            return Verified(*accept_exact(tree, draft.tokens, target))
        path = accept_typical(tree, draft.tokens, probabilities, params.epsilon, params.delta)
        return Verified(path, target(path[-1]))

    def _commit(self, path: list[int], bonus: int, tokens: Sequence[int]) -> None:
        if self._sampler:
            said = tensor([tokens[node] for node in path]).to(self._runner.device)
            self._sampler.history.add(said, torch.ones_like(said, dtype=torch.bool))
        self._runner.commit(path)
        self._root = bonus

    def _row(self, logits: Tensor, above: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what the sampler needs to choose from logits [1, vocab] the token after those `above` it."""
        position = tensor([self._runner.num_committed + len(above)]).to(logits.device)
        tokens = tensor(above, dtype=torch.int64).to(logits.device)
        return logits, position, tokens, torch.ones_like(tokens, dtype=torch.bool).unsqueeze(0)

    def _fit(self, tree: Tree) -> Tree:
        """Fall back to the root alone where the tree would reach past the model's last position."""
        room = self._runner.config.max_positions - self._runner.num_committed
        return tree if tree.max_depth < room else PLAIN
