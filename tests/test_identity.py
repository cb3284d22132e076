"""The greedy toggle's bench: a small run of it, and that it catches a backbone whose rows lean on their neighbours."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from engine import Engine, EngineError, InvalidParameterError
from engine.bench import identity, readme_table
from engine.bench.identity import Plan, first_difference, identity_text, run_identity
from engine.bench.toggle import answer
from engine.tree import CandidateTree

PROMPTS = ("Name three colours and say where one sees them.", "Write two lines about the sea.")


class Careless:
    """A runner whose hidden states of a tree lean on the rows computed beside them, from a certain length on."""

    def __init__(self, runner: Any, wrong_from: int) -> None:
        self._runner, self._wrong_from = runner, wrong_from

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def verify(self, tokens: Sequence[int], tree: CandidateTree, **options: bool) -> Tensor:
        hidden = self._runner.verify(tokens, tree, **options)
        if len(hidden) > 1 and self._runner.num_committed >= self._wrong_from:
            return hidden.roll(1, dims=0)
        return hidden


@pytest.fixture
def careless(engine: Engine) -> Engine:
    """The engine, wrong with trees 20 tokens after the shortest prompt's end."""
    start = min(engine.count_tokens([{"role": "user", "content": prompt}]) for prompt in PROMPTS)
    runner: Any = Careless(engine._runner, start + 20)
    wrong = Engine(
        name="wrong", runner=runner, tokenizer=engine._tokenizer, drafter=engine._drafter, trees=engine._trees
    )
    engine._runner.truncate(0)
    engine._cached = []
    return wrong


def test_greedy_answers_are_the_same_with_any_tree(engine: Engine) -> None:
    report = run_identity(engine, Plan(PROMPTS, (2, 4), 40), print)
    assert (report["answers_that_differ"], report["prompts_that_differ"]) == (0, [])
    assert [row["is_identical"] for row in report["rows"]] == [True] * 4
    for nodes in (2, 4):
        figures = report["by_drafted_nodes"][nodes]
        assert figures["tokens_compared"] > 40
        assert figures["tokens_per_step"] > 1.2
    assert report["by_drafted_nodes"][4]["tokens_per_step"] >= report["by_drafted_nodes"][2]["tokens_per_step"] - 0.2


def test_a_wrong_runner_is_caught_where_it_goes_wrong(
    careless: Engine, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(identity.Engine, "load", lambda *args, **kwargs: careless)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n\n".join(PROMPTS), encoding="utf-8")
    status = identity.main(["--prompts", str(prompts), "--nodes", "4", "--tokens", "60", "--out", str(tmp_path)])
    engine._cached = []  # the other engine has used its runner
    report = json.loads((tmp_path / "identity_cpu.json").read_text(encoding="utf-8"))
    differing = [row for row in report["rows"] if not row["is_identical"]]
    assert status == 1
    assert report["answers_that_differ"] == len(differing) > 0
    # Nothing is wrong before the 20th token, and the answer parts soon after it.
    assert all(10 <= row["first_difference"] < 60 for row in differing)
    assert "DIFFERS from token" in capfd.readouterr().out


def test_where_two_answers_part(engine: Engine) -> None:
    one = answer(engine, PROMPTS[0], 0, 12)
    assert first_difference(one, replace(one)) is None
    assert first_difference(one, replace(one, tokens=(*one.tokens[:5], -1, *one.tokens[6:]))) == 5
    assert first_difference(one, replace(one, tokens=one.tokens[:7])) == 7
    assert first_difference(one, replace(one, finish_reason="stop")) == 12


def test_nothing_compared_is_no_success(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidParameterError, match="no prompt"):
        Plan(())
    with pytest.raises(InvalidParameterError, match="sizes of tree"):
        Plan(PROMPTS, (0, 2))
    monkeypatch.setattr(engine._runner, "max_tree_nodes", 3, raising=False)
    with pytest.raises(InvalidParameterError, match="drafts 3 nodes"):
        run_identity(engine, Plan(PROMPTS[:1], (4,), 4), print)
    monkeypatch.setattr(engine, "_drafter", None)
    with pytest.raises(EngineError, match="cannot be compared"):
        run_identity(engine, Plan(PROMPTS), print)


def test_the_command_says_what_it_compared(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(identity.Engine, "load", lambda *args, **kwargs: engine)
    words = ["--count", "1", "--nodes", "1,3", "--tokens", "8"]
    assert identity.main([*words, "--out", str(tmp_path / "kept.json")]) == 0
    kept = json.loads((tmp_path / "kept.json").read_text(encoding="utf-8"))
    assert (kept["max_tokens"], list(kept["by_drafted_nodes"])) == (8, ["1", "3"])
    assert capfd.readouterr().out == identity_text(kept)
    assert identity.main(["--prompts", str(tmp_path / "none.txt")]) == 2
    (tmp_path / "identity_cpu.json").write_text(json.dumps(kept))
    assert "0 of 2" in readme_table.figures_table(tmp_path)


def test_a_gpu_s_report_is_kept_by_its_format_of_weights() -> None:
    assert identity.file_name({"model": {"device": "cpu", "weights": "Q4_1 on AVX2"}}) == "identity_cpu"
    assert identity.file_name({"model": {"device": "cuda", "weights": "nf4 on CUDA kernels"}}) == "identity_cuda_nf4"
