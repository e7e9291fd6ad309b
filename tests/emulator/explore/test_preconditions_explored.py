"""A search in which no execution met its test's precondition proves nothing, and says so."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import pytest

from emulator.cli.main import main
from emulator.explore.machine.lib import instrument
from emulator.explore.machine.program import LitmusProgram
from emulator.explore.results.verdict import Plan, Verdict, explore_verdict
from emulator.explore.strategies.dpor import Exhaustive
from emulator.explore.strategies.search import Found, Limits, search
from emulator.explore.strategies.tree import wide_search
from emulator.litmus.loader import load_test, parse_test
from emulator.litmus.model import INCONCLUSIVE, SAFE, LitmusTest
from emulator.litmus.policies import named_policy
from emulator.litmus.verdict import BOUNDED

# One wrong digit: the host unmaps 0x21, the guest reads 0x20.
VACUOUS = """
doc = "d"
source = "s"
init = ["v0: read 0x20", "v0: migrate 1"]
[threads.v0]
vcpu = 0
ops = ["wait mm 1", "migrate 0", "read 0x20"]
[threads.mm]
ops = ["host-unmap 0x21"]
"""
RIGHT = VACUOUS.replace("0x21", "0x20")
PLAN = Plan(executions=40, minimize=False)


def program_of(text: str) -> LitmusTest:
    return parse_test(text, "t", None)


def verdict_of(text: str, policy: str = "linux-7.3", plan: Plan = PLAN, jobs: int = 1) -> Verdict:
    return explore_verdict(program_of(text), named_policy(policy), plan, jobs=jobs)


@pytest.mark.parametrize("policy", ["linux-7.3", "migration=none"])
def test_where_nothing_can_happen_nothing_is_proved(policy: str) -> None:
    found = verdict_of(VACUOUS, policy)
    assert (found.verdict, found.complete, found.met) == (INCONCLUSIVE, True, 0)
    assert found.summary() == (
        "inconclusive: the precondition (averted) never held in the only interleaving, up to the order of "
        "independent steps, sequentially consistent"
    )
    assert {key: found.document()[key] for key in ("verdict", "needs", "met", "evidence")} == {
        "verdict": "inconclusive",
        "needs": ["averted"],
        "met": 0,
        "evidence": {} if policy == "linux-7.3" else {"elided": 3},
    }


def test_the_right_digit_is_a_proof() -> None:
    found = verdict_of(RIGHT, plan=Plan(minimize=False))
    assert (found.verdict, found.complete) == (SAFE, True)
    assert found.met == found.evidence["averted"] > 0
    assert verdict_of(RIGHT, "migration=none").verdict == "violations"


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (replace(PLAN, strategy="pct"), "held in 40 interleavings; not all, --executions were done; PCT"),
        (replace(PLAN, strategy="random"), "never held in 40 interleavings; not all, --executions were done"),
        (replace(PLAN, bound=0), "never held with up to 0 preemptions; nor in 2 interleavings altogether"),
    ],
)
def test_no_strategy_makes_something_of_nothing(plan: Plan, words: str) -> None:
    found = verdict_of(VACUOUS, plan=plan)
    assert found.verdict == INCONCLUSIVE
    assert words in found.summary()


def test_a_search_up_to_a_bound_needs_the_danger_as_well() -> None:
    plan = Plan(bound=0, minimize=False)
    test = load_test("entry-races-request")
    assert explore_verdict(test, named_policy("linux-7.3"), plan).verdict == BOUNDED
    other = parse_test(test.text.replace("[expect]", '[expect]\nneeds = "yields"'), "t", None)
    found = explore_verdict(other, named_policy("linux-7.3"), plan)
    assert (found.verdict, found.bound) == (INCONCLUSIVE, 0)
    assert "the precondition (yields) never held with up to 0 preemptions; nor in 2" in found.summary()


@pytest.mark.parametrize("needs", ["averted", "nothing"])
def test_a_search_without_executions_proves_nothing(needs: str) -> None:
    test = program_of(f'{RIGHT}\n[expect]\nneeds = "{needs}"')
    found = explore_verdict(test, named_policy("linux-7.3"), PLAN, lambda: True)
    assert (found.verdict, found.executions) == (INCONCLUSIVE, 0)
    assert found.summary().startswith("inconclusive: no interleaving was executed, the time was up")


INVALIDATES = """
doc = "d"
source = "s"
init = ["v0: map 0x100 0x10"{init}]
final = [{final}]
[[vm]]
paging = true
[threads.v0]
vcpu = 0
ops = ["read 0x100"]
[expect]
needs = "guest-invalidations"
"""


@pytest.mark.parametrize(
    ("init", "final", "verdict"),
    [("", "", INCONCLUSIVE), (', "v0: invlpg 0x100"', "", INCONCLUSIVE), ("", '"v0: invlpg 0x100"', SAFE)],
)
def test_what_init_does_is_no_danger_and_what_final_does_is_one(init: str, final: str, verdict: str) -> None:
    assert verdict_of(INVALIDATES.format(init=init, final=final)).verdict == verdict


def search_all(test: LitmusTest, *, rebuild: bool, reduce: bool = True) -> Found:
    program = LitmusProgram(test, named_policy("linux-7.3"), rebuild=rebuild)
    try:
        with instrument(program.control):
            strategy = Exhaustive(program.objects, bound=0, reduce=reduce)
            return search(program, program.objects, strategy, Limits(), bool)
    finally:
        program.close()


def test_what_a_machine_did_before_counts_for_no_execution() -> None:
    """Put back to its start it behaves like a new one."""
    test = load_test("entry-races-request")
    kept, anew = search_all(test, rebuild=False), search_all(test, rebuild=True)
    assert kept.met == kept.executions > 1
    assert (kept.met, kept.evidence) == (anew.met, anew.evidence)


@pytest.mark.slow
def test_the_number_of_processes_changes_no_count(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts are small, so that few executions make many."""
    monkeypatch.setattr("emulator.explore.results.rounds.wide_search", partial(wide_search, plain=8, part=8))
    monkeypatch.setattr("emulator.explore.results.workers.FIRST_PARTS", 0)
    options = ["remote-two-vcpus", "--executions", "200", "--json"]
    documents = []
    for jobs in ("1", "2"):
        assert main(["explore", *options, "--jobs", jobs]) == 0
        documents.append(capsys.readouterr().out)
    assert documents[0] == documents[1]
    (found,) = json.loads(documents[0])["explored"]
    assert found["executions"] == found["met"] == 200


