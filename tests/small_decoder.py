"""A small random decoder and random trees, for tests of the CPU kernels."""

import random

import torch

from engine.backbone import BackboneConfig, BackboneWeights, LayerWeights
from engine.block_weights import DenseWeight, Weight, quantize_q4
from engine.kernels.cpu_native import to_q8
from engine.tree import CandidateTree

CONFIG = BackboneConfig(
    hidden_size=96,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=32,
    intermediate_size=160,
    vocab_size=211,
    rope_theta=10000.0,
    rms_norm_eps=1e-5,
    max_positions=400,
)


def random_weights(config: BackboneConfig) -> BackboneWeights:
    """A random model in which attention and MLP both matter."""

    def matrix(n: int, k: int, kind: str = "q4") -> Weight:
        values = torch.randn(n, k) * (2.0 / k**0.5)
        return quantize_q4(values) if kind == "q4" else to_q8(DenseWeight(values))

    hidden, inner = config.hidden_size, config.intermediate_size
    wide, narrow = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layers = [
        LayerWeights(
            query=matrix(wide, hidden),
            key=matrix(narrow, hidden, "q8"),
            value=matrix(narrow, hidden),
            attention_output=matrix(hidden, wide),
            gate=matrix(inner, hidden),
            up=matrix(inner, hidden),
            down=matrix(hidden, inner, "q8"),
            attention_norm=torch.rand(hidden) + 0.5,
            mlp_norm=torch.rand(hidden) + 0.5,
        )
        for _ in range(config.num_layers)
    ]
    embedding = matrix(config.vocab_size, hidden, "q8")
    return BackboneWeights(embedding, layers, torch.rand(hidden) + 0.5, embedding)


def random_tree(draw: random.Random, num_nodes: int) -> CandidateTree:
    """Grow a tree by random children; some are long chains, some wide."""
    choices: list[tuple[int, ...]] = [()]
    reach = draw.choice([1, 3, 1000])  # how far back a parent may be: chains to bushes
    while len(choices) < num_nodes:
        child = (*draw.choice(choices[-reach:]), draw.randrange(6))
        if child not in choices:
            choices.append(child)
    return CandidateTree.from_choices(choices[1:])
