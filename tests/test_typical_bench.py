"""What the bench of typical acceptance measures: chances of answered tokens, and divergences by hand."""

import math

import pytest

from engine import Engine, GenerationResult, SamplingParams
from engine.bench.typical import Answered, answer, divergence, figures

PROMPT = "Name three colours and say where one sees them."


def test_chances_are_those_that_the_sampler_saw(engine: Engine) -> None:
    """With a nucleus every token drawn has a chance; a greedy answer's tokens are the likeliest ones."""
    params = SamplingParams(temperature=0.9, top_p=0.5, frequency_penalty=0.4, max_tokens=50, seed=3)
    given = answer(engine, PROMPT, params)
    assert len(given.chances) == len(given.result.tokens) == len(given.is_draft)
    assert all(0 < chance <= 1 for chance in given.chances)
    assert 0 < sum(given.is_draft) < len(given.is_draft)
    cold = answer(engine, PROMPT, SamplingParams(temperature=1e-6, max_tokens=50))
    assert min(cold.chances) > 0.5


def test_the_engine_answers_as_before_after_a_look(engine: Engine) -> None:
    params = SamplingParams(temperature=0.8, seed=4, max_tokens=30)
    assert answer(engine, PROMPT, params).result.tokens == answer(engine, PROMPT, params).result.tokens


def test_figures_by_hand(engine: Engine) -> None:
    result: GenerationResult = answer(engine, PROMPT, SamplingParams(max_tokens=4)).result
    given = [Answered(result, (False, True, True, False), (0.9, 0.5, 0.25, 0.1))]
    assert divergence(given) == {
        "kl_nats_by_token": pytest.approx((math.log(2) + math.log(4)) / 4, abs=1e-4),
        "total_variation_by_token": pytest.approx((0.5 + 0.75) / 4, abs=1e-4),
    }
    assert figures(given)["share_of_drafts"] == 0.5
