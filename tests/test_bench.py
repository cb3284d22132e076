"""The bench: contenders that count the same way, peers that may crash, tables that say what was measured."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import launcher
from app import cli_bench
from engine import Engine
from engine.bench import readme_table, suite
from engine.bench.contenders import Ends, Own, Run, cut, spread
from engine.bench.contexts import measure_contexts, prompt_of
from engine.bench.loading import load_engine
from engine.bench.peer_process import PeerError, PeerProcess, ProcessContender, why_no_llama_cpp
from engine.bench.report_text import report_text
from engine.decode import PLAIN

BENCHES = Path(suite.__file__).parent
SETUP = {"model": "bundled", "device": "cpu", "quantize": "auto", "heads": "auto"}

PEER = """
import json, sys
assert json.loads(sys.argv[1]) == {"kind": "made up"}
print(json.dumps({"ready": True, "about": "made up"}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if asked["max_tokens"] == 13:
        sys.stderr.write("the library fell over\\n")
        sys.exit(3)
    run = dict(tokens=asked["prompt"][::-1], prompt_tokens=len(asked["prompt"]), prefill_ms=5.0, decode_ms=10.0,
               steps=2, decoded=4 if asked["lookup"] else 2)
    print(json.dumps(run), flush=True)
"""


class Scripted:
    """A contender with a fixed speed."""

    def __init__(self, name: str, ms: float) -> None:
        self.name, self.ms, self.asked = name, ms, []  # type: str, float, list[tuple[int, int, Ends]]

    def run(self, prompt: Sequence[int], max_tokens: int, ends: Ends) -> Run:
        self.asked.append((len(prompt), max_tokens, ends))
        decoded = max_tokens - 1
        return Run(tuple(range(max_tokens)), len(prompt), self.ms * len(prompt), self.ms * decoded, decoded, decoded)


def test_medusa_on_and_off_give_the_same_tokens_and_counts(engine: Engine) -> None:
    prompt = prompt_of(engine, 60)
    off, on = (Own(engine, engine._trees.first(nodes)).run(prompt, 40, frozenset()) for nodes in (0, 4))
    assert off.tokens == on.tokens
    assert (len(off.tokens), off.decoded, off.steps, off.tokens_per_step) == (40, 39, 39, 1.0)
    assert (on.decoded, on.steps < 39) == (39, True)
    assert on.tokens_per_second == pytest.approx(39 / on.decode_ms * 1e3)
    assert off.prompt_tokens == 60


def test_an_end_token_ends_a_run_and_counts_as_a_step_s_token(engine: Engine) -> None:
    prompt = prompt_of(engine, 60)
    whole = Own(engine, PLAIN).run(prompt, 40, frozenset()).tokens
    end = next(token for token in whole[5:] if token not in whole[:5])
    place = whole.index(end)
    for nodes in (0, 4):
        run = Own(engine, engine._trees.first(nodes)).run(prompt, 40, frozenset({end}))
        assert run.tokens == whole[:place]
        assert run.decoded == place
    at_once = Own(engine, PLAIN).run(prompt, 40, frozenset({whole[0]}))
    assert (at_once.tokens, at_once.steps, at_once.tokens_per_second) == ((), 0, 0.0)


def test_cut_stops_at_an_end_or_at_the_room() -> None:
    assert cut([5, 6, 7], 2, frozenset()) == [5, 6]
    assert cut([5, 6, 7], 3, frozenset({6})) == [5]


def test_spread_tells_median_and_extremes() -> None:
    assert spread([3.0, 1.0, 2.26]) == {"median": 2.3, "lowest": 1.0, "highest": 3.0, "runs": 3}


@pytest.mark.parametrize("length", [60, 500, 4000])
def test_prompts_have_the_length_asked_for(engine: Engine, length: int) -> None:
    prompt = prompt_of(engine, length)
    assert len(prompt) == length
    assert prompt[-8:] == prompt_of(engine, 100)[-8:]


def peer(code: str = PEER) -> PeerProcess:
    return PeerProcess({"kind": "made up"}, [sys.executable, "-c", code])


def test_a_peer_answers_from_its_own_process() -> None:
    process = peer()
    try:
        plain = ProcessContender("a", process).run([1, 2, 3], 5, frozenset({9}))
        drafting = ProcessContender("b", process, lookup=True).run([1, 2, 3], 5, frozenset({9}))
    finally:
        process.close()
    assert process.about == "made up"
    assert plain == Run((3, 2, 1), 3, 5.0, 10.0, 2, 2)
    assert (plain.tokens_per_second, drafting.tokens_per_second, drafting.tokens_per_step) == (200.0, 400.0, 2.0)


def test_a_peer_that_ends_says_how() -> None:
    with pytest.raises(PeerError, match=r"status 1: .*no such thing"):
        peer("raise SystemExit('no such thing')")
    process = peer()
    try:
        with pytest.raises(PeerError, match="status 3: the library fell over"):
            process.ask([1], 13, frozenset(), False)
        with pytest.raises(PeerError, match="status 3"):
            process.ask([1], 2, frozenset(), False)
    finally:
        process.close()


def test_llama_cpp_needs_its_package_and_a_gguf_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install llama-cpp-python" in why_no_llama_cpp(tmp_path / "model.gguf")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert why_no_llama_cpp(tmp_path / "model.gguf") == ""
    assert "folder" in why_no_llama_cpp(tmp_path)


def test_contexts_that_do_not_fit_are_left_out_with_a_sentence(engine: Engine) -> None:
    contenders = [Scripted("a", 1.0), Scripted("b", 2.0)]
    found = measure_contexts(engine, contenders, (100, 9000), rounds=2, new_tokens=11, ask=suite.Peers().ask, say=print)
    assert found["left_out"] == "Left out: 9,000 tokens, as the model holds 8,192."
    assert list(found["lengths"]) == [100]
    assert found["lengths"][100]["b"]["tokens_per_second"]["median"] == 500.0
    assert found["lengths"][100]["a"]["first_token_ms"]["median"] == 100.0
    assert contenders[0].asked == [(100, 11, frozenset())] * 2


def test_slow_peers_take_every_third_prompt_and_are_compared_on_it(engine: Engine) -> None:
    off, fast, slow = Scripted("off", 1.0), Scripted("fast", 0.5), Scripted("slow", 4.0)
    peers = suite.Peers(fast=[fast], slow=[slow])
    plan = suite.Plan([[{"role": "user", "content": "Hi " * n}] for n in range(1, 5)], max_tokens=9)
    found = suite._answers(engine, [off], peers, plan, print)
    assert [len(off.asked), len(fast.asked), len(slow.asked)] == [5, 4, 2]  # the first warms up
    assert [prompt for prompt, *_ in slow.asked] == [off.asked[1][0], off.asked[4][0]]
    figures = found["contenders"]
    assert figures["slow"]["tokens_per_second"] == {"median": 250.0, "lowest": 250.0, "highest": 250.0, "runs": 2}
    assert (figures["fast"]["over_medusa_off"]["median"], figures["slow"]["over_medusa_off"]["median"]) == (2.0, 0.25)
    assert found["answers_that_differ"] == 0


def test_answers_that_differ_are_counted(engine: Engine) -> None:
    class Other(Scripted):
        def run(self, prompt: Sequence[int], max_tokens: int, ends: Ends) -> Run:
            return Run((9,) * max_tokens, len(prompt), 1.0, 1.0, 1, 1)

    plan = suite.Plan([[{"role": "user", "content": "Hi"}]] * 2, max_tokens=9)
    found = suite._answers(engine, [Scripted("off", 1.0), Other("on", 1.0)], suite.Peers(), plan, print)
    assert found["answers_that_differ"] == 2


def test_a_peer_that_dies_midway_costs_nobody_else(engine: Engine) -> None:
    class Mortal(Scripted):
        def run(self, prompt: Sequence[int], max_tokens: int, ends: Ends) -> Run:
            if len(self.asked) == 1:
                raise PeerError("It ended with status -11.")
            return super().run(prompt, max_tokens, ends)

    off, mortal, peers = Scripted("off", 1.0), Mortal("mortal", 1.0), suite.Peers()
    peers.fast = [mortal]
    plan = suite.Plan([[{"role": "user", "content": "Hi"}]] * 3, max_tokens=9)
    found = suite._answers(engine, [off], peers, plan, print)
    assert found["contenders"]["off"]["tokens_per_second"]["runs"] == 3
    assert found["contenders"]["mortal"]["tokens_per_second"]["runs"] == 1
    assert peers.left_out == {"mortal": "It ended with status -11."}
    later = measure_contexts(engine, [off, mortal], (100,), rounds=1, new_tokens=5, ask=peers.ask, say=print)
    assert list(later["lengths"][100]) == ["off"]


@pytest.mark.slow
def test_the_whole_suite_measures_every_part() -> None:
    plan = suite.Plan(
        [[{"role": "user", "content": "Name three colours."}]],
        max_tokens=24, contexts=(100,), context_tokens=8, rounds=1, starts=1, transformers=False,
    )  # fmt: skip
    report = json.loads(json.dumps(suite.run_suite(SETUP, plan, print)))
    assert report["answers"]["answers_that_differ"] == 0
    assert report["start"]["seconds_to_first_token"]["median"] > 0.2
    parts = report["memory"]["parts_bytes"]
    assert sum(parts.values()) == report["memory"]["held_bytes"] > 100e6
    assert report["contexts"]["lengths"]["100"]["Medusa off"]["first_token_ms"]["median"] > 0
    text = report_text(report)
    for words in ("no answer differs", "<- chosen", "tokens before", "peak while answering", "first token"):
        assert words in text


def test_a_part_that_failed_is_named_and_the_others_are_shown() -> None:
    def failing() -> None:
        raise OSError("no /proc here")

    slow, fast = (Scripted("", ms).run([1], 5, frozenset()) for ms in (2.0, 1.0))
    figures = suite._figures([slow], [fast])
    report: dict[str, Any] = {
        "model": {"name": "M", "weights": "int4"},
        "hardware": {"device": "a machine"},
        "threads": 2,
        "versions": {"python": "3.11"},
        "date": "2026-01-01",
        "tuning": None,
        "medusa": "no heads are known for M",
        "answers": {"prompts": 1, "max_tokens": 5, "answers_that_differ": 1, "contenders": {"a": figures}},
        "contexts": {"lengths": {}, "left_out": "Left out: 100 tokens, as the model holds 80."},
        "memory": suite._part(failing),
        "start": {"seconds_to_first_token": spread([1.0], 2)},
        "left_out": {"llama.cpp": "It is not installed."},
    }
    text = report_text(report)
    assert "Memory: this part failed. OSError: no /proc here" in text
    assert "1 ANSWERS DIFFER" in text
    assert "no heads are known for M" in text
    assert "Left out: llama.cpp. It is not installed." in text
    assert "0.50x" in text


def arguments(*words: str, **given: object) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(launcher.parse("bench", launcher.COMMANDS["bench"], list(words))), **given})


def test_out_without_a_place_is_the_package_s_results() -> None:
    assert arguments("--quick", "--out").out == cli_bench.RESULTS == readme_table.RESULTS
    assert arguments().out is None


def test_bad_input_is_refused_before_anything_is_measured(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for given, words in [
        ({"prompts": tmp_path / "none.jsonl"}, "cannot be read"),
        ({"out": tmp_path / "none" / "file.json"}, "there is no folder"),
        ({"kernels": True}, "leave --kernels out"),
        ({"model": str(tmp_path / "none")}, "There is no model"),
    ]:
        assert cli_bench.run(arguments(**given)) == 2
        out, err = capfd.readouterr()
        assert out == ""
        assert words in err.splitlines()[-1]


def test_results_are_printed_and_kept(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = {"model": {"device": "cpu"}, "answers": {"answers_that_differ": 1}}
    monkeypatch.setattr("engine.bench.command.bench", lambda *words, **settings: (report, "tables\n"))
    assert cli_bench.run(arguments(json=True, out=tmp_path)) == 1
    assert json.loads(capfd.readouterr().out) == report == json.loads((tmp_path / "bench_cpu.json").read_text())
    report["answers"] = {"error": "it failed"}  # type: ignore[dict-item]
    assert cli_bench.run(arguments()) == 0
    assert capfd.readouterr().out == "tables\n"


def test_readme_s_figures_are_those_of_the_kept_results() -> None:
    readme = readme_table.README.read_text(encoding="utf-8")
    assert readme_table.with_table(readme, readme_table.figures_table()) == readme, (
        "README.md differs from engine/bench/results; run: python -m engine.bench.readme_table"
    )


def test_results_give_their_rows_and_links(tmp_path: Path) -> None:
    steps = {size: 1.5 for size in ("1", "2", "4", "8", "16", "63")}
    report = {
        "hardware": "A card, driver 1",
        "date": "2026-01-02",
        "distillation": {"kept_tokens_per_second": 1234},
        "variants": [{"variant": "paper", "tokens_per_step": {}}],
        "bundled": {"hardware": "Another card", "date": "2026-01-03", "tokens_per_step": steps},
    }
    (tmp_path / "train_heads_card.json").write_text(json.dumps(report))
    (tmp_path / "unknown.json").write_text("not even JSON")
    table = readme_table.figures_table(tmp_path)
    assert "1.50 / 1.50 | Another card, 2026-01-03 |" in table
    assert "| 1,234 kept tokens/s | A card, 2026-01-02 |" in table
    assert "[results](engine/bench/results/train_heads_card.json)" in table


def test_the_table_replaces_what_stands_between_its_markers() -> None:
    text = f"above\n{readme_table.BEGIN}\nold\n{readme_table.END}\nbelow\n"
    new = readme_table.with_table(text, "new")
    assert new == f"above\n{readme_table.BEGIN}\nnew\n{readme_table.END}\nbelow\n"
    with pytest.raises(ValueError, match="no place for the figures"):
        readme_table.with_table("nothing here", "new")


def test_no_bench_teaches_the_tuner(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "learns", True)
    monkeypatch.setattr(Engine, "load", lambda *args, **kwargs: engine)
    assert load_engine().learns is False
    benches = [path for path in BENCHES.glob("*.py") if path.name != "loading.py"]
    assert len(benches) > 10
    assert [path.name for path in benches if "Engine.load(" in path.read_text(encoding="utf-8")] == []
