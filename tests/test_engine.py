"""The engine's public behaviour on the bundled model: records, streams, the cached prompt, limits and refusals."""

import dataclasses
import threading

import pytest

from engine import (
    ContextLengthError,
    Engine,
    GenerationResult,
    InvalidParameterError,
    ModelNotFoundError,
    SamplingParams,
)

QUESTION = [{"role": "user", "content": "Name three colours."}]


def answer(engine: Engine, messages: list[dict[str, str]], **settings: object) -> GenerationResult:
    chunks = list(engine.stream(messages, SamplingParams(**settings)))  # type: ignore[arg-type]
    result = chunks[-1].result
    assert result is not None
    assert result.text == "".join(chunk.text for chunk in chunks)
    assert result.tokens == tuple(token for chunk in chunks for token in chunk.tokens)
    return result


def test_medusa_changes_no_token(engine: Engine) -> None:
    assert engine.info.has_heads, engine.info.heads_reason
    on, off = (answer(engine, QUESTION, medusa=medusa, tree_nodes=4, max_tokens=60) for medusa in (True, False))
    assert on.tokens == off.tokens
    assert off.tokens_per_step == 1.0
    assert on.tokens_per_step > 1.2
    assert on.steps < off.steps
    assert (on.medusa, off.medusa, off.tree_nodes) == (True, False, 0)


@pytest.mark.parametrize("medusa", [True, False])
def test_max_tokens_cuts_exactly(engine: Engine, medusa: bool) -> None:
    for limit in (1, 2, 3, 7):
        result = answer(engine, QUESTION, medusa=medusa, max_tokens=limit)
        assert (len(result.tokens), result.finish_reason) == (limit, "length")


def test_an_answer_ends_at_its_end_token(engine: Engine) -> None:
    result = answer(engine, [{"role": "user", "content": "Say only the word yes."}], max_tokens=200)
    assert result.finish_reason == "stop"
    assert not set(result.tokens) & {0, 2}


def test_a_second_turn_prefills_only_what_is_new(engine: Engine) -> None:
    first = answer(engine, QUESTION, max_tokens=30)
    longer = [*QUESTION, {"role": "assistant", "content": first.text}, {"role": "user", "content": "And three more?"}]
    second = answer(engine, longer, max_tokens=10)
    assert second.cached_tokens >= first.prompt_tokens + len(first.tokens) - 1
    assert second.prompt_tokens - second.cached_tokens < 30


def test_what_was_decoded_plainly_is_run_again_for_heads_that_look_back(engine: Engine) -> None:
    """Heads read the whole text through their prefix attention, so a plain answer leaves a gap; texts do not know."""
    first = answer(engine, QUESTION, medusa=False, max_tokens=30)
    asked = {"role": "user", "content": "And three more?"}
    longer = [*QUESTION, {"role": "assistant", "content": first.text}, asked]
    with_heads = answer(engine, longer, medusa=True, tree_nodes=4, max_tokens=30)
    assert with_heads.cached_tokens == first.prompt_tokens
    plain = answer(engine, longer, medusa=False, max_tokens=30)
    assert plain.tokens == with_heads.tokens
    again = answer(engine, longer, medusa=True, tree_nodes=4, max_tokens=30)
    assert again.cached_tokens == again.prompt_tokens - 1  # all of it was read for heads
    assert (again.tokens, again.steps) == (with_heads.tokens, with_heads.steps)


def test_a_seed_fixes_a_sampled_answer_with_and_without_medusa(engine: Engine) -> None:
    settings = {"temperature": 1.0, "max_tokens": 40}
    one, again = (answer(engine, QUESTION, seed=5, medusa=medusa, **settings) for medusa in (True, False))
    other = answer(engine, QUESTION, seed=6, **settings)
    assert one.tokens == again.tokens
    assert one.tokens != other.tokens


