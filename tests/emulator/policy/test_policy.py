from __future__ import annotations

import pytest

from emulator.errors import BadInput
from emulator.policy import DEFAULT, POINTS, PRESETS, Policy, PolicyError, preset
from emulator.policy.presets import PRESET_DOCS


def test_every_point_is_a_method_and_its_first_alternative_the_default() -> None:
    assert all(callable(getattr(Policy, point.name)) for point in POINTS)
    assert Policy().answers() == {point.name: point.default for point in POINTS}


def test_the_default_preset_has_no_mutant() -> None:
    assert PRESETS[DEFAULT] == Policy()
    assert not PRESETS[DEFAULT].mutants()


@pytest.mark.parametrize("name", ["linux-6.12", "linux-5.18", "cpu-flushed-mask-cleared", "root-tlb-gen"])
def test_what_is_thought_sound_contains_no_mutant(name: str) -> None:
    assert not PRESETS[name].mutants()


def test_every_preset_is_described() -> None:
    assert list(PRESET_DOCS) == list(PRESETS)
    assert all(name == policy.name for name, policy in PRESETS.items())


def test_alternatives_are_described_and_distinct() -> None:
    for point in POINTS:
        assert point.doc
        assert len(set(point.names())) == len(point.alternatives) >= 2
        assert not point.alternatives[0].mutant
        assert all(alternative.doc for alternative in point.alternatives)


def test_with_settings() -> None:
    policy = Policy().with_settings({"migration": "none", "kick_wait": "no-wait"})
    answers = policy.answers()
    assert (answers["migration"], answers["kick_wait"]) == ("none", "no-wait")
    assert answers["root_load"] == "flush-current"
    assert policy.name == "linux-7.3+kick_wait=no-wait+migration=none"
    assert policy.mutants() == ("kick_wait=no-wait", "migration=none")
    assert Policy().with_settings({}) == Policy()


@pytest.mark.parametrize(
    ("settings", "found", "expected"),
    [
        ({"migraton": "none"}, "'migraton'", "did you mean migration?"),
        ({"migration": "nothing"}, "'nothing'", "all-contexts, none, active-roots, cpu-flushed-mask"),
        ({"name": "x"}, "'name'", "one of remote_flush"),
    ],
)
def test_bad_settings_say_so_in_one_line(settings: dict[str, str], found: str, expected: str) -> None:
    with pytest.raises(PolicyError) as error:
        Policy().with_settings(settings)
    text = str(error.value)
    assert found in text
    assert expected in text
    assert "\n" not in text
    assert isinstance(error.value, BadInput)


def test_an_unknown_preset_says_which_there_are() -> None:
    with pytest.raises(PolicyError, match=r"linux-7\.4.*linux-6\.12"):
        preset("linux-7.4")


def test_a_policy_checks_itself() -> None:
    with pytest.raises(PolicyError, match="root_load"):
        Policy(root_load="flush")
