from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from emulator.cli.main import main
from emulator.explore.results.replay import replay
from emulator.explore.results.verdict import Plan, explore_verdict
from emulator.litmus.loader import load_test, load_tests, parse_test
from emulator.litmus.model import KINDS
from emulator.litmus.policies import expected_of, is_cost_only, named_policy, policies_for, suits
from emulator.policy import DEFAULT, MUTANTS, PRESETS, Mutant, PolicyError, preset
from emulator.policy.mutants import canonical
from emulator.policy.mutants.catalogue import NAMES

EXPECT = """
doc = "A test."
source = "A test."
[threads.v0]
vcpu = 0
pcpu = 0
ops = ["read 0x10"]
[expect]
needs = "nothing"
"""


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=list(MUTANTS))
def test_every_mutant_is_a_policy(mutant: Mutant) -> None:
    policy = preset(f"mutant:{mutant.name}")
    assert policy.name == f"mutant:{mutant.name}"
    assert policy.patch == mutant.patch
    assert policy.answers() == {**PRESETS[mutant.base].answers(), **mutant.settings}
    assert mutant.patch or mutant.settings
    assert mutant.doc
    assert mutant.source
    assert set(mutant.expected) <= set(KINDS)
    assert mutant.base in PRESETS


def test_presets_are_no_mutants() -> None:
    assert not any(name.startswith("mutant:") for name in PRESETS)
    assert preset(DEFAULT).name == DEFAULT


def test_an_unknown_mutant_is_refused_with_the_way_to_the_known_ones() -> None:
    with pytest.raises(PolicyError, match=r"'mutant:P99'; expected one of those that .flushlab list mutants"):
        preset("mutant:P99")
    with pytest.raises(PolicyError, match=r"did you mean mutant:unlock-before-flush\?"):
        preset("mutant:unlock-befor-flush")


def test_names_describe_and_differ() -> None:
    assert set(NAMES) == {mutant.id for mutant in MUTANTS.values()}
    assert len(MUTANTS) == len(NAMES)
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)+", name) for name in MUTANTS)


# --- ids are aliases ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=list(MUTANTS))
def test_an_id_is_an_alias(mutant: Mutant) -> None:
    name, alias = f"mutant:{mutant.name}", f"mutant:{mutant.id}"
    assert canonical(alias) == canonical(name) == name
    assert canonical(f"{alias}+zap=rcu-proxy") == f"{name}+zap=rcu-proxy"
    assert preset(alias) == preset(name)
    assert preset(alias).name == named_policy(alias).name == name
    assert named_policy(f"{alias}+kick_wait=wait").name == f"{name}+kick_wait=wait"
    assert is_cost_only(alias) == is_cost_only(name) == mutant.cost_only
    test = next(one for one in load_tests(["return-zap", "shadow-unmap"]) if suits(one, name))
    assert policies_for(test, [alias, name], False) == [name]


def test_only_mutants_have_aliases() -> None:
    assert canonical("B6") == "B6"
    assert canonical("mutant:B7.py") == "mutant:B7.py"


def test_a_litmus_test_may_expect_by_id() -> None:
    test = parse_test(EXPECT + '"mutant:B6" = ["use-after-free"]\n', "t", None)
    assert expected_of(test, "mutant:iterator-skips-spte") == (("use-after-free",),)
    late = parse_test(EXPECT + '[expect.store-buffers]\n"mutant:S1" = ["use-after-free"]\n', "t", None)
    assert late.expect.apart()["store-buffers"] == {"mutant:entry-without-barrier": ("use-after-free",)}


def test_no_litmus_test_expects_by_id_and_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.toml"
    path.write_text(EXPECT + '"mutant:B6" = "safe"\n"mutant:iterator-skips-spte" = ["use-after-free"]\n')
    assert main(["litmus", str(path)]) == 2
    assert "t.toml: expect: " in capsys.readouterr().err


def test_a_recording_may_name_its_policy_by_id(tmp_path: Path) -> None:
    found = explore_verdict(load_test("fault-races-unmap"), named_policy("mutant:P15"), Plan(minimize=False))
    assert found.counterexample is not None
    assert found.policy == found.counterexample.policy == "mutant:fault-without-retry"
    document = {**found.counterexample.document(), "policy": "mutant:P15"}
    path = tmp_path / "old.json"
    path.write_text(json.dumps(document))
    assert replay(path).violation == found.counterexample.violation


def test_reports_name_the_bug() -> None:
    assert preset("mutant:B6").mutants() == ("iterator-skips-spte",)
    assert preset("mutant:B7").mutants() == ("write_protect=if-changed",)


def test_list_mutants(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "mutants"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(f"mutant:{mutant.name} ({mutant.id})" in lines for mutant in MUTANTS.values())
    assert main(["list", "policies"]) == 0
    assert "flushlab list mutants" in capsys.readouterr().out
