"""TLBs that drop and fetch translations of their own: states that this makes reachable, and others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emulator.cli.main import main
from emulator.errors import BadInput
from emulator.explain.document import load_cases
from emulator.explain.meanings import FILL
from emulator.explore.engine.scheduler import Execution
from emulator.explore.machine.adversary import places
from emulator.explore.machine.lib import instrument
from emulator.explore.machine.options import ExploreOptions
from emulator.explore.machine.program import LitmusProgram
from emulator.explore.results.replay import load, replay
from emulator.explore.results.verdict import Plan, Verdict, explore_verdict
from emulator.explore.strategies.dpor import Exhaustive
from emulator.explore.strategies.search import Found, Limits, search
from emulator.litmus.loader import load_test, parse_test, shipped_tests
from emulator.litmus.model import SAFE, LitmusTest
from emulator.litmus.policies import named_policy
from emulator.litmus.verdict import VIOLATIONS
from native import ffi, lib

APART = [
    (test.name, choice, policy, expected)
    for test in shipped_tests()
    for choice, policies in test.expect.apart().items()
    if choice in ("evict", "speculate")
    for policy, expected in policies.items()
]
TINY = """
doc = "Two reads of one page, and one of another."
source = "here"
[machine]
pcpus = 1
[threads.v0]
vcpu = 0
ops = ["read 0x10", "read 0x10", "read 0x11"]
[expect]
needs = "nothing"
"""


def verdict_of(test: str, policy: str, options: ExploreOptions, executions: int = 2000) -> Verdict:
    plan = Plan(executions=executions, minimize=False, options=options)
    return explore_verdict(load_test(test), named_policy(policy), plan)


class Counted(LitmusProgram):
    """The outcome is how often the guest missed the TLB, and how much was fetched without an access."""

    def __init__(self, test: LitmusTest, options: ExploreOptions) -> None:
        super().__init__(test, named_policy("linux-7.3"), options)
        self.counters = ffi.new("uint64_t[]", lib.COUNTERS)
        self.before: tuple[int, ...] = ()

    def count(self) -> tuple[int, ...]:
        lib.counters_sum(self.machine.m, self.counters)
        kinds = (lib.COUNT_L2_MISSES, lib.COUNT_SPECULATIVE, lib.COUNT_WALK_REFERENCES)
        return tuple(int(self.counters[kind]) for kind in kinds)

    def start(self, execution: Execution) -> None:
        super().start(execution)
        self.before = self.count()

    def finish(self, execution: Execution) -> str:
        counts = zip(self.count(), self.before, strict=True)
        missed, fetched, references = (after - before for after, before in counts)
        return f"{super().finish(execution)} missed {missed} fetched {fetched} references {references}"


def outcomes(options: ExploreOptions, *, reduce: bool = True) -> Found:
    program = Counted(parse_test(TINY, "tiny", None), options)
    try:
        with instrument(program.control):
            strategy = Exhaustive(program.objects, reduce=reduce)
            found = search(program, program.objects, strategy, Limits(), lambda outcome: False)
    finally:
        program.close()
    assert found.complete
    return found


def test_there_are_litmus_tests_for_both() -> None:
    assert {choice for _, choice, _, _ in APART} == {"evict", "speculate"}


@pytest.mark.slow
@pytest.mark.parametrize(("test", "choice", "policy", "expected"), APART)
def test_unsafe_only_with_the_adversary(
    test: str, choice: str, policy: str, expected: tuple[str, ...]
) -> None:
    assert verdict_of(test, policy, ExploreOptions(), 300).verdict != VIOLATIONS
    options = ExploreOptions(evict=int(choice == "evict"), speculate=int(choice == "speculate"))
    found = verdict_of(test, policy, options)
    assert found.verdict == VIOLATIONS
    assert found.kinds[0] in expected


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["linux-7.3", "root-tlb-gen"])
@pytest.mark.parametrize(
    "test", ["return-zap", "speculative-fill", "evicted-walk", "guest-invlpg-away", "root-recycled"]
)
def test_what_is_sound_stays_sound(test: str, policy: str) -> None:
    assert verdict_of(test, policy, ExploreOptions(evict=1, speculate=1), 120).verdict != VIOLATIONS


@pytest.mark.parametrize("options", [ExploreOptions(evict=1), ExploreOptions(speculate=1)])
def test_proofs_come_to_their_ends(options: ExploreOptions) -> None:
    found = verdict_of("return-zap", "linux-7.3", options)
    assert (found.verdict, found.complete) == (SAFE, True)
    assert found.summary().endswith(options.describe())
    assert found.document()["adversary"] == {"evict": options.evict, "speculate": options.speculate}


def test_evictions_and_fills_change_what_can_happen() -> None:
    # The first access to each page misses twice: before KVM maps it, and again.
    def counts(options: ExploreOptions) -> set[str]:
        return {outcome.partition(" references")[0] for outcome in outcomes(options).outcomes}

    assert counts(ExploreOptions()) == {" missed 4 fetched 0"}
    assert counts(ExploreOptions(evict=1)) == {" missed 4 fetched 0", " missed 5 fetched 0"}
    # A mapped page may be fetched before it is used: 0x10 without an access after the fault on it.
    assert " missed 3 fetched 1" in counts(ExploreOptions(speculate=1))
    # Walks that find no cached tables are longer.
    assert len(outcomes(ExploreOptions(evict=1)).outcomes) > 2


@pytest.mark.parametrize("options", [ExploreOptions(evict=1), ExploreOptions(speculate=1)])
def test_the_reduction_loses_no_outcome(options: ExploreOptions) -> None:
    reduced, everything = outcomes(options), outcomes(options, reduce=False)
    assert set(reduced.outcomes) == set(everything.outcomes)
    assert reduced.executions < everything.executions


def test_candidates_are_the_pages_of_guests_on_pcpus_that_they_come_to() -> None:
    found = places(load_test("return-zap"))
    assert [(place.pcpu, place.page) for place in found] == [(0, 0x10), (0, 0x11), (1, 0x10), (1, 0x11)]
    assert [(place.pcpu, place.page) for place in places(parse_test(TINY, "tiny", None))] == [
        (0, 0x10),
        (0, 0x11),
    ]


@pytest.mark.slow
def test_a_recording_knows_its_choices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["explore", "speculative-fill", "--policy", "migration=none", "--adversary", "speculate"]
    assert main([*arguments, "--output", str(tmp_path)]) == 1
    (path,) = tmp_path.iterdir()
    assert load(path)["adversary"] == {"evict": 0, "speculate": 1}
    assert "fill0:0x10" in load(path)["schedule"]
    assert replay(path).document() == load(path)
    (case,) = load_cases(path)
    fill = case.analysis.moment(FILL)
    assert fill is not None
    assert fill.event.describe() == "speculative fill of page 0x10 for vCPU 0"
    capsys.readouterr()
    assert main(["explain", str(path)]) == 0
    assert "speculative fill of page 0x10" in capsys.readouterr().out
    path.write_text(path.read_text().replace('"speculate": 1', '"speculate": -1'))
    assert main(["explore", "--replay", str(path)]) == 2


@pytest.mark.slow
def test_what_was_evicted_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["explore", "evicted-walk", "--policy", "mutant:unlock-before-flush", "--adversary", "evict"]
    assert main([*arguments, "--output", str(tmp_path)]) == 1
    (path,) = tmp_path.iterdir()
    capsys.readouterr()
    main(["explain", str(path)])
    assert "evicts the translation of page 0x200" in capsys.readouterr().out
    assert any(step["text"] == "evicts the translation of page 0x200" for step in load(path)["steps"])


@pytest.mark.slow
def test_without_its_adversary_nothing_is_replayed(tmp_path: Path) -> None:
    plan = Plan(options=ExploreOptions(evict=1))
    found = explore_verdict(
        load_test("evicted-walk"), named_policy("mutant:unlock-before-flush"), plan
    ).counterexample
    assert found is not None
    path = tmp_path / "less.json"
    found.write(path)
    document = load(path)
    document["adversary"] = None
    path.write_text(json.dumps(document))
    with pytest.raises(BadInput, match="evict1:0x200"):
        replay(path)


def test_bad_names_are_refused() -> None:
    assert main(["explore", "return-zap", "--adversary", "flush"]) == 2