def test_the_commands_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "vacuous.toml"
    path.write_text(VACUOUS)
    assert main(["explore", str(path), "--jobs", "1"]) == 0
    assert "inconclusive: the precondition (averted) never held" in capsys.readouterr().out
    options = ["litmus", str(path), "--explore", "--policy", "linux-7.3", "--jobs", "1"]
    assert main([*options, "--json"]) == 1
    (outcome,) = json.loads(capsys.readouterr().out)["outcomes"]
    assert (outcome["verdict"], outcome["differs"]) == ("inconclusive", "inconclusive instead of safe")
    assert main(options) == 1
    assert "vacuous under linux-7.3: inconclusive instead of safe" in capsys.readouterr().out
    path.write_text(f'{VACUOUS}\n[expect]\ndefault = "inconclusive"\n')
    assert main(options) == 0
    path.write_text(f'{RIGHT}\n[expect]\ndefault = "inconclusive"\n')
    assert main(options) == 1
    assert "vacuous under linux-7.3: safe instead of inconclusive" in capsys.readouterr().out


def test_one_line_tells_proofs_from_what_tested_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "vacuous.toml"
    path.write_text(VACUOUS)
    words = [str(path), "return-zap", "--policy", "linux-7.3", "--policy", "linux-6.12", "--jobs", "1"]
    line = "2 proved with their precondition met, 2 inconclusive: vacuous under 2 policies"
    assert main(["explore", *words]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == line
    assert main(["litmus", "--explore", *words]) == 1
    assert line in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("strategy", ["exhaustive", "pct"])
def test_executions_that_are_cut_off_prove_nothing_and_are_told(
    strategy: Literal["exhaustive", "pct"], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("rounds", "verdict"):
        monkeypatch.setattr(f"emulator.explore.results.{module}.Limits", partial(Limits, steps=20))
    found = explore_verdict(
        load_test("return-zap"), named_policy("linux-7.3"), Plan(executions=10, strategy=strategy)
    )
    assert (found.complete, found.limit, found.guarantee) == (False, "steps", None)
    assert f"; not all, {found.cut_off:,} were cut off after 20 steps" in found.summary()
