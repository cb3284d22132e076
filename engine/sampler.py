"""The sampler whose randomness is keyed by (seed, position): logits in, tokens out.

The number behind the token at absolute position t depends on (seed, t) alone, and the token is a function of the
processed logits and that number. So a token does not depend on what was verified beside it, and the text for a seed is
the same with Medusa on and off. Probabilities are whole numbers (fixed point): their sums are exact in any order, hence
the same for any layout, number of rows and number of threads. Plain tensor operations of static shape that never wait
for the device, so they can be captured; what changes between answers lies in device memory.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from engine.errors import InvalidParameterError
from engine.penalties import TextHistory, apply_penalties
from engine.sampling import SamplingParams

__all__ = ["Kind", "Sampler", "position_uniforms"]

SCALE = 2.0**40  # the likeliest token's weight; the sum over 2^20 tokens is still an int64
_CONTROLS = ("temperature", "top_k", "min_p", "top_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_LONGEST_HEAD = 1024  # up to here, choosing the likeliest tokens is faster than ordering all of them
_LOG_OF_NOTHING = -28.5  # exp of it is less than half of 1 / SCALE
_BLOCK = 256
_INCREMENT, _FIRST, _SECOND = (value - 2**64 for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class Kind(NamedTuple):
    """Which operations an answer needs; a captured step is true for all answers of one kind.

    `head`: how many of the likeliest tokens have to be put in order; 0 for none.
    """

    is_greedy: bool
    has_bias: bool
    has_penalties: bool
    head: int


class Kept(NamedTuple):
    """Weights int64 [rows, n] of the tokens that may be drawn, 0 for others; `tokens` None where n counts them all."""

    weights: Tensor
    tokens: Tensor | None


class Sampler:
    """Chooses the tokens of one answer at a time: bias, penalties, temperature, top_k, min_p, top_p, draw."""

    kind: Kind

    def __init__(self, vocab_size: int, device: torch.device | str) -> None:
        self.vocab_size, self.device = vocab_size, torch.device(device)
        self.history = TextHistory(vocab_size, device)
        self._controls = torch.zeros(len(_CONTROLS), 1, dtype=torch.float64, device=device)
        self._seed = torch.zeros(1, dtype=torch.int64, device=device)
        self._bias = torch.zeros(vocab_size, device=device)

    def start(self, params: SamplingParams, seed: int, prompt: Sequence[int]) -> None:
        """Begin an answer after `prompt`. Raises InvalidParameterError for a bias of a token that the model lacks."""
        bias = self._bias_of(params)
        values = [[float(getattr(params, name))] for name in _CONTROLS]
        self.kind = self._kind_of(params)
        values[_CONTROLS.index("top_k")] = [float(params.top_k or self.vocab_size)]
        self._controls.copy_(torch.tensor(values, dtype=torch.float64))
        self._seed.fill_(seed)
        self._bias.copy_(bias)
        self.history.start(prompt)

    def choose(self, logits: Tensor, positions: Tensor, tokens: Tensor, is_above: Tensor) -> Tensor:
        """Return the token that follows each row, int64 [rows].

        logits float32 [rows, vocab]; positions int64 [rows] of the tokens to choose. tokens int64 [nodes] and is_above
        bool [rows, nodes] are the tokens that rows follow beyond the counted ones (see `TextHistory.counts`).
        """
        logits = self._adjusted(logits, tokens, is_above)
        if self.kind.is_greedy:
            return logits.argmax(-1)
        return _draw(self._kept(logits), position_uniforms(self._seed, positions))

    def probabilities(self, logits: Tensor, tokens: Tensor, is_above: Tensor) -> Tensor:
        """Return the distribution that `choose` draws from: float64 [rows, vocab]. The temperature is above 0."""
        kept = self._kept(self._adjusted(logits, tokens, is_above))
        chances = kept.weights.double() / kept.weights.sum(-1, keepdim=True)
        if kept.tokens is None:
            return chances
        return torch.zeros_like(logits, dtype=torch.float64).scatter_(1, kept.tokens, chances)

    def _kind_of(self, params: SamplingParams) -> Kind:
        is_greedy = params.temperature == 0
        head = 0
        if not is_greedy and 0 < params.top_k <= _LONGEST_HEAD:  # few sizes, so that few steps have to be captured
            head = min(max(32, 1 << (params.top_k - 1).bit_length()), self.vocab_size)
        elif not is_greedy and (params.top_p < 1 or 0 < params.top_k < self.vocab_size):
            head = self.vocab_size
        return Kind(is_greedy, bool(params.logit_bias), params.has_penalties, head)

    def _bias_of(self, params: SamplingParams) -> Tensor:
        bias = torch.zeros(self.vocab_size)
        for token, value in params.logit_bias:
            if token >= self.vocab_size:
                raise InvalidParameterError(
                    f"logit_bias names token {token}; allowed with this model is 0 to {self.vocab_size - 1}."
                )
            bias[token] = value
        return bias

    def _control(self, name: str) -> Tensor:
        return self._controls[_CONTROLS.index(name)]

    def _adjusted(self, logits: Tensor, tokens: Tensor, is_above: Tensor) -> Tensor:
        if self.kind.has_bias:
            logits = logits + self._bias
        if self.kind.has_penalties:
            counts = self.history.counts(tokens, is_above)
            penalties = (self._control(name).float() for name in _CONTROLS[4:])
            logits = apply_penalties(logits, self.history.in_prompt, counts, *penalties)
        return logits

    def _kept(self, logits: Tensor) -> Kept:
        """Apply temperature and filters to [rows, vocab]."""
        best = logits.amax(-1, keepdim=True)
        if len(logits) == 1 and self.device.type == "cpu":
            return self._kept_of_row(logits, best)
        if self.kind.head == 0:
            return Kept(self._weights(logits, best), None)
        values, tokens = _likeliest(logits, self.kind.head)
        weights = self._first(self._weights(values, best))
        return Kept(self._nucleus(weights, weights.sum(-1, keepdim=True)), tokens)

    def _kept_of_row(self, logits: Tensor, best: Tensor) -> Kept:
        """Do the same for one row, looking closely only at tokens that can be drawn. Waits: for a CPU only."""
        temperature, top_k, min_p, top_p = self._controls[:4].flatten().tolist()
        tokens = None
        if min_p > 0:  # few tokens: the others need no exp
            least = max(_LOG_OF_NOTHING, math.log(min_p)) - 0.01  # a little less: floats round
            tokens = (logits[0] >= float(best) + least * temperature).nonzero().flatten()
            logits = logits[:, tokens]
        weights = self._weights(logits, best)
        if self.kind.head == 0:
            return Kept(weights, None if tokens is None else tokens.unsqueeze(0))
        total = weights.sum(-1, keepdim=True)
        if top_k < len(logits[0]):
            is_needed = logits[0] >= logits[0].topk(int(top_k)).values[-1]
        else:  # what has less than an even share of all that the nucleus leaves out is not needed to fill it
            is_needed = weights[0] > int(0.99 * (1 - top_p) * int(total) / self.vocab_size)
        places = is_needed.nonzero().flatten()
        places = places[torch.sort(logits[0, places] + 0.0, descending=True, stable=True).indices]
        kept = self._first(weights[:, places])
        if top_k < len(logits[0]):
            total = kept.sum(-1, keepdim=True)
        return Kept(self._nucleus(kept, total), (places if tokens is None else tokens[places]).unsqueeze(0))

    def _first(self, weights: Tensor) -> Tensor:
        """Keep the first top_k of rows that are in order."""
        return weights * (torch.arange(weights.shape[-1], device=weights.device) < self._control("top_k"))

    def _weights(self, logits: Tensor, best: Tensor) -> Tensor:
        """Return exp((logit - best) / temperature) in fixed point, 0 below min_p."""
        weights = (torch.exp((logits.double() - best) / self._control("temperature")) * SCALE).round()
        return (weights * (weights >= self._control("min_p") * SCALE)).long()

    def _nucleus(self, weights: Tensor, total: Tensor) -> Tensor:
        """Keep the likeliest tokens, which come first, until they hold top_p of the total."""
        before = _running_sums(weights) - weights
        return torch.where(before < self._control("top_p") * total, weights, 0)


def position_uniforms(seed: Tensor, positions: Tensor) -> Tensor:
    """Return the uniform numbers in [0, 1) of the tokens at absolute `positions`: int64 [rows] -> float64 [rows].

    Two rounds of splitmix64, a counter-based generator: any position can be asked for in any order.
    """
    return _shifted(_mix(_mix(seed) + positions), 11).double() * 2.0**-53


def _mix(value: Tensor) -> Tensor:
    value = value + _INCREMENT  # int64 wraps around, as the generator wants it
    value = (value ^ _shifted(value, 30)) * _FIRST
    value = (value ^ _shifted(value, 27)) * _SECOND
    return value ^ _shifted(value, 31)


def _shifted(value: Tensor, bits: int) -> Tensor:
    """Shift right without the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _likeliest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` largest logits and their tokens, both [rows, count]; of equals the lower token first."""
    logits = logits + 0.0  # -0 equals 0 but has other bits
    vocab_size = logits.shape[-1]
    if count == vocab_size:
        return torch.sort(logits, dim=-1, descending=True, stable=True)
    bits = logits.view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()  # orders as the floats do
    lower_first = torch.arange(vocab_size - 1, -1, -1, device=logits.device)
    keys = ((ordered << 32) | lower_first).topk(count).values
    tokens = vocab_size - 1 - (keys & 0xFFFFFFFF)
    return logits.gather(-1, tokens), tokens


def _running_sums(weights: Tensor) -> Tensor:
    """Return the inclusive sums along each row; in blocks, as one long row occupies a single part of a GPU."""
    rows, count = weights.shape
    blocks = functional.pad(weights, (0, -count % _BLOCK)).view(rows, -1, _BLOCK).cumsum(-1)
    ends = blocks[:, :, -1]
    before = ends.cumsum(-1) - ends
    return (blocks + before.unsqueeze(-1)).view(rows, -1)[:, :count]


def _draw(kept: Kept, uniforms: Tensor) -> Tensor:
    """Draw a token for each row by inverse CDF: uniforms float64 [rows] -> int64 [rows]."""
    sums = _running_sums(kept.weights)
    total = sums[:, -1]
    threshold = torch.minimum((uniforms * total).long(), total - 1)  # the product may round up to the total
    place = (sums <= threshold.unsqueeze(-1)).sum(-1)
    return place if kept.tokens is None else kept.tokens.gather(-1, place.unsqueeze(-1)).squeeze(-1)
