"""The batched decoder and the conversations on top of it, on a small random model in float32."""

from random import Random

import pytest
import torch
from torch import nn

from engine.backbone import Backbone, BackboneConfig, BackboneWeights, LayerWeights
from engine.block_weights import DenseWeight
from engine.linear import DenseLinear
from engine.training.batch_decoder import BatchDecoder, Placement
from engine.training.dense import attend_causal
from engine.training.filters import QueryFilter, repetition
from engine.training.topics import draw_request, draw_system_line

CONFIG = BackboneConfig(32, 2, 4, 2, 8, 48, 61, 10000.0, 1e-5, 64)
END = 60


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> DenseWeight:
        return DenseWeight(torch.randn(rows, columns, generator=generator) / columns**0.5)

    def layer() -> LayerWeights:
        c = CONFIG
        return LayerWeights(
            matrix(c.num_heads * c.head_dim, 32), matrix(c.num_kv_heads * c.head_dim, 32),
            matrix(c.num_kv_heads * c.head_dim, 32), matrix(32, 32), matrix(48, 32), matrix(48, 32), matrix(32, 48),
            torch.ones(32), torch.ones(32),
        )  # fmt: skip

    embedding = DenseWeight(torch.randn(61, 32, generator=generator))
    weights = BackboneWeights(embedding, [layer(), layer()], torch.ones(32), embedding)

    def linear(weight) -> DenseLinear:
        return DenseLinear(weight, torch.float32)

    embed = nn.Embedding.from_pretrained(embedding.values)
    return Backbone(CONFIG, weights, embed=embed, linear=linear, lm_head=linear(embedding), dtype=torch.float32)


@torch.no_grad()
def plain_greedy(backbone: Backbone, prompt: list[int], limit: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < limit and (tokens[-1] != END or len(tokens) == len(prompt)):
        row = torch.tensor([tokens])
        hidden = backbone(row, torch.arange(len(tokens)).unsqueeze(0), attend_causal)
        tokens.append(int(backbone.lm_head(hidden[0, -1]).argmax()))
    return tokens


def _text(decoder: BatchDecoder, slot: int) -> list[int]:
    state = decoder.snapshot()
    return state.tokens[slot, : int(state.position[slot]) + 1].tolist()


@pytest.mark.parametrize("prefix", [(), (5, 9, 11)])
def test_slots_of_different_lengths_write_what_plain_decoding_writes(backbone: Backbone, prefix: tuple) -> None:
    decoder = BatchDecoder(backbone, 3, 40, [END], prefix)
    prompts = [[5, 9, 11, 20], [5, 9, 11, 20, 31, 8, 2], [7]]
    limits = [20, 33, 11]
    decoder.place([Placement(slot, prompts[slot], limits[slot], 0.0) for slot in range(3)])
    decoder.run(40)
    assert bool(decoder.snapshot().is_done.all())
    for slot in range(3):
        assert _text(decoder, slot) == plain_greedy(backbone, prompts[slot], limits[slot])


def test_a_slot_is_extended_and_refilled_while_others_run(backbone: Backbone) -> None:
    decoder = BatchDecoder(backbone, 2, 60, [END], (5, 9))
    decoder.place([Placement(0, [5, 9, 3], 10, 0.0), Placement(1, [4, 4], 50, 0.0)])
    decoder.run(12)
    first = _text(decoder, 0)
    decoder.place([Placement(0, [17, 18, 19], 30, 0.0, start=len(first))])
    decoder.run(30)
    assert _text(decoder, 0) == plain_greedy(backbone, [*first, 17, 18, 19], 30)
    decoder.place([Placement(0, [5, 9, 44, 2], 16, 0.0)])
    decoder.run(30)
    assert _text(decoder, 0) == plain_greedy(backbone, [5, 9, 44, 2], 16)
    assert _text(decoder, 1) == plain_greedy(backbone, [4, 4], 50)


def test_drawn_slots_vary_and_greedy_ones_do_not(backbone: Backbone) -> None:
    decoder = BatchDecoder(backbone, 4, 40, [END])
    decoder.place([Placement(slot, [5, 6], 30, 0.0 if slot < 2 else 5.0) for slot in range(4)])
    decoder.run(40)
    texts = [_text(decoder, slot) for slot in range(4)]
    assert texts[0] == texts[1] and texts[2] != texts[3]


def test_queries_are_accepted_once_and_never_near_held_out_prompts() -> None:
    queries = QueryFilter(["How does a refrigerator keep food cold?"])
    assert queries.accept("Why do cats purr at night?")
    assert not queries.accept("why do cats  PURR at night")
    assert not queries.accept("How does the refrigerator keep my food cold?")
    assert not queries.accept("hi")
    assert not queries.accept("the same word again " * 20)
    assert not queries.accept("1234 5678 9101 1121 3141 5161 7181 92 02 1")


def test_repetition_counts_repeated_runs() -> None:
    assert repetition([1, 2, 3, 4, 5], 2) == 0
    assert repetition([1, 2] * 10, 2) == pytest.approx(1 - 2 / 19)


def test_topics_spread_and_depend_on_the_seed_alone() -> None:
    lines = [draw_system_line(Random(seed)) for seed in range(300)]
    requests = [draw_request(Random(seed)) for seed in range(300)]
    assert len(set(lines)) > 280 and len(set(requests)) > 280
    assert requests[7] == draw_request(Random(7))
    assert not any("{" in text for text in lines + requests)
