"""Settings: what is accepted, what is refused in which words, and that the manual tells the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from stillroom_shared.errors import SettingsError
from stillroom_shared.mechanism import MechanismName
from stillroom_shared.settings import SCALES, RoundsSettings, Settings, load_settings
from stillroom_shared.settings_file import Group, allowed, fields, load, reference

ROOT = Path(__file__).resolve().parents[2]
KNOWN = dict(fields(Settings))


def write(folder: Path, text: str) -> Path:
    path = folder / "settings.toml"
    path.write_text(text, encoding="utf-8")
    return path


def values(tree: Settings, key: str) -> Any:
    for part in key.split("."):
        tree = getattr(tree, part)
    return tree


def test_later_sources_win(tmp_path: Path) -> None:
    """Guards against a file that silently beats the command line, or a scale that beats them both."""
    path = write(
        tmp_path, "seed = 3\n[corpus]\nscale = 'full'\n[rounds]\nrounds = 9\n[population]\ndistractors_max = 50\n"
    )
    made = load_settings(path, {"rounds.rounds": "11"})
    assert (made.seed, made.rounds.rounds, made.population.distractors_max) == (3, 11, 50)
    assert made.corpus.scale == "full"
    for key, value in SCALES["full"].items():
        if key == "rounds.rounds":
            continue  # given above
        assert values(made, key) == value, f"{key} of the full scale is not applied when a file asks for that scale"


def test_a_file_changes_only_what_it_names(tmp_path: Path) -> None:
    """Guards against a table that resets its other keys: [nonprivate] must not fall back to the private defaults."""
    made = load_settings(write(tmp_path, "[nonprivate]\nrounds = 4\n"), {})
    assert made.nonprivate == Settings().nonprivate.model_copy(update={"rounds": 4})
    assert made.nonprivate.mechanism == "none"


def test_every_default_survives_the_trip_through_toml_and_text() -> None:
    """Guards against a new setting whose type loads from code but from no file or command line."""
    for key in KNOWN:
        default = values(Settings(), key)
        text = (
            ",".join(map(str, default)) if isinstance(default, tuple) else "none" if default is None else str(default)
        )
        assert values(load_settings(None, {key: text}), key) == default, key


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "[rounds]\nnoise_multiplyer = 2.0",
            "rounds.noise_multiplyer is unknown: did you mean rounds.noise_multiplier?",
        ),
        ("noise_multiplier = 2.0", "setting noise_multiplier is unknown: did you mean rounds.noise_multiplier?"),
        ("rounds = 3", "setting rounds is unknown"),
        ("[rounds.clip_norm]\nvalue = 3", "setting rounds.clip_norm.value is unknown: did you mean rounds.clip_norm?"),
        ("[rounds]\nnoise_multiplier = -1.0", "rounds.noise_multiplier is -1.0: give number, above 0, or none"),
        ("[rounds]\nnoise_multiplier = nan", "rounds.noise_multiplier is"),
        ("[rounds]\nnoise_multiplier = '2.0'", "rounds.noise_multiplier is '2.0': give number"),
        ("[rounds]\nnoise_multiplier = true", "rounds.noise_multiplier is True: give number"),
        ("[rounds]\nsampling_rate = 1.5", "rounds.sampling_rate is 1.5: give number, above 0, at most 1"),
        ("[rounds]\nrounds = 2.5", "rounds.rounds is 2.5: give integer"),
        ("[rounds]\nmechanism = 'distant'", "rounds.mechanism is 'distant': give none or central"),
        ("[distil]\nlayers = [0, 'two']", "distil.layers is 'two': give list of integer"),
        ("[distil]\nlayers = []", "distil.layers is []: give list of integer, not empty"),
        ("[corpus]\nscale = 'tiny'", "corpus.scale is 'tiny': give small or full"),
        (
            "[rounds]\ntarget_epsilon = 4.0",
            "settings of rounds: clip_norm 0.3, noise_multiplier 2.0, target_epsilon 4.0",
        ),
        ("[rounds]\nclip_norm = 'none'", "settings of rounds: clip_norm none"),
        ("[rounds]\nnoise_multiplier = 'none'", "give one of the last two"),
        ("[nonprivate]\nclip_norm = 1.0", "settings of nonprivate: clip_norm 1.0"),
        ("seed = -1", "setting seed is -1: give integer, at least 0"),
        ("seed = ", "is not TOML"),
    ],
)
def test_refused_by_name_value_and_remedy(tmp_path: Path, text: str, words: str) -> None:
    """Guards against a misspelt or impossible value that is taken for the default."""
    with pytest.raises(SettingsError) as refusal:
        load_settings(write(tmp_path, text), {})
    assert words in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


def test_all_mistakes_are_named_at_once(tmp_path: Path) -> None:
    """Guards against a user who repairs a file one run at a time."""
    with pytest.raises(SettingsError) as refusal:
        load_settings(write(tmp_path, "[rounds]\nrounds = -1\nmomentum = 1.0\n"), {"distil.epochs": "many"})
    assert [line.split(" is ")[0] for line in str(refusal.value).splitlines()] == [
        "setting distil.epochs",
        "setting rounds.rounds",
        "setting rounds.momentum",
    ]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    """Guards against a missing file that means "all defaults"."""
    with pytest.raises(SettingsError, match=r"nowhere\.toml cannot be read"):
        load_settings(tmp_path / "nowhere.toml", {})


def test_none_unsets_only_what_may_be_unset() -> None:
    """Guards against `mechanism = none`, a value of its own, being read as "unset"."""
    made = load_settings(None, {"rounds.noise_multiplier": "none", "rounds.target_epsilon": "2"})
    assert (made.rounds.noise_multiplier, made.rounds.target_epsilon) == (None, 2.0)
    switched = {"mechanism": "none", "clip_norm": "none", "noise_multiplier": "none"}
    made = load_settings(None, {f"rounds.{name}": value for name, value in switched.items()})
    assert made.rounds.mechanism == "none"
    with pytest.raises(SettingsError, match=r"rounds\.momentum is 'none'"):
        load_settings(None, {"rounds.momentum": "none"})


def test_settings_do_not_change() -> None:
    """Guards against a stage that alters what a later stage, and the report, believe was set."""
    with pytest.raises(ValidationError):
        Settings().rounds.rounds = 3  # type: ignore[misc]
    with pytest.raises(ValidationError):
        RoundsSettings(noise_multiplier=-1.0)


def test_mechanisms_are_those_that_exist() -> None:
    """Guards against a mechanism that can be set and not run, or the reverse."""
    assert get_args(KNOWN["rounds.mechanism"].annotation) == get_args(MechanismName)


@settings(deadline=None, max_examples=50)
@given(st.sampled_from(sorted(KNOWN)), st.text(max_size=12))
def test_any_text_is_taken_or_refused_with_its_name(key: str, text: str) -> None:
    """Guards against text that crashes the loader instead of being refused by name."""
    try:
        load_settings(None, {key: text})
    except SettingsError as error:
        assert key.split(".")[0] in str(error)


def test_the_manual_page_is_current() -> None:
    """Guards against a manual that describes the settings of last week. To renew it: make docs."""
    scales = {scale: load_settings(None, {"corpus.scale": scale}) for scale in SCALES}
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == reference(scales) + "\n"


def test_every_setting_is_described() -> None:
    """Guards against a knob that only its author can turn."""
    for key, field in KNOWN.items():
        assert field.description and "|" not in field.description, key
        assert "none or none" not in allowed(field)


class Animal(Group):
    """One of a zoo."""

    weight: float = Field(1.0, gt=0, description="in kg")
    legs: int = Field(ge=0, description="how many it stands on")


class Stone(Group):
    """One of a quarry."""

    weight: float = Field(1.0, gt=0, description="in kg")


class Quarry(Group):
    """Stones under names."""

    stones: dict[str, Stone] = Field(default_factory=dict, description="by name")


class Zoo(Group):
    """Animals under names of the file's choice."""

    animals: dict[str, Animal] = Field(default_factory=dict, description="by name")


