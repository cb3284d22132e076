"""Traces: what is packed comes back, small enough to keep for every answer, and foreign bytes are refused."""

import random

import pytest

from app.tree_view import TRACE_FORMAT, Trace, acceptance_by_depth, unpack_trace
from engine import DecodeStep


def texts(tokens):
    return [f" w{token}\u2028é" for token in tokens]


def random_step(source: random.Random, nodes: int) -> DecodeStep:
    parents = (-1, *((node - 1) // 3 for node in range(1, nodes + 1)))
    path = [0]
    while (children := [node for node in range(nodes + 1) if parents[node] == path[-1]]) and source.random() < 0.5:
        path.append(source.choice(children))
    tokens = tuple(int(source.paretovariate(0.6)) % 49152 for _ in range(nodes + 1))
    emitted = (*(tokens[node] for node in path[1:]), source.randrange(49152))
    chances = (1.0, *(source.random() ** 3 for _ in range(nodes)))
    return DecodeStep(emitted, len(path) - 1, tuple(path), tokens, parents, chances, source.uniform(5, 40))


def random_trace(seed: int, steps: int, nodes: int) -> Trace:
    source = random.Random(seed)
    trace = Trace(texts)
    trace.add_prefill([" first"], [5])
    for _ in range(steps):
        step = random_step(source, nodes)
        trace.add(step, texts(step.tokens), step.tokens)
    return trace


@pytest.mark.parametrize("seed,steps,nodes", [(0, 0, 8), (1, 1, 0), (2, 40, 8), (3, 25, 64)])
def test_packed_trace_comes_back_whole(seed: int, steps: int, nodes: int) -> None:
    trace = random_trace(seed, steps, nodes)
    again = unpack_trace(TRACE_FORMAT, trace.pack())
    assert again.steps == trace.steps
    assert (again.prefill_texts, again.prefill_tokens) == ((" first",), (5,))
    assert again.pack() == trace.pack()


@pytest.mark.parametrize("nodes,limit", [(8, 50), (16, 75), (64, 200)])
def test_a_step_takes_few_bytes(nodes: int, limit: int) -> None:
    assert len(random_trace(7, 300, nodes).pack()) / 300 < limit


def test_labels_ask_for_each_token_once() -> None:
    asked: list[int] = []

    def counted(tokens):
        asked.extend(tokens)
        return texts(tokens)

    trace = Trace(counted)
    step = DecodeStep((9,), 0, (0,), (3, 4, 4), (-1, 0, 0), (1.0, 0.5, 0.25), 10.0)
    trace.add(step, [" x"], step.tokens)
    trace.add(step, [" x"], step.tokens)
    assert asked == [3, 4]
    assert trace.steps[0].labels == tuple(texts([3, 4, 4]))


def test_latest_numbers_steps_from_one_and_keeps_order() -> None:
    trace = random_trace(4, 5, 8)
    assert [step["number"] for step in trace.latest(3)] == [3, 4, 5]
    assert [step["number"] for step in trace.latest(99)] == [1, 2, 3, 4, 5]
    assert trace.latest(1)[0]["texts"] == list(trace.steps[-1].texts)


def test_probabilities_outside_the_range_are_clamped() -> None:
    trace = Trace(texts)
    trace.add(DecodeStep((1,), 0, (0,), (1, 2), (-1, 0), (1.0000001, -1e-9), 1.0), [" a"], [1])
    assert trace.steps[0].probabilities == (1.0, 0.0)


def test_acceptance_by_depth_counts_steps_not_drafts() -> None:
    trace = Trace(texts)
    for accepted in (0, 1, 3, 1):
        path = tuple(range(accepted + 1))
        step = DecodeStep((1,) * (accepted + 1), accepted, path, (1,) * 4, (-1, 0, 1, 2), (1.0,) * 4, 1.0)
        trace.add(step, [" a"] * (accepted + 1), step.tokens)
    assert acceptance_by_depth(trace.steps) == [0.75, 0.25, 0.25]
    assert acceptance_by_depth([]) == []


def test_a_depth_that_was_never_accepted_is_a_zero() -> None:
    trace = Trace(texts)
    trace.add(DecodeStep((1, 2), 1, (0, 1), (1,) * 4, (-1, 0, 1, 2), (1.0,) * 4, 1.0), [" a", " b"], (1, 2))
    trace.add(DecodeStep((1,), 0, (0,), (1,), (-1,), (1.0,), 1.0), [" a"], (1,))
    assert acceptance_by_depth(trace.steps) == [0.5, 0.0, 0.0]


def test_columns_from_a_step_on_are_the_rest_of_all_columns() -> None:
    trace = random_trace(6, 9, 8)
    whole, rest = trace.columns(), trace.columns(4)
    assert rest["path"] == whole["path"][4:] and rest["ms"] == whole["ms"][4:]
    named = [[columns["words"][number] for number in columns["labels"][-1]] for columns in (whole, rest)]
    assert named[0] == named[1] == list(trace.steps[-1].labels)
    assert trace.columns(9)["accepted"] == []


@pytest.mark.parametrize("trace_format,data", [(2, b""), (1, b"no zlib"), (1, random.Random(1).randbytes(64))])
def test_unreadable_traces_raise_a_sentence(trace_format: int, data: bytes) -> None:
    with pytest.raises(ValueError, match=r"The (saved )?steps"):
        unpack_trace(trace_format, data)
