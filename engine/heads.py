"""MEDUSA draft heads: from the backbone's last hidden state to guesses for the tokens after the next one.

Head i (from 0) reads the hidden state at position t, after the final norm, and guesses the token at t+2+i; the token at
t+1 is the backbone's own (the root of the tree). A head is a stack of residual blocks and an output matrix (MEDUSA,
arXiv 2401.10774, section 2.1.1). Variants are data in `HeadsConfig`: depth, width, which tokens a head sees besides
the hidden state, and which output matrix it uses. The tree's shape and the verification are not known here.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from engine.errors import InvalidParameterError
from engine.prefix_attention import PrefixAttention, PrefixConfig

__all__ = ["HeadsConfig", "MedusaHead", "MedusaHeads", "parameter_count", "seen_embeddings"]

SEES = ("hidden", "root", "path")
OUTPUTS = ("own", "shared", "truncated", "own_truncated")


@dataclass(frozen=True)
class HeadsConfig:
    """The shape of a set of heads.

    - `width` None is the paper's block x + SiLU(W x + b); a number is the wide block x + D SiLU(U x).
    - `sees`: "hidden" is MEDUSA; "root" adds the root token's embedding, which is known when drafting starts;
      "path" adds every token between the hidden state and the guess, as in Hydra (arXiv 2402.05109).
    - `output`: "own" a [vocab, hidden] matrix a head, "shared" the backbone's `lm_head`, "truncated" the rows of
      `lm_head` for the draft vocabulary, "own_truncated" an own matrix over the draft vocabulary.
    - `draft_vocab` is the size of the draft vocabulary, 0 for the full one. `frequent_first`: it is in order of use,
      so that a machine for which scores are dear may draft from its first tokens alone.
    - `prefix`: heads read the hidden state through a `PrefixAttention` of that shape.
    """

    hidden_size: int
    vocab_size: int
    num_heads: int = 4
    num_layers: int = 1
    width: int | None = None
    sees: str = "hidden"
    output: str = "shared"
    draft_vocab: int = 0
    frequent_first: bool = False
    prefix: PrefixConfig | None = None

    def __post_init__(self) -> None:
        _one_of("sees", self.sees, SEES)
        _one_of("output", self.output, OUTPUTS)
        if self.num_heads < 1 or self.num_layers < 1:
            raise InvalidParameterError(f"{self.num_heads} heads of {self.num_layers} layers; both must be 1 or more.")
        if self.sees != "hidden" and self.width is None:
            raise InvalidParameterError(f"sees={self.sees} needs wide blocks; give a width, for example 2048.")
        if ("truncated" in self.output) != (self.draft_vocab > 0):
            raise InvalidParameterError(
                f"output={self.output} does not fit a draft vocabulary of {self.draft_vocab} tokens."
            )

    @property
    def output_size(self) -> int:
        return self.draft_vocab or self.vocab_size

    def num_seen(self, head: int) -> int:
        """Tokens that `head` sees besides the hidden state."""
        return {"hidden": 0, "root": 1, "path": head + 1}[self.sees]

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "HeadsConfig":
        """Read what `to_dict` wrote, also after JSON. Raises TypeError for names that this version does not know."""
        prefix = values.get("prefix")
        if prefix is not None:
            prefix = PrefixConfig(**{**prefix, "layers": tuple(prefix["layers"])})
        return HeadsConfig(**{**values, "prefix": prefix})


class PaperBlock(nn.Module):
    """x + SiLU(W x + b), with W and b zero at the start so that the head begins as the identity."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, hidden_size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.linear(x))


class WideBlock(nn.Module):
    """x + D SiLU(U x + sum_j S_j e_j), with D zero at the start; e_j are the embeddings of the tokens seen."""

    def __init__(self, hidden_size: int, width: int, num_seen: int = 0) -> None:
        super().__init__()
        self.up = nn.Linear(hidden_size, width, bias=False)
        self.seen = nn.ModuleList(nn.Linear(hidden_size, width, bias=False) for _ in range(num_seen))
        self.down = nn.Linear(width, hidden_size, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor, embeddings: Tensor | None = None) -> Tensor:
        """Apply the block: x [..., hidden], embeddings [..., num_seen, hidden] -> [..., hidden]."""
        inner = self.up(x)
        for slot, project in enumerate(self.seen):
            assert embeddings is not None, "this block was built to see tokens"
            inner = inner + project(embeddings[..., slot, :])
        return x + self.down(F.silu(inner))