def test_named_tables_take_any_name_and_nothing_else(tmp_path: Path) -> None:
    """Guards against a misspelt setting inside a table whose name is free, which would be taken for another name."""
    path = tmp_path / "zoo.toml"
    path.write_text("[animals.tapir]\nlegs = 4\n[animals.crane]\nlegs = 2\nweight = 6.0\n")
    zoo = load(Zoo(), path, {"animals.crane.weight": "7", "animals.newt.legs": "4"})
    assert {name: (one.legs, one.weight) for name, one in zoo.animals.items()} == {
        "tapir": (4, 1.0),
        "crane": (2, 7.0),
        "newt": (4, 1.0),
    }
    for text, words in [
        ("[animals.tapir]\nleg = 4", "setting animals.tapir.leg is unknown: did you mean animals"),
        ("[animals.tapir]\nweight = 4.0", "setting animals.tapir.legs is missing: give integer, at least 0"),
        ("[animals.tapir]\nlegs = -1", "setting animals.tapir.legs is -1: give integer, at least 0"),
        ("animals = 3", "setting animals is unknown"),
    ]:
        path.write_text(text)
        with pytest.raises(SettingsError, match=re.escape(words)):
            load(Zoo(), path, {})


def test_a_named_table_without_a_word_is_there_with_its_defaults(tmp_path: Path) -> None:
    """Guards against a teacher that is named, keeps every default, and is silently not there."""
    path = write(tmp_path, "[stones.flint]\n")
    assert load(Quarry(), path, {}).stones == {"flint": Stone()}
    order = write(tmp_path, "[stones.slate]\nweight = 2.0\n[stones.flint]\n[stones.basalt]\nweight = 3.0\n")
    assert list(load(Quarry(), order, {}).stones) == ["slate", "flint", "basalt"]
    with pytest.raises(SettingsError, match="setting stone is unknown"):
        load(Quarry(), write(tmp_path, "[stone]\n"), {})
