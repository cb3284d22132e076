"""What has been said, as counts on the device, and the penalties that follow from it.

A row of logits is penalised for the prompt, the committed answer and the row's own ancestors in the tree, so a node's
chances are those of plain decoding at the same place. Integer counts and elementwise arithmetic only: a row has the
same bits whatever stands beside it, and everything can be captured.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["TextHistory", "apply_penalties"]


class TextHistory:
    """The tokens of one conversation: `in_prompt` bool [vocab] and `answer_counts` int32 [vocab], at fixed places."""

    def __init__(self, vocab_size: int, device: torch.device | str) -> None:
        self.in_prompt = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self.answer_counts = torch.zeros(vocab_size, dtype=torch.int32, device=device)

    def start(self, prompt: Sequence[int]) -> None:
        """Forget everything but `prompt`."""
        self.answer_counts.zero_()
        self.in_prompt.zero_()
        self.in_prompt[torch.tensor(prompt, dtype=torch.int64).to(self.in_prompt.device)] = True

    def add(self, tokens: Tensor, is_part: Tensor) -> None:
        """Count the tokens of the answer where `is_part`: int64 [n], bool [n]."""
        tokens = torch.where(is_part, tokens, 0)  # what is not part may be no token at all
        self.answer_counts.index_add_(0, tokens, is_part.int())

    def counts(self, tokens: Tensor, is_above: Tensor) -> Tensor:
        """Return how often each token stands in the answer up to each row: int32 [rows, vocab].

        tokens int64 [nodes] are those not yet counted; `is_above` bool [rows, nodes] says which of them a row follows.
        """
        rows = self.answer_counts.repeat(len(is_above), 1)
        return rows.scatter_add_(1, tokens.expand(len(is_above), -1), is_above.int())


def apply_penalties(
    logits: Tensor, in_prompt: Tensor, counts: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> Tensor:
    """Return the penalised logits, float32 [rows, vocab]; the penalties are as `SamplingParams` describes them.

    counts int32 [rows, vocab]; repetition, presence and frequency are float32 of one element each.
    """
    is_in_answer = counts > 0
    stretched = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(in_prompt | is_in_answer, stretched, logits)
    return logits - presence * is_in_answer - frequency * counts