class MedusaHead(nn.Module):
    """One head's residual blocks: hidden [..., hidden] (and token embeddings) -> features [..., hidden]."""

    def __init__(self, config: HeadsConfig, head: int) -> None:
        super().__init__()
        self.num_seen = config.num_seen(head)
        if config.width is None:
            blocks: list[nn.Module] = [PaperBlock(config.hidden_size) for _ in range(config.num_layers)]
        else:
            seen = [self.num_seen] + [0] * (config.num_layers - 1)
            blocks = [WideBlock(config.hidden_size, config.width, count) for count in seen]
        self.blocks = nn.ModuleList(blocks)

    def forward(self, hidden: Tensor, embeddings: Tensor | None = None) -> Tensor:
        first, *rest = self.blocks
        x = first(hidden, embeddings) if self.num_seen else first(hidden)
        for block in rest:
            x = block(x)
        return x


class MedusaHeads(nn.Module):
    """K heads over one backbone.

    `shared_output` is the backbone's `lm_head` as a callable [..., hidden] -> [..., vocab] (not a parameter of the
    heads); for "truncated" output it must already give the draft vocabulary's rows. `embed` maps token ids to
    embeddings [..., hidden]; it is needed where the heads see tokens. `token_map` [draft_vocab] holds the full id of
    every draft token. Where there is a `prefix`, the heads' hidden states are what it returns.
    """

    token_map: Tensor | None

    def __init__(self, config: HeadsConfig, token_map: Tensor | None = None) -> None:
        super().__init__()
        self.config = config
        self.prefix = None if config.prefix is None else PrefixAttention(config.prefix, config.hidden_size)
        self.heads = nn.ModuleList(MedusaHead(config, head) for head in range(config.num_heads))
        if config.output.startswith("own"):
            self.outputs = nn.ModuleList(
                nn.Linear(config.hidden_size, config.output_size, bias=False) for _ in range(config.num_heads)
            )
        if (token_map is None) != (config.draft_vocab == 0):
            raise InvalidParameterError(
                f"A draft vocabulary of {config.draft_vocab} tokens needs a token map of that length."
            )
        self.register_buffer("token_map", token_map)

    def features(self, head: int, hidden: Tensor, seen: Tensor | None = None) -> Tensor:
        """Return what `head`'s output matrix is applied to.

        hidden [..., hidden]; seen [..., num_seen(head), hidden]: normalised embeddings (`seen_embeddings`) of the
        tokens at t+1, t+2, ... in order -> [..., hidden].
        """
        return self.heads[head](hidden, seen)

    def logits(self, head: int, features: Tensor, shared_output: nn.Module | None) -> Tensor:
        """Return scores over the draft vocabulary (or the full one), [..., output_size]."""
        if self.config.output.startswith("own"):
            return self.outputs[head](features)
        assert shared_output is not None, "shared output heads need the backbone's lm_head"
        return shared_output(features)

    def to_token_ids(self, draft_ids: Tensor) -> Tensor:
        """Map indices into the draft vocabulary to the backbone's token ids, any shape."""
        return draft_ids if self.token_map is None else self.token_map[draft_ids]


def seen_embeddings(embeddings: Tensor) -> Tensor:
    """Scale token embeddings to unit RMS: their own scale is far below the normalised hidden state's."""
    return F.rms_norm(embeddings.float(), embeddings.shape[-1:], eps=1e-6).to(embeddings.dtype)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InvalidParameterError(f"{name} is {value!r}; allowed is one of {', '.join(allowed)}.")


def parameter_count(heads: nn.Module) -> int:
    """Count trainable numbers, without buffers."""
    return sum(parameter.numel() for parameter in heads.parameters())
