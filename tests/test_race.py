"""A race: both runs one after the other with one seed, told as they were; and on the page."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from browser import Page, running_server
from fake_engine import INFO, FakeEngine

from app.race import Lane, Race, verdict
from engine import SamplingParams

QUESTION = [{"role": "user", "content": "echo:" + " ".join(f"word{number}" for number in range(50))}]


def run(engine: FakeEngine, params: SamplingParams) -> Race:
    race = Race(QUESTION, params)
    race.run(engine, "")
    assert race.finished.is_set()
    return race


def test_both_runs_have_the_same_prompt_settings_and_seed_one_after_the_other() -> None:
    engine = FakeEngine()
    race = run(engine, SamplingParams(temperature=0.7, medusa=True))
    asked = [params for _, params in engine.requests][1:]  # the first one only reads the prompt
    assert [params.medusa for params in asked] == [False, True]
    assert replace(asked[0], medusa=True) == asked[1] and asked[0].seed is not None
    assert {str(messages) for messages, _ in engine.requests} == {str(QUESTION)}
    assert race.error == "" and verdict(*race.lanes)["same"] is True
    assert all(lane.times_ms == sorted(lane.times_ms) and lane.times_ms[0] == 0 for lane in race.lanes)


def test_verdict_says_where_texts_differ_and_who_was_faster() -> None:
    plain = Lane(False, ["a", "b", "c", "d"], [0, 10, 20, 30], [1, 2, 3, 4])
    medusa = Lane(True, ["a", "bcx"], [0, 15], [1, 2, 3, 5])
    assert verdict(plain, medusa) == {"ratio": 2.0, "same": False, "differs_at": 3}
    assert verdict(plain, replace(medusa, texts=["a", "bcd"]))["same"] is True
    slow = Lane(True, ["a", "bcd"], [0, 60], [1, 2, 3, 4])
    assert verdict(plain, slow) == {"ratio": 0.5, "same": True, "differs_at": None}
    assert verdict(Lane(False, ["a"], [0.0], [1]), Lane(True, ["a"], [0.0], [1]))["ratio"] is None


def test_without_heads_there_is_nothing_to_race() -> None:
    race = run(FakeEngine(info=replace(INFO, has_heads=False, heads_reason="the heads do not fit")), SamplingParams())
    assert "the heads do not fit" in race.error and race.lanes[0].result is None


def test_failing_engine_is_told() -> None:
    race = Race(QUESTION, SamplingParams())
    with pytest.raises(RuntimeError):
        race.run(FakeEngine(fail_after=3), "")
    assert race.finished.is_set() and "The race failed (RuntimeError" in race.error
    unloaded = Race(QUESTION, SamplingParams())
    unloaded.run(None, "No file.")
    assert unloaded.error == "The model is not loaded. No file."


@pytest.mark.browser
def test_race_on_the_page_replays_both_and_ends_with_ratio_and_badge(chromium: Any, tmp_path: Path) -> None:
    with running_server(tmp_path, pace_s=0.005) as (url, _):
        page = Page(chromium.new_page(viewport={"width": 1280, "height": 800}), url).open()
        page.send(QUESTION[0]["content"])
        page.wait_for_end()
        messages = page.page.locator(".message").count()
        page.page.get_by_role("button", name="Race", exact=True).click()
        page.page.wait_for_selector(".race-result:visible")
        texts = page.page.locator(".lane-text").all_inner_texts()
        assert texts[0] == texts[1] == page.answer()
        assert page.page.locator(".race-result .badge").inner_text() == "✓ same text"
        assert page.page.locator(".race-result strong").inner_text().endswith("faster with Medusa")
        assert page.page.locator(".lane-speed").first.inner_text().endswith("tokens/s")
        page.page.keyboard.press("Escape")
        page.page.wait_for_selector(".race", state="detached")
        assert page.page.locator(".message").count() == messages, "a race is no part of the conversation"
        page.assert_local_and_quiet()
