"""Drafting: fill a candidate tree with the heads' guesses.

Heads that see only the hidden state or the root guess all depths at once; heads that see the path are asked depth by
depth, for the nodes that have children. Guesses need no exactness, so the head matrices may be quantised freely.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from engine.heads import MedusaHeads, seen_embeddings
from engine.tree import CandidateTree

__all__ = ["Draft", "Drafter", "HeadsDrafter"]


class Draft(NamedTuple):
    """Tokens of all nodes, root first, and the head's probability of each (the root's is 1)."""

    tokens: list[int]
    probabilities: list[float]

    def of(self, nodes: Sequence[int]) -> "Draft":
        """Return what belongs to these nodes."""
        return Draft(*([part[node] for node in nodes] for part in self))


class Drafter(Protocol):
    """Whatever proposes tokens for a tree."""

    max_depth: int
    num_scored: int  # tokens among which it guesses

    def draft(self, hidden: Tensor, root: int, tree: CandidateTree) -> Draft:
        """Guess from the hidden state [hidden] behind `root`, the token that the backbone chose there."""
        ...

    def memory_bytes(self) -> int:
        """Bytes held by the heads and their work memory."""
        ...


class HeadsDrafter:
    """Drafts with MEDUSA heads. `embed` maps ids [...] to [..., hidden]; `shared_output` as in `MedusaHeads.logits`."""

    def __init__(self, heads: MedusaHeads, embed: Callable[[Tensor], Tensor], shared_output: nn.Module | None) -> None:
        self.heads = heads
        self.max_depth, self.num_scored = heads.config.num_heads, heads.config.output_size
        self._embed = embed
        self._shared_output = shared_output

    @torch.inference_mode()
    def draft(self, hidden: Tensor, root: int, tree: CandidateTree) -> Draft:
        tokens, probabilities = [root] + [0] * tree.num_drafted, [1.0] * tree.num_nodes
        for head, ranks in enumerate(tree.ranks_by_depth):
            parents = _parents_at(tree, head)
            guesses, chances = self._guess(head, ranks, hidden, [self._seen(tree, tokens, node) for node in parents])
            for row, parent in enumerate(parents):
                for child in tree.children[parent]:
                    rank = tree.choices[child - 1][-1]
                    tokens[child], probabilities[child] = guesses[row][rank], chances[row][rank]
        return Draft(tokens, probabilities)

    def memory_bytes(self) -> int:
        shared = [] if self._shared_output is None else [self._shared_output]
        held = [tensor for part in (self.heads, *shared) for tensor in (*part.parameters(), *part.buffers())]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def _seen(self, tree: CandidateTree, tokens: list[int], parent: int) -> list[int]:
        """Tokens that the head of `parent`'s children sees."""
        path = [tokens[node] for node in tree.path_to(parent)]
        return path[: self.heads.config.num_seen(len(path) - 1)]

    def _guess(
        self, head: int, ranks: int, hidden: Tensor, seen: list[list[int]]
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Return each row's best tokens and their probabilities; equal rows are computed once."""
        distinct = [list(row) for row in dict.fromkeys(tuple(row) for row in seen)]
        rows = hidden.expand(len(distinct), -1)
        embeddings = None
        if seen[0]:
            embeddings = seen_embeddings(self._embed(torch.tensor(distinct))).to(hidden.device)
        scores = self.heads.logits(head, self.heads.features(head, rows, embeddings), self._shared_output).float()
        best = scores.topk(ranks, dim=-1)
        chances = torch.exp(best.values - scores.logsumexp(-1, keepdim=True)).tolist()
        tokens = self.heads.to_token_ids(best.indices).tolist()
        place = [distinct.index(list(row)) for row in seen]
        return [tokens[row] for row in place], [chances[row] for row in place]


def _parents_at(tree: CandidateTree, depth: int) -> list[int]:
    """Nodes of one depth that have children."""
    return [node for node in range(tree.num_nodes) if tree.children[node] and len(tree.path_to(node)) == depth + 1]
