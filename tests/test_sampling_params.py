"""Settings: the allowed ranges, the plain-value round trip, and the presets."""

import json

import pytest

from app.presets import CUSTOM, DEFAULT_PRESET, PRESETS, preset_name, with_preset
from engine import InvalidParameterError, SamplingParams

FULL = SamplingParams(
    medusa=False,
    temperature=0.8,
    seed=2**63 - 1,
    max_tokens=77,
    tree_nodes=5,
    acceptance="typical",
    epsilon=0.2,
    delta=0.5,
    top_k=40,
    top_p=0.9,
    min_p=0.05,
    repetition_penalty=1.2,
    presence_penalty=-0.5,
    frequency_penalty=0.25,
    stop=("\n\n", "END"),
    logit_bias=((5, -100.0), (7, 2.5)),
)


@pytest.mark.parametrize("params", [SamplingParams(), FULL])
def test_settings_come_back_from_json(params: SamplingParams) -> None:
    again = SamplingParams.from_dict(json.loads(json.dumps(params.to_dict())))
    assert again == params
    assert hash(again) == hash(params)


def test_every_setting_of_the_full_example_differs_from_its_default() -> None:
    """Or the round trip above would not notice a setting that is lost."""
    defaults = SamplingParams().to_dict()
    assert [name for name, value in FULL.to_dict().items() if value == defaults[name]] == []


def test_convenient_forms_are_understood_and_foreign_keys_passed_over() -> None:
    params = SamplingParams.from_dict({"stop": "END", "logit_bias": {"12": 3, 13: -4}, "system": "Be brief."})
    assert params == SamplingParams(stop=("END",), logit_bias=((12, 3), (13, -4)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"medusa": "yes"},
        {"temperature": 5.1},
        {"temperature": "hot"},
        {"temperature": float("nan")},
        {"seed": 1.5},
        {"seed": 2**63},
        {"max_tokens": True},
        {"top_k": -1},
        {"top_k": 2.5},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 10.5},
        {"presence_penalty": 2.1},
        {"frequency_penalty": -2.1},
        {"frequency_penalty": None},
        {"stop": [""]},
        {"stop": [3]},
        {"stop": ["x"] * 17},
        {"stop": ["x" * 201]},
        {"stop": 5},
        {"logit_bias": [[1, 101]]},
        {"logit_bias": [[-1, 1]]},
        {"logit_bias": [[1, 1], [1, 2]]},
        {"logit_bias": [[1]]},
        {"logit_bias": {"word": 1}},
        {"logit_bias": "1=2"},
    ],
)
def test_impossible_values_are_refused_with_the_range(wrong: dict[str, object]) -> None:
    name = next(iter(wrong))
    with pytest.raises(InvalidParameterError, match=f"{name} is .*; allowed is "):
        SamplingParams.from_dict(wrong)


@pytest.mark.parametrize(
    ("settings", "is_argmax"),
    [
        ({}, True),
        ({"top_k": 5, "acceptance": "typical"}, True),
        ({"temperature": 0.5}, False),
        ({"presence_penalty": 0.1}, False),
        ({"logit_bias": ((3, 1.0),)}, False),
    ],
)
def test_what_counts_as_simply_the_likeliest(settings: dict[str, object], is_argmax: bool) -> None:
    assert SamplingParams(**settings).is_argmax == is_argmax  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_known_by_their_values(name: str) -> None:
    settings = with_preset(FULL.to_dict(), name)
    assert SamplingParams.from_dict(settings).to_dict() == settings
    assert preset_name(settings) == name
    assert preset_name({**settings, "top_k": 3}) == CUSTOM
    assert settings["stop"] == list(FULL.stop)


def test_nothing_chosen_is_the_default_preset() -> None:
    assert preset_name(SamplingParams().to_dict()) == preset_name({}) == DEFAULT_PRESET
