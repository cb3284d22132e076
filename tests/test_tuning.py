"""The choice of a tree's size from step times and acceptance, on invented machines and invented answers."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from engine import Engine, SamplingParams
from engine.nested_tree import NestedTree
from engine.records import DecodeStep
from engine.step_times import StepTimer, measure_step_times
from engine.tree import CandidateTree
from engine.tuning import Seen, Tuner, TuningFile, load_or_measure

SIZES = (0, 1, 2, 3, 4, 5, 7, 11, 15, 23, 31)
ORDER = NestedTree.default().order
GAINS = [0.6 * 0.85**place for place in range(len(ORDER))]  # 1 + their sum approaches 5 tokens a step
EXPECTED = tuple(1 + sum(GAINS[:size]) for size in range(len(ORDER) + 1))
TREES = NestedTree(ORDER, EXPECTED)
KNEE = {size: 2.0 + (0.01 * size if size <= 7 else 0.5 * (size - 7)) for size in SIZES}
STEEP = {size: 2.0 + 1.5 * size for size in SIZES}
QUESTION = [{"role": "user", "content": "Name three colours."}]


def tuner(step_ms: dict[int, float] = KNEE, trees: NestedTree = TREES, **settings: object) -> Tuner:
    return Tuner(trees, step_ms, default_nodes=2, **settings)  # type: ignore[arg-type]


def paths_accepting(tree: CandidateTree, nodes: Sequence[int]) -> list[tuple[int, ...]]:
    return [tuple(tree.path_to(node)) for node in nodes]


def test_the_knee_of_the_curve_is_chosen() -> None:
    chosen = tuner()
    assert chosen.chosen == 7
    report = chosen.report()
    assert report["nodes"] == list(SIZES)
    assert report["step_ms"][7] == pytest.approx(2.07)
    assert report["tokens_per_step"][7] == pytest.approx(EXPECTED[7], abs=1e-3)
    assert report["expected_gain"] == pytest.approx(EXPECTED[7] * 2.0 / 2.07, abs=1e-3)
    assert "7 drafted nodes bring" in report["reason"]


def test_flat_times_take_the_largest_tree() -> None:
    assert tuner(dict.fromkeys(SIZES, 3.0)).chosen == 31


def test_where_no_tree_pays_decoding_is_plain_and_says_so() -> None:
    chosen = tuner(STEEP)
    report = chosen.report()
    assert (report["chosen"], report["expected_gain"]) == (0, 1.0)
    assert report["reason"].startswith("No tree pays here")
    assert "1 drafted node bring" in report["reason"]


def test_without_calibration_a_default_is_used_until_enough_was_seen() -> None:
    chosen = tuner({0: 2.0, 1: 2.5, 2: 3.0, 7: 4.0}, NestedTree(ORDER))
    assert chosen.chosen == 2
    assert chosen.report()["expected_gain"] is None
    assert chosen.tokens_per_step == {0: 1.0}
    assert "calibrate" in chosen.report()["reason"]
    tree = TREES.first(7)
    for _ in range(2):  # two answers are no evidence yet
        chosen.learn(tree, paths_accepting(tree, [1] * 200))
    assert chosen.chosen == 2
    for _ in range(2):
        chosen.learn(tree, paths_accepting(tree, [1] * 200))
    assert chosen.report()["expected_gain"] == pytest.approx(2.0 * 2.0 / 2.5)
    assert chosen.chosen == 1  # the only node that was ever accepted


def test_one_odd_answer_hardly_moves_the_figures_and_many_do() -> None:
    chosen = tuner()
    tree, before = TREES.first(7), chosen.tokens_per_step
    chosen.learn(tree, paths_accepting(tree, [0] * 5000))  # nothing accepted, in a very long answer
    after = chosen.tokens_per_step
    assert 0.89 * (before[7] - 1) < after[7] - 1 < before[7] - 1
    assert after[31] < before[31]  # what was never tried fares as the rest did
    for _ in range(200):
        chosen.learn(tree, paths_accepting(tree, [0] * 200))
    assert chosen.tokens_per_step[7] - 1 < 0.25 * (before[7] - 1)


def test_the_choice_recovers_when_acceptance_does() -> None:
    chosen = tuner({0: 2.0, 1: 2.6, 2: 2.8, 3: 3.2})
    tree = TREES.first(3)
    start = chosen.chosen
    assert start > 0
    for _ in range(300):
        chosen.learn(tree, paths_accepting(tree, [0] * 200))
    assert chosen.chosen == 0
    for _ in range(300):
        chosen.learn(tree, paths_accepting(tree, [tree.num_drafted] * 200))
    assert chosen.chosen > 0


def test_seen_counts_are_bounded() -> None:
    seen = Seen()
    for _ in range(1000):
        seen.add([500.0, 100.0], 1000)
    assert seen.steps == pytest.approx([8000.0, 8000.0])
    assert [count / 8000 for count in seen.accepted] == pytest.approx([0.5, 0.1])


def test_what_was_measured_and_seen_is_kept(tmp_path: Path) -> None:
    calls: list[int] = []

    def measure() -> dict[int, float]:
        calls.append(1)
        return KNEE

    def load(*identity: str) -> Tuner:
        return load_or_measure(TREES, identity=identity, measure=measure, default_nodes=2, folder=tmp_path / "new")

    first = load("cpu", "model")
    tree = TREES.first(7)
    first.learn(tree, paths_accepting(tree, [0, 1, 2] * 30))
    again = load("cpu", "model")
    assert len(calls) == 1
    assert again.report() == first.report() != tuner().report()
    load("cpu", "another model")
    assert len(calls) == 2


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{not json",
        "[]",
        '{"step_ms": {"1": 2.0}, "seen_steps": [], "seen_accepted": []}',
        '{"step_ms": {"0": 0.0}, "seen_steps": [], "seen_accepted": []}',
        '{"step_ms": {"0": 1.0}, "seen_steps": [1], "seen_accepted": []}',
        '{"step_ms": {"0": "fast"}, "seen_steps": [], "seen_accepted": []}',
        '{"step_ms": {"0": 1.0}}',
    ],
)
def test_a_file_that_makes_no_sense_is_measured_again(tmp_path: Path, content: str) -> None:
    load_or_measure(TREES, identity=["a"], measure=lambda: STEEP, default_nodes=2, folder=tmp_path)
    (kept,) = tmp_path.iterdir()
    kept.write_text(content)
    again = load_or_measure(TREES, identity=["a"], measure=lambda: KNEE, default_nodes=2, folder=tmp_path)
    assert again.chosen == 7
    assert TuningFile(kept).read() == (KNEE, Seen())


def test_steps_far_faster_than_measured_make_the_next_start_measure_again(tmp_path: Path) -> None:
    measured: list[int] = []

    def load() -> Tuner:
        def measure() -> dict[int, float]:
            measured.append(1)
            return KNEE

        return load_or_measure(TREES, identity=["a"], measure=measure, default_nodes=2, folder=tmp_path)

    first = load()
    first.check_times(7, [2.0] * 30)  # as measured
    first.check_times(7, [1.0] * 5)  # too few to tell
    first.check_times(9, [0.1] * 30)  # never measured
    load()
    assert len(measured) == 1
    first.check_times(7, [1.0] * 30)
    first.learn(TREES.first(7), [(0,)] * 30)  # must not bring the old times back
    load()
    assert len(measured) == 2


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    chosen = load_or_measure(TREES, identity=["a"], measure=lambda: KNEE, default_nodes=2, folder=tmp_path / "file")
    tree = TREES.first(2)
    chosen.learn(tree, paths_accepting(tree, [1]))
    assert chosen.chosen == 7


def test_figures_for_left_out_nodes_are_not_used() -> None:
    assert TREES.limited(4).expected == EXPECTED
    assert TREES.limited(2).expected == ()


def test_a_busy_moment_does_not_count() -> None:
    turns = {0: [[2.0, 9.0, 2.0], [90.0] * 3, [2.5] * 3], 1: [[30.0], [3.0], [30.0]]}
    found = measure_step_times(lambda size: turns[size].pop(0), (0, 1), budget_s=60, say=print)
    assert found == {0: 2.0, 1: 3.0}


class Machine:
    """A clock, and a measurement that takes `seconds(size)` on it."""

    def __init__(self, seconds: dict[int, float]) -> None:
        self.now, self.seconds, self.order = 0.0, seconds, []  # type: tuple[float, dict[int, float], list[int]]

    def measure(self, size: int) -> list[float]:
        self.order.append(size)
        self.now += self.seconds[size]
        return [1e3 * self.seconds[size]] * 2


def test_a_fast_machine_is_measured_in_rounds() -> None:
    machine = Machine({0: 0.01, 2: 0.02, 4: 0.015, 8: 0.03})
    found = measure_step_times(machine.measure, (0, 2, 4, 8), budget_s=5, say=print, clock=lambda: machine.now)
    assert machine.order == [0, 2, 4, 8] * 3
    assert found == pytest.approx({0: 10.0, 2: 15.0, 4: 15.0, 8: 30.0})  # a larger tree is never the cheaper one


def test_a_slow_machine_stops_at_its_budget() -> None:
    """The budget begins behind the first three sizes, which may have compiled kernels for all."""
    machine = Machine(dict.fromkeys(SIZES, 1.5))
    found = measure_step_times(machine.measure, SIZES, budget_s=2, say=print, clock=lambda: machine.now)
    assert machine.order == [0, 1, 2, 3, 4]
    assert list(found) == [0, 1, 2, 3, 4]


class ScriptedLoop:
    def __init__(self, log: list[object], heads: bool) -> None:
        self.log, self.heads = log, heads

    def prefill(self, tokens: Sequence[int]) -> int:
        self.log.append((self.heads, list(tokens)))
        return 7

    def steps(self, tree: CandidateTree) -> Iterator[DecodeStep]:
        for number in range(1000):
            yield DecodeStep((1,), 0, (0,), (0,), (-1,), (1.0,), float(number if tree.num_drafted else 150))


def test_the_timer_warms_up_and_always_starts_from_the_same_text() -> None:
    log: list[object] = []
    timer = StepTimer(
        loop=lambda heads: ScriptedLoop(log, heads),
        tree=TREES.first,
        truncate=lambda length: log.append(length),
        prompt=[1, 2, 3, 4],
        warm_steps=2,
    )
    assert timer(3) == [4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0]  # 60 ms of them, after four
    assert timer(0) == [150.0]  # long steps: few of them will do
    assert log == [0, (False, [1, 2, 3]), (True, [4]), 3, (False, [4])]


def test_the_engine_shows_its_choice_and_uses_it(engine: Engine) -> None:
    tuning = engine.info.tuning
    assert tuning is not None
    assert set(tuning) == {"nodes", "step_ms", "tokens_per_step", "chosen", "reason", "expected_gain"}
    assert tuning["nodes"][0] == 0
    assert all(tuning["step_ms"][size] > 0 for size in tuning["nodes"])
    assert tuning["chosen"] in tuning["nodes"]
    *_, last = engine.stream(QUESTION, SamplingParams(max_tokens=12))
    assert last.result is not None
    assert last.result.tree_nodes == tuning["chosen"]


def test_no_paying_tree_makes_the_engine_decode_plainly(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = []
    for steep in (False, True):
        with monkeypatch.context() as patch:
            if steep:
                patch.setattr(engine, "_tuner", tuner(STEEP))
            *_, last = engine.stream(QUESTION, SamplingParams(max_tokens=30, tree_nodes=None if steep else 3))
            answers.append(last.result)
    drafted, plain = answers
    assert drafted is not None and plain is not None
    assert (plain.medusa, plain.tree_nodes, plain.tokens_per_step) == (False, 0, 1.0)
    assert drafted.tree_nodes == 3
    assert plain.tokens == drafted.tokens


def test_the_engine_learns_from_its_answers(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = tuner(KNEE, engine._trees)
    monkeypatch.setattr(engine, "_tuner", learner)
    monkeypatch.setattr(engine, "learns", True)
    *_, last = engine.stream(QUESTION, SamplingParams(max_tokens=30, tree_nodes=4))
    result = last.result
    assert result is not None
    assert learner._seen.steps == [result.steps] * 4
    assert sum(learner._seen.accepted) == pytest.approx(result.steps * (result.tokens_per_step - 1))
    *_, last = engine.stream(QUESTION, SamplingParams(max_tokens=9, temperature=1.0, acceptance="typical"))
    assert learner._seen.steps == [result.steps] * 4  # accepted by another rule
