from __future__ import annotations

import pytest

from emulator.cli.main import main
from emulator.policy import DEFAULT, MUTANTS, PRESETS, Mutant, PolicyError, preset
from native import VIOLATION_KINDS


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=list(MUTANTS))
def test_every_mutant_is_a_policy(mutant: Mutant) -> None:
    policy = preset(f"mutant:{mutant.name}")
    assert policy.name == f"mutant:{mutant.name}"
    assert policy.bugs == PRESETS[mutant.base].bugs | set(mutant.bugs)
    assert policy.answers() == {**PRESETS[mutant.base].answers(), **mutant.settings}
    assert mutant.bugs or mutant.settings
    assert mutant.doc
    assert mutant.source
    assert set(mutant.expected) <= set(VIOLATION_KINDS)
    assert mutant.base in PRESETS


def test_presets_are_no_mutants() -> None:
    assert not any(name.startswith("mutant:") for name in PRESETS)
    assert preset(DEFAULT).name == DEFAULT


def test_an_unknown_mutant_says_which_there_are() -> None:
    with pytest.raises(PolicyError, match=r"'mutant:P99'.*mutant:P10, "):
        preset("mutant:P99")


def test_list_mutants(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "mutants"]) == 0
    out = capsys.readouterr().out
    assert all(f"mutant:{name}" in out for name in MUTANTS)
    assert main(["list", "policies"]) == 0
    assert "flushlab list mutants" in capsys.readouterr().out
