"""The choice of a tree from step times and acceptance, on invented machines and invented answers."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from engine import Engine, SamplingParams
from engine.models.loader import bundled_heads_path
from engine.nested_tree import NestedTree
from engine.pruned_tree import PrunedTree, Tree
from engine.records import DecodeStep
from engine.seen_steps import PlaceCounts, SeenSteps
from engine.step_times import StepTimer, StepTimes, measure_step_times
from engine.tree import CandidateTree
from engine.tuning import Tuner, TuningFile, load_or_measure

SIZES = (0, 1, 2, 3, 4, 5, 7, 11, 15, 23, 31)
ORDER = NestedTree.default().order
GAINS = [0.6 * 0.85**place for place in range(len(ORDER))]  # 1 + their sum approaches 5 tokens a step
EXPECTED = tuple(1 + sum(GAINS[:size]) for size in range(len(ORDER) + 1))
DEEPEST = NestedTree.default().max_depth
# What is left out for its depth is missed: less the shallower a tree is.
TREES = NestedTree(
    ORDER, tuple(tuple(1 + (x - 1) * (0.6 + 0.1 * depth) for x in EXPECTED) for depth in range(1, DEEPEST + 1))
)
KNEE = {size: 2.0 + (0.01 * size if size <= 7 else 0.5 * (size - 7)) for size in SIZES}
STEEP = {size: 2.0 + 1.5 * size for size in SIZES}
BUNDLED = NestedTree.beside(bundled_heads_path())
QUESTION = [{"role": "user", "content": "Name three colours."}]


def tuner(
    step_ms: dict[int, float] = KNEE, trees: NestedTree = TREES, depth_ms: float = 0.0, **settings: object
) -> Tuner:
    return Tuner(trees, StepTimes(step_ms, depth_ms), default_nodes=2, **settings)  # type: ignore[arg-type]


def chosen_by(tuner: Tuner) -> tuple[int, int]:
    """Nodes and depth of the choice."""
    return tuner.tree.num_drafted, tuner.tree.max_depth


def shape_of(tree: Tree) -> CandidateTree:
    """The first nodes that a tree may keep."""
    return CandidateTree(tree.filled.choices[: tree.num_drafted]) if isinstance(tree, PrunedTree) else tree


def steps_accepting(tree: Tree, nodes: Sequence[int]) -> list[DecodeStep]:
    """Steps whose nodes are the likelier the earlier they come in the tree, and which take the path to `nodes`."""
    shape = shape_of(tree)
    chances = [1.0, *(0.9**node for node in range(1, shape.num_nodes))]
    given = shape.parents, tuple(chances)
    tokens = tuple(range(shape.num_nodes))
    paths = [tuple(shape.path_to(node)) for node in nodes]
    return [DecodeStep((1,) * len(path), len(path) - 1, path, tokens, *given, 1.0) for path in paths]


def test_the_knee_of_the_curve_is_chosen() -> None:
    chosen = tuner()
    assert chosen.tree == TREES.pruned(7)
    expected = TREES.expected[chosen.tree.max_depth - 1][7]
    report = chosen.report()
    assert report["chosen"] == 7
    assert report["nodes"] == list(SIZES)
    assert report["step_ms"][7] == pytest.approx(2.07)
    assert report["tokens_per_step"][7] == pytest.approx(expected, abs=1e-3)
    assert report["expected_gain"] == pytest.approx(expected * 2.0 / 2.07, abs=1e-3)
    assert report["depths"] == {size: TREES.pruned(size).max_depth for size in SIZES}
    assert "7 drafted nodes, at most 3 deep, bring" in report["reason"]


def test_flat_times_take_the_largest_tree() -> None:
    assert tuner(dict.fromkeys(SIZES, 3.0)).tree == TREES.pruned(31)


def test_where_no_tree_pays_decoding_is_plain_and_says_so() -> None:
    chosen = tuner(STEEP)
    report = chosen.report()
    assert (report["chosen"], report["expected_gain"]) == (0, 1.0)
    assert report["reason"].startswith("No tree pays here")
    assert "1 drafted node bring" in report["reason"]


def test_without_calibration_a_default_is_used_until_enough_was_seen() -> None:
    chosen = tuner({0: 2.0, 1: 2.5, 2: 3.0, 7: 4.0}, NestedTree(ORDER))
    assert chosen.tree == chosen.best == TREES.pruned(2)
    assert chosen.report()["expected_gain"] is None
    assert chosen.report()["tokens_per_step"] == {0: 1.0}
    assert "calibrate" in chosen.report()["reason"]
    tree = TREES.pruned(7)
    for _ in range(2):  # two answers are no evidence yet
        chosen.learn(tree, steps_accepting(tree, [1] * 200))
    assert chosen.tree == TREES.pruned(2)
    for _ in range(2):
        chosen.learn(tree, steps_accepting(tree, [1] * 200))
    assert chosen.report()["expected_gain"] == pytest.approx(2.0 * 2.0 / 2.5)
    assert chosen.tree == TREES.pruned(1)  # the only node that was ever accepted


def test_one_odd_answer_hardly_moves_the_figures_and_many_do() -> None:
    chosen = tuner()
    tree, before = TREES.pruned(7), chosen.report()["tokens_per_step"]
    chosen.learn(tree, steps_accepting(tree, [0] * 5000))  # nothing accepted, in a very long answer
    after = chosen.report()["tokens_per_step"]
    assert 0.89 * (before[7] - 1) < after[7] - 1 < before[7] - 1
    assert after[31] < before[31]  # what was never tried fares as the rest did
    for _ in range(200):
        chosen.learn(tree, steps_accepting(tree, [0] * 200))
    assert chosen.report()["tokens_per_step"][7] - 1 < 0.25 * (before[7] - 1)


def test_the_choice_recovers_when_acceptance_does() -> None:
    chosen = tuner({0: 2.0, 1: 2.6, 2: 2.8, 3: 3.2})
    tree = TREES.pruned(3)
    assert chosen.tree.num_drafted > 0
    for _ in range(300):
        chosen.learn(tree, steps_accepting(tree, [0] * 200))
    assert chosen.tree.num_drafted == 0
    for _ in range(300):
        chosen.learn(tree, steps_accepting(tree, [tree.num_drafted] * 200))
    assert chosen.tree.num_drafted > 0


def test_seen_counts_are_bounded() -> None:
    seen = PlaceCounts()
    for _ in range(1000):
        seen.add(PlaceCounts([1000, 1000], [500, 100]))
    assert seen.steps == pytest.approx([8000.0, 8000.0])
    assert [count / 8000 for count in seen.accepted] == pytest.approx([0.5, 0.1])


def test_what_was_measured_and_seen_is_kept(tmp_path: Path) -> None:
    calls: list[int] = []

    def measure() -> StepTimes:
        calls.append(1)
        return StepTimes(KNEE, 0.1)

    def load(*identity: str) -> Tuner:
        return load_or_measure(TREES, identity=identity, measure=measure, default_nodes=2, folder=tmp_path / "new")

    first = load("cpu", "model")
    tree = TREES.pruned(7)
    first.learn(tree, steps_accepting(tree, [0, 1, 2] * 30))
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
        '{"step_ms": {"1": 2.0}, "depth_ms": 0, "seen": []}',
        '{"step_ms": {"0": 0.0}, "depth_ms": 0, "seen": []}',
        '{"step_ms": {"0": 1.0}, "depth_ms": 0, "seen": [[[1], []]]}',
        '{"step_ms": {"0": 1.0}, "depth_ms": 0, "seen": [[[1]]]}',
        '{"step_ms": {"0": 1.0}, "depth_ms": 0, "seen": [7]}',
        '{"step_ms": {"0": "fast"}, "depth_ms": 0, "seen": []}',
        '{"step_ms": {"0": 1.0}}',
        '{"step_ms": {"0": 1.0, "1": 1.1}, "seen": []}',
        '{"step_ms": {"0": 1.0}, "depth_ms": -1, "seen": []}',
        '{"step_ms": {"0": 1.0}, "depth_ms": 0, "seen_steps": [9], "seen_accepted": [5]}',  # of fixed trees
    ],
)
def test_a_file_that_makes_no_sense_is_measured_again(tmp_path: Path, content: str) -> None:
    steep, knee = StepTimes(STEEP, 0.0), StepTimes(KNEE, 0.25)
    load_or_measure(TREES, identity=["a"], measure=lambda: steep, default_nodes=2, folder=tmp_path)
    (kept,) = tmp_path.iterdir()
    kept.write_text(content)
    again = load_or_measure(TREES, identity=["a"], measure=lambda: knee, default_nodes=2, folder=tmp_path)
    assert again.report()["depth_ms"] == 0.25
    assert TuningFile(kept).read() == (knee, SeenSteps())


def test_steps_far_faster_than_measured_make_the_next_start_measure_again(tmp_path: Path) -> None:
    measured: list[int] = []

    def load() -> Tuner:
        def measure() -> StepTimes:
            measured.append(1)
            return StepTimes(KNEE, 0.0)

        return load_or_measure(TREES, identity=["a"], measure=measure, default_nodes=2, folder=tmp_path)

    first = load()
    first.check_times(TREES.pruned(7), [2.0] * 30)  # as measured
    first.check_times(TREES.pruned(7), [1.0] * 5)  # too few to tell
    first.check_times(TREES.pruned(9), [0.1] * 30)  # never measured
    load()
    assert len(measured) == 1
    first.check_times(TREES.pruned(7), [1.0] * 30)
    first.learn(TREES.pruned(7), steps_accepting(TREES.pruned(7), [0] * 30))  # must not bring the old times back
    load()
    assert len(measured) == 2


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    times, folder = StepTimes(KNEE, 0.0), tmp_path / "file"
    chosen = load_or_measure(TREES, identity=["a"], measure=lambda: times, default_nodes=2, folder=folder)
    tree = TREES.pruned(2)
    chosen.learn(tree, steps_accepting(tree, [1]))
    assert chosen.tree == TREES.pruned(7)


def test_figures_for_left_out_nodes_are_not_used() -> None:
    assert TREES.limited(4).expected == TREES.expected
    assert TREES.limited(2).expected == TREES.expected[:2]


def test_a_busy_moment_does_not_count() -> None:
    turns = {0: [[2.0, 9.0, 2.0], [90.0] * 3, [2.5] * 3], 1: [[30.0], [3.0], [30.0]]}
    found = measure_step_times(
        lambda tree: turns[tree.num_drafted].pop(0), NestedTree(((0,),)), 64, budget_s=60, say=print
    )
    assert found == ({0: 2.0, 1: 3.0}, 0.0)


class Machine:
    """A clock, and a measurement that takes `seconds` by nodes on it, and `per_depth` more for each depth."""

    def __init__(self, seconds: Mapping[int, float], per_depth: float = 0.0) -> None:
        self.now, self.seconds, self.per_depth = 0.0, seconds, per_depth
        self.order: list[Tree] = []

    def measure(self, tree: Tree) -> list[float]:
        self.order.append(tree)
        taken = self.seconds[tree.num_drafted] + self.per_depth * tree.max_depth
        self.now += taken
        return [1e3 * taken] * 2

    def times(self, trees: NestedTree, budget_s: float) -> StepTimes:
        return measure_step_times(
            self.measure, trees, 63, budget_s=budget_s, say=print, clock=lambda: self.now
        )  # fmt: skip


CHAIN, FLAT = CandidateTree.chain(4), CandidateTree(((0,), (1,), (2,), (3,)))


def test_a_fast_machine_is_measured_in_rounds() -> None:
    trees = NestedTree(BUNDLED.order[:5])
    machine = Machine({0: 0.01, 1: 0.012, 2: 0.02, 3: 0.021, 4: 0.022, 5: 0.0165}, per_depth=0.001)
    found = machine.times(trees, budget_s=5)
    sizes = [trees.pruned(size) for size in range(6)]
    assert machine.order == [*sizes[:3], CHAIN, FLAT, *sizes[3:]] * 3
    # A larger tree is never the cheaper one.
    assert found.by_nodes == pytest.approx({0: 10.0, 1: 13.0, 2: 20.5, 3: 20.5, 4: 20.5, 5: 20.5})
    assert found.per_depth == pytest.approx(1.0)


def test_a_slow_machine_stops_at_its_budget() -> None:
    """The budget begins behind the first three trees, which may have compiled kernels for all."""
    machine = Machine(dict.fromkeys(range(64), 1.5))
    assert list(machine.times(BUNDLED, budget_s=2).by_nodes) == [0, 1, 2]
    assert len(machine.order) == 5


def test_noise_gives_a_depth_no_cost_that_cannot_be() -> None:
    """Between nothing, and all that one drafted node costs."""
    for flat_ms, per_depth in ((9.0, 0.0), (1.0, 0.5), (3.5, 0.5), (4.7, 0.1)):
        step_ms = {(0, 0): 2.0, (1, 1): 2.5, (4, 1): flat_ms}
        found = measure_step_times(
            lambda tree: [step_ms.get((tree.num_drafted, tree.max_depth), 5.0)],  # noqa: B023
            BUNDLED, 63, budget_s=9, say=print,
        )  # fmt: skip
        assert found.per_depth == pytest.approx(per_depth)


def rows_cost(per_node: float) -> dict[int, float]:
    """Seconds of a step by drafted nodes, without what its depths cost."""
    return {nodes: 0.01 + per_node * nodes for nodes in range(64)}


def test_a_depth_s_cost_changes_the_choice() -> None:
    """Plain steps of 10 ms and 0.4 ms a node: at 2 ms a depth no head behind the second one is worth its turn."""
    free, dear = (Machine(rows_cost(0.0004), per_depth=cost).times(BUNDLED, budget_s=60) for cost in (0.0, 0.002))
    assert (free.per_depth, dear.per_depth) == pytest.approx((0.0, 2.0))
    assert chosen_by(tuner(free.by_nodes, BUNDLED, free.per_depth)) == (5, 4)
    shallow = tuner(dear.by_nodes, BUNDLED, dear.per_depth)
    blind = tuner(dear.by_nodes, BUNDLED)  # the same times, but no word of depths
    assert (chosen_by(shallow), chosen_by(blind)) == ((4, 2), (2, 2))
    report = shallow.report()
    assert (report["chosen"], report["depths"][4], report["depth_ms"]) == (4, 2, pytest.approx(2.0))
    assert report["step_ms"][4] == pytest.approx(10 + 0.4 * 4 + 2.0 * 2)
    assert report["expected_gain"] > 1.03 * blind.report()["expected_gain"]
    tokens = f"{report['tokens_per_step'][4]:.2f}"
    assert report["reason"].startswith(f"4 drafted nodes, at most 2 deep, bring {tokens} tokens a step for 1.56x")


def test_an_expectation_is_that_of_its_depth() -> None:
    report = tuner(dict.fromkeys(SIZES, 3.0), BUNDLED, 1.0).report()
    for nodes, depth in report["depths"].items():
        expected = BUNDLED.expected[depth - 1][nodes] if nodes else 1.0
        assert report["tokens_per_step"][nodes] == pytest.approx(expected, abs=1e-3)


def test_where_heads_cost_more_than_they_bring_decoding_is_plain() -> None:
    times = Machine(rows_cost(0.0001), per_depth=0.03).times(BUNDLED, budget_s=60)
    report = tuner(times.by_nodes, BUNDLED, times.per_depth).report()
    assert report["chosen"] == 0
    assert report["reason"].startswith("No tree pays here")
    assert "at most 1 deep" in report["reason"]


def test_a_step_tells_of_shallower_trees_too() -> None:
    """Those of its nodes that lie no deeper are the likeliest of such a tree."""
    seen = SeenSteps()
    parents, chances = (-1, 0, 0, 1, 1, 3), (1.0, 0.5, 0.45, 0.8, 0.1, 0.9)  # of paths: 1, .5, .45, .4, .05, .36
    step = DecodeStep((1,) * 3, 2, (0, 1, 3), (0,) * 6, parents, chances, 1.0)
    assert seen.add([step] * 10, 3)
    flat, middle, deep = seen.depths
    assert (flat.steps, flat.accepted) == ([10, 10], [10, 0])
    assert (middle.steps, middle.accepted) == ([10] * 4, [10, 0, 10, 0])
    assert (deep.steps, deep.accepted) == ([10] * 5, [10, 0, 10, 0, 0])
    assert SeenSteps.of_json(seen.to_json()) == seen
    assert not seen.add([], 3) and not seen.add([DecodeStep((1,), 0, (0,), (0,), (-1,), (1.0,), 1.0)], 0)


def test_every_candidate_is_a_tree_of_the_likeliest_nodes() -> None:
    for trees in (BUNDLED, TREES):
        for depth in range(1, trees.max_depth + 1):
            allowed = [choice for choice in trees.order if len(choice) <= depth]
            for nodes in range(len(allowed) + 1):
                tree = trees.first(nodes, depth)
                assert set(tree.choices) == set(allowed[:nodes])
                assert tree.max_depth <= depth
                assert all(parent < node for node, parent in enumerate(tree.parents))
        assert trees.first(9, trees.max_depth) == trees.first(9)


def test_answers_tell_of_the_nodes_in_their_tree_alone() -> None:
    """With a flat tree deep nodes go unseen; what was seen scales them, and they come back where they pay."""
    times = {0: 10.0, 2: 14.0, 5: 17.0, 7: 18.0}
    chosen = tuner(times, BUNDLED, 0.9)
    flat = BUNDLED.pruned(7, 1)
    chosen.learn(flat, steps_accepting(flat, [1] * 100 + [2] * 20))
    (only,) = chosen._seen.depths
    assert (only.steps, only.accepted) == ([120] * 7, [100, 20, 0, 0, 0, 0, 0])
    before = chosen.tree
    for _ in range(300):
        chosen.learn(flat, steps_accepting(flat, [0] * 200))
    assert chosen.tree.num_drafted == 0 < before.num_drafted
    for _ in range(300):
        chosen.learn(BUNDLED.pruned(7), steps_accepting(BUNDLED.pruned(7), [7] * 200))
    assert chosen.tree.max_depth > 1


class ScriptedLoop:
    def __init__(self, log: list[object], heads: bool) -> None:
        self.log, self.heads = log, heads

    def prefill(self, tokens: Sequence[int]) -> int:
        self.log.append((self.heads, list(tokens)))
        return 7

    def steps(self, tree: Tree) -> Iterator[DecodeStep]:
        for number in range(1000):
            yield DecodeStep((1,), 0, (0,), (0,), (-1,), (1.0,), float(number if tree.num_drafted else 150))


def test_the_timer_warms_up_and_always_starts_from_the_same_text() -> None:
    log: list[object] = []
    timer = StepTimer(
        loop=lambda heads: ScriptedLoop(log, heads),
        truncate=lambda length: log.append(length),
        prompt=[1, 2, 3, 4],
        warm_steps=2,
    )
    assert timer(TREES.pruned(3)) == [4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0]  # 60 ms of them, after four
    assert timer(TREES.first(0)) == [150.0]  # long steps: few of them will do
    assert log == [0, (False, [1, 2, 3]), (True, [4]), 3, (False, [4])]


def test_the_engine_shows_its_choice_and_uses_it(engine: Engine) -> None:
    tuning = engine.info.tuning
    assert tuning is not None
    assert set(tuning) == {
        "nodes", "depths", "step_ms", "tokens_per_step", "depth_ms", "chosen", "reason", "expected_gain"
    }  # fmt: skip
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


def test_texts_do_not_depend_on_how_deep_the_tree_is(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = []
    for depth in (0, 1, 2, 4):
        with monkeypatch.context() as patch:
            learner = tuner(KNEE, engine._trees)
            learner.tree = engine._trees.pruned(7, depth)
            patch.setattr(engine, "_tuner", learner)
            *_, last = engine.stream(QUESTION, SamplingParams(max_tokens=30))
            answers.append(last.result)
    assert [result.tree_nodes for result in answers if result] == [0, 7, 7, 7]
    assert len({result.tokens for result in answers if result}) == 1


def test_the_engine_learns_from_its_answers(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = tuner(KNEE, engine._trees)
    monkeypatch.setattr(engine, "_tuner", learner)
    monkeypatch.setattr(engine, "learns", True)
    *_, last = engine.stream(QUESTION, SamplingParams(max_tokens=30, tree_nodes=4))
    result = last.result
    assert result is not None
    deepest = learner._seen.depths[-1]
    assert deepest.steps == [result.steps] * 4
    assert sum(deepest.accepted) == pytest.approx(result.steps * (result.tokens_per_step - 1))
    *_, last = engine.stream(QUESTION, SamplingParams(max_tokens=9, temperature=1.0, acceptance="typical"))
    assert learner._seen.depths[-1].steps == [result.steps] * 4  # accepted by another rule