def test_a_drawn_seed_is_reported_and_reproduces(engine: Engine) -> None:
    drawn = answer(engine, QUESTION, temperature=1.0, max_tokens=20)
    assert answer(engine, QUESTION, temperature=1.0, max_tokens=20, seed=drawn.seed).tokens == drawn.tokens


def test_stop_keeps_what_was_said(engine: Engine) -> None:
    stop = threading.Event()
    chunks = []
    for chunk in engine.stream(QUESTION, SamplingParams(max_tokens=200), stop):
        chunks.append(chunk)
        if len(chunks) == 3:
            stop.set()
    result = chunks[-1].result
    assert result is not None
    assert result.finish_reason == "cancelled"
    assert result.tokens
    assert len(chunks) == 4


def test_an_abandoned_stream_leaves_the_engine_usable(engine: Engine) -> None:
    before = answer(engine, QUESTION, max_tokens=20)
    stream = engine.stream(QUESTION, SamplingParams(max_tokens=50))
    next(stream), next(stream)
    stream.close()
    assert answer(engine, QUESTION, max_tokens=20).tokens == before.tokens


def test_each_step_tells_its_tree(engine: Engine) -> None:
    chunks = [chunk for chunk in engine.stream(QUESTION, SamplingParams(max_tokens=20, tree_nodes=6)) if chunk.step]
    for chunk in chunks:
        step = chunk.step
        assert step is not None
        assert step.tree_nodes == 6
        assert step.path[0] == 0
        for parent, node in zip(step.path, step.path[1:], strict=False):
            assert step.node_parents[node] == parent
        drafted = [step.node_tokens[node] for node in step.path[1:]]
        assert list(step.tokens[: len(drafted)]) == drafted
        assert len(step.tokens) == step.num_accepted + 1
        assert all(0 <= chance <= 1 for chance in step.node_probabilities)


def test_the_result_counts_what_happened(engine: Engine) -> None:
    chunks = list(engine.stream(QUESTION, SamplingParams(max_tokens=30)))
    steps = [chunk.step for chunk in chunks if chunk.step]
    result = chunks[-1].result
    assert result is not None
    assert result.steps == len(steps)
    assert result.tokens_per_step == pytest.approx(1 + sum(step.num_accepted for step in steps) / len(steps))
    assert result.acceptance_by_depth == pytest.approx(
        [
            sum(step.num_accepted >= depth for step in steps) / len(steps)
            for depth in range(1, max(step.num_accepted for step in steps) + 1)
        ]
    )
    assert dataclasses.asdict(result)["weights"].startswith("Q4_1")


def test_a_prompt_that_fills_the_context_is_refused(engine: Engine) -> None:
    with pytest.raises(ContextLengthError, match="model holds 8192"):
        list(engine.stream([{"role": "user", "content": "word " * 9000}], SamplingParams()))


def test_unknown_models_and_devices_are_refused() -> None:
    with pytest.raises(ModelNotFoundError, match="no model at 'nowhere'"):
        Engine.load("nowhere")
    with pytest.raises(InvalidParameterError, match="allowed is auto, cpu or cuda"):
        Engine.load("bundled", device="abacus")
    with pytest.raises(InvalidParameterError, match="on cpu allowed is auto, int4"):
        Engine.load("bundled", device="cpu", quantize="nf4")


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"seed": -1},
        {"max_tokens": 0},
        {"tree_nodes": 0},
        {"tree_nodes": 65},
        {"acceptance": "lucky"},
        {"epsilon": 0.0},
        {"delta": 1.5},
    ],
)
def test_impossible_settings_are_refused_with_the_range(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidParameterError, match=f"{next(iter(wrong))} is .*; allowed is "):
        SamplingParams(**wrong)  # type: ignore[arg-type]


def test_missing_heads_leave_medusa_off_with_a_reason() -> None:
    engine = Engine.load("bundled", device="cpu", heads=None)
    assert not engine.info.has_heads
    assert engine.info.heads_reason
    result = answer(engine, QUESTION, medusa=True, max_tokens=5)
    assert (result.medusa, result.tokens_per_step) == (False, 1.0)
