"""The toggle under random settings: a small run of the bench on both CPU runners, and that it notices a difference."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from test_decode import NUM_TOKENS, TREES, decode, random_heads

from engine import Engine, SamplingParams
from engine.bench import sampling_identity
from engine.bench.sampling_identity import random_settings, run
from engine.build import Built, build_drafter, build_torch_runner, pack_int4
from engine.decode import PLAIN
from engine.models.loader import LoadedModel

PROMPTS = ["Name three colours and say where one sees them."]


def test_random_settings_change_nothing_but_the_speed(engine: Engine) -> None:
    draw = random.Random(8)
    rows = list(run(engine, [random_settings(draw, 40) for _ in range(6)], PROMPTS))
    assert [row.is_identical for row in rows] == [True] * 6
    assert max(row.tokens_per_step for row in rows) > 1.2
    assert sum(row.generated_tokens for row in rows) > 100


def test_the_torch_runner_samples_the_same_for_any_tree(bundled: LoadedModel) -> None:
    runner = build_torch_runner(bundled.config, bundled.weights, "cpu", "int4", "Q4_1")
    drafter, _ = build_drafter(random_heads(bundled, "root"), Built(runner, pack_int4), bundled.weights.lm_head)
    ids = bundled.tokenizer.encode_chat([{"role": "user", "content": PROMPTS[0]}])
    params = SamplingParams(temperature=1.2, top_p=0.9, min_p=0.01, repetition_penalty=1.2, frequency_penalty=0.3)
    plain, _ = decode(runner, None, PLAIN, ids, params, 4)
    assert len(set(plain)) > NUM_TOKENS // 2
    assert decode(runner, drafter, TREES[2], ids, params, 4)[0] == plain


def test_a_difference_is_noticed(engine: Engine) -> None:
    """Typical acceptance is not exact, so it stands in for a mistake."""
    draw = random.Random(2)
    settings = [replace(random_settings(draw, 60), temperature=1.0, acceptance="typical", tree_nodes=8) for _ in "abcd"]
    rows = list(run(engine, settings, PROMPTS))
    differing = [row for row in rows if not row.is_identical]
    assert differing
    assert all(row.first_difference is not None and row.first_difference > 0 for row in differing)


def test_every_control_is_drawn() -> None:
    draw = random.Random(1)
    drawn = [random_settings(draw, 128).to_dict() for _ in range(100)]
    fixed = {"medusa", "max_tokens", "acceptance", "epsilon", "delta"}
    for name in set(drawn[0]) - fixed:
        assert len({json.dumps(settings[name]) for settings in drawn}) >= 4, name


def test_the_command_writes_what_it_drew_and_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: Engine
) -> None:
    monkeypatch.setattr(sampling_identity.Engine, "load", lambda *args, **kwargs: engine)
    arguments = ["--out", str(tmp_path), "--settings", "2", "--prompts", "1", "--max-tokens", "8", "--device", "cpu"]
    assert sampling_identity.main(arguments) == 0
    written = json.loads((tmp_path / "sampling_identity_cpu.json").read_text(encoding="utf-8"))
    assert (written["state"], written["comparisons"], written["answers_that_differ"]) == ("complete", 2, 0)
    assert [SamplingParams.from_dict(values).max_tokens for values in written["drawn"]] == [8, 8]
    assert sampling_identity.main([*arguments, "--minutes", "0"]) == 1
