"""The controls on the page are those of the engine, with ranges that it takes."""

from dataclasses import fields

import pytest

from app.presets import PRESETS
from app.settings import CONTROLS, MAX_SYSTEM_LENGTH, SettingsError, checked_settings, settings_options
from engine import SamplingParams


@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: control.name)
def test_both_ends_of_every_slider_are_possible(control) -> None:
    for value in (control.low, control.high):
        assert checked_settings({control.name: value})[control.name] == value


def test_every_setting_of_the_engine_can_be_chosen() -> None:
    options = settings_options()
    named = {control["name"] for control in options["controls"] + options["thresholds"]}
    elsewhere = {"medusa", "seed", "tree_nodes", "acceptance", "stop", "logit_bias"}
    assert named | elsewhere == {field.name for field in fields(SamplingParams)}
    assert set(options["defaults"]) == named | elsewhere | {"system"}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_recognised_after_a_check(name: str) -> None:
    assert checked_settings(PRESETS[name])["preset"] == name
    assert checked_settings({**PRESETS[name], "top_k": 3})["preset"] == "Custom"


@pytest.mark.parametrize(
    "values,message",
    [
        ({"temperature": 9}, "temperature is 9; allowed is 0 to 5"),
        ({"seed": "x"}, "seed is x; allowed is auto"),
        ({"logit_bias": [[float("nan"), 1]]}, "logit_bias"),
        ({"system": "x" * (MAX_SYSTEM_LENGTH + 1)}, "shorten it"),
        ({"system": 5}, "system prompt"),
    ],
)
def test_impossible_settings_are_refused_in_a_sentence(values, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        checked_settings(values)
