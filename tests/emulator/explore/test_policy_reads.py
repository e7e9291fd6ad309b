"""A policy's reads of KVM and the machine race the writes."""

from __future__ import annotations

from ast import literal_eval
from functools import partial
from math import comb
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from emulator.explore.audit.run import run_audit
from emulator.explore.machine.lib import instrument
from emulator.explore.machine.options import ExploreOptions
from emulator.explore.machine.policy_reads import NOTHING, Grown, Known, Seen
from emulator.explore.machine.program import LitmusProgram
from emulator.explore.results import rounds
from emulator.explore.results import workers as team
from emulator.explore.results.record import record
from emulator.explore.results.replay import load, replay
from emulator.explore.results.verdict import Plan
from emulator.explore.strategies.sampling import Pct, RandomWalk
from emulator.explore.strategies.search import Found
from emulator.explore.strategies.tree import wide_search
from emulator.litmus.loader import load_test, load_tests, parse_test
from emulator.litmus.model import SAFE
from emulator.litmus.policies import named_policy
from emulator.litmus.verdict import VIOLATIONS
from tests.emulator.explore.asked_programs import exhaustive, looking, moving, outcomes
from tests.emulator.explore.returns import LOADED, LOOKS, RETURNS, explored, written


def last_logged(found: Found, n: int) -> set[tuple[Any, ...]]:
    """Return the policy's reads in the execution, without those before threads ran."""
    return {tuple(literal_eval(outcome.strip())[-n:]) for outcome in found.outcomes}


# --- the search ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "plan",
    [
        Plan(),
        Plan(bound=2),
        Plan(bound=3),
        Plan("pct", depth=2),
        Plan(options=ExploreOptions(store_buffers=True)),
    ],
    ids=["all", "2 preemptions", "3 preemptions", "pct", "store buffers"],
)
def test_an_answer_that_depends_on_another_pcpu_is_refuted(tmp_path: Path, plan: Plan) -> None:
    found = explored(tmp_path, LOOKS.format(condition=LOADED, answer="none"), plan)
    assert found.verdict == VIOLATIONS
    assert "use-after-free" in found.kinds


@pytest.mark.slow
def test_one_that_flushes_either_way_is_proved(tmp_path: Path) -> None:
    found = explored(tmp_path, LOOKS.format(condition=LOADED, answer="all-contexts"))
    assert found.verdict == SAFE
    assert found.complete
    assert found.executions > 10  # not the few that there are if nothing is read


@pytest.mark.slow
@pytest.mark.parametrize("reads", [0, 1, 2, 3, 4])
def test_each_read_and_each_write_has_its_place(tmp_path: Path, reads: int) -> None:
    """A vCPU's load and its put write the attribute once each; nothing else races.  The reads of one method
    stand in any order with the two writes."""
    lines = ["other = cpu.machine.cpus[2]", *["self.log.append(other.vcpu is None)"] * reads]
    found, _ = outcomes(tmp_path, moving('"read 0x20"'), looking(*lines), exhaustive)
    assert found.complete
    assert found.executions == comb(reads + 2, 2)
    if reads == 2:
        # Before the load or after the put, in between, or one of them there.
        assert last_logged(found, 2) == {(one, other) for one in (True, False) for other in (True, False)}


@pytest.mark.slow
def test_an_attribute_that_nothing_changes_is_no_step(tmp_path: Path) -> None:
    lines = ["self.log.append((cpu.id, vcpu.id, vcpu.kvm.gfns, len(cpu.machine.cpus)))"] * 3
    found, known = outcomes(tmp_path, moving('"read 0x20"'), looking(*lines), exhaustive)
    assert found.executions == 1
    assert not known.shared


def test_two_writes_of_one_step_are_seen_half_done(tmp_path: Path) -> None:
    """vcpu_put() has no ordering point between the two stores."""
    look = (
        "other = cpu.machine.cpus[2]",
        "vcpu = self.kept or other.vcpu",
        "self.kept = vcpu",
        "self.log.append((vcpu is not None and vcpu.loaded, other.vcpu is not None))",
    )
    found, known = outcomes(tmp_path, moving('"read 0x20"'), looking(*look), exhaustive)
    assert {"Cpu.vcpu", "Vcpu.loaded"} <= known.shared
    assert {((True, False),), ((False, True),)} & last_logged(found, 1)


# An update of the memslots has a bit of its own until it is complete (kvm_swap_active_memslots).
_ORDER = (2, 1 << 63 | 2, 4)
GENERATIONS = {(first, second) for i, first in enumerate(_ORDER) for second in _ORDER[i:]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mm", "look", "logs"),
    [
        ('"host-unmap 0x10"', "vcpu.kvm.mn_active_invalidate_count", {(0, 0), (0, 1), (1, 0), (1, 1)}),
        ('"log-arm"', "vcpu.kvm.memslots[0].generation", GENERATIONS),
        ('"log-arm"', "self._kept(vcpu.kvm, 'memslots')[0].generation", GENERATIONS),
        ('"zap-all"', "self._kept(vcpu.kvm, 'tdp_mmu_roots')[0].role.invalid", {(0, 0), (0, 1), (1, 1)}),
    ],
    ids=["attribute", "list", "list kept", "attribute of what was kept"],
)
@pytest.mark.parametrize(
    "then", ["pass", "lib.vcpu_mode(cpu.m, vcpu.id)"], ids=["", "in a step in the middle"]
)
def test_two_questions_see_all_there_is(
    tmp_path: Path, mm: str, look: str, logs: set[tuple[int, ...]], then: str
) -> None:
    """The vCPU moves twice while another thread changes the value that the policy reads, once or twice."""
    policy = looking(
        "if vcpu.kvm.id == 0 and vcpu.kvm.tdp_mmu_roots:",
        f"    self.log.append(int({look}))",
        f"    {then}",
        imports="from native import lib",
        helpers="""
    def _kept(self, obj, attr):
        if self.kept is None:
            self.kept = getattr(obj, attr)
        return self.kept
""",
    )
    found, _ = outcomes(tmp_path, moving("", mm, '"migrate 1", "migrate 0"'), policy, exhaustive)
    assert found.complete
    assert last_logged(found, 2) == logs


@pytest.mark.slow
def test_what_is_read_before_it_changes_is_found_then(tmp_path: Path) -> None:
    """The first execution has the method's read at its beginning and all changes after it."""
    test = moving('"read 0x20"', "", "")
    test = test.replace("[threads]", '[threads]\nmm.ops = ["host-unmap 0x10"]').replace("mm.ops = []", "")
    policy = looking(
        "self.log.append(cpu.machine.cpus[2].vcpu is None)", point="notifier_flush", given="kvm, gfn"
    )
    found, known = outcomes(tmp_path, test, policy, exhaustive)
    assert known.shared == {"Cpu.vcpu"}
    assert last_logged(found, 1) == {(True,), (False,)}


@pytest.mark.slow
def test_what_a_constructor_fills_does_not_change(tmp_path: Path) -> None:
    policy = looking("self.log.append([root.tdp_mmu_page for root in vcpu.kvm.tdp_mmu_roots])")
    test = moving("", '"zap-all"', '"wait mm 1", "read 0x10", "migrate 1"')
    found, known = outcomes(tmp_path, test, policy, exhaustive, most=20)
    assert found.executions == 20
    assert known.shared == {"Kvm.tdp_mmu_roots"}


def test_parts_come_together(tmp_path: Path) -> None:
    """One part of a search has seen that the policy reads an attribute, and another one that it changes."""
    policy = named_policy(written(tmp_path, "mine.py", LOOKS.format(condition=LOADED, answer="none")))
    program = LitmusProgram(load_test("return-zap"), policy)
    assert program.reads is not None
    parts = team.Team(program, 1, lambda: False)
    outcome = team._NOT_BEGUN
    name = ("Cpu.vcpu", 2)
    assert parts._take((outcome, Seen(read={name}), ())) is outcome
    assert parts._take((outcome, Seen(changed={("Cpu.vcpu", 1)}), ())) is outcome
    with pytest.raises(Grown):
        parts._take((outcome, Seen(changed={name}), ()))
    assert program.reads.next() == Known(shared=frozenset({"Cpu.vcpu"}))
    program.close()


def test_a_call_that_belongs_to_a_step_of_kvms_is_one_of_a_policys(tmp_path: Path) -> None:
    """Between two looks at the host's page table a page goes away."""
    look = "self.log.append(lib.mm_present(cpu.m, 0, 0x10, 0x11))"
    policy = looking(look, look, imports="from native import lib")
    found, _ = outcomes(tmp_path, moving("", '"host-unmap 0x10"'), policy, exhaustive)
    assert last_logged(found, 2) == {(1, 1), (1, 0), (0, 0)}


@pytest.mark.slow
def test_what_kvm_reads_races_what_a_policy_writes(tmp_path: Path) -> None:
    """A slot that logs gets its bitmap by a write of the policy."""
    test = moving("", '"log-arm"')
    without, _ = outcomes(tmp_path, test, looking("self.kept = 0"), exhaustive)
    found, known = outcomes(tmp_path, test, looking("vcpu.kvm.dirty_log_manual = 0"), exhaustive)
    assert known.written == {"Kvm.dirty_log_manual"}
    assert found.executions > without.executions


@pytest.mark.parametrize("order", [("_read", "_changed"), ("_changed", "_read")], ids=" then ".join)
def test_a_read_and_a_change_are_found_in_either_order(tmp_path: Path, order: tuple[str, str]) -> None:
    policy = named_policy(written(tmp_path, "mine.py", LOOKS.format(condition=LOADED, answer="none")))
    program = LitmusProgram(load_test("return-zap"), policy)
    assert program.reads is not None
    name = ("Cpu.vcpu", 2)
    for method in order:
        assert not program.reads.grown
        getattr(program.reads, method)(name)
    assert program.reads.grown
    program.close()


@pytest.mark.slow
def test_memory_that_is_kept_is_read_in_each_step_of_a_method(tmp_path: Path) -> None:
    """No one can see which of a method's steps looks into it."""
    look = (
        "if vcpu.kvm.id == 0 and vcpu.kvm.tdp_mmu_roots:",
        "    self.kept = self.kept or cpu.kick_mask",
        "    lib.vcpu_mode(cpu.m, vcpu.id)",
    )
    test, policy = (
        moving("", '"flush-remote"', '"migrate 1", "migrate 0"'),
        written(tmp_path, "mine.py", looking(*look, imports="from native import lib")),
    )
    _, known = outcomes(tmp_path, test, Path(policy).read_text(), exhaustive)
    program = LitmusProgram(parse_test(test, "moving", None), named_policy(policy), known=known, frozen=True)
    with instrument(program.control):
        steps = record(program, ()).steps
    program.close()
    last = [step for step in steps if step["thread"] == "v0" and step["kind"] in ("policy", "mode")]
    asked = max(n for n, step in enumerate(last) if step["kind"] == "policy")
    for step in last[asked : asked + 2]:
        assert any(one.startswith("Cpu.kick_mask[]") for one in step["reads"])


@pytest.mark.slow
def test_methods_of_two_tasks_take_turns(tmp_path: Path) -> None:
    """Each call of the core divides a method; the other one sees its memory in between."""
    look = ("self.log.append(vcpu.id)", "lib.vcpu_mode(cpu.m, vcpu.id)")
    policy = looking(*look, *look, look[0], imports="from native import lib")
    found, _ = outcomes(tmp_path, moving('"migrate 3"'), policy, exhaustive)
    assert found.complete
    assert len(last_logged(found, 6)) == comb(6, 3)


READS = [
    "cpu.machine.cpus[2].vcpu is None",
    "cpu.machine.cpus[2].mmu_lock_held",
    "cpu.machine.cpus[2].rcu_depth",
    "vcpu.loaded",
    "vcpu.loaded_vmcs.cpu",
    "vcpu.kvm.slots_lock.owner",
    "vcpu.kvm.mn_active_invalidate_count",
    "vcpu.kvm.memslots[0].generation",
    "[slots.generation for slots in vcpu.kvm.memslots]",
    "len(vcpu.kvm.tdp_mmu_roots)",
    "[root.tdp_mmu_root_count.value for root in vcpu.kvm.tdp_mmu_roots]",
    "[root.role.invalid for root in vcpu.kvm.tdp_mmu_roots]",
    "[one.kick_mask[0] for one in cpu.machine.cpus]",
    "[root is None for root in vcpu.mmu.prev_roots]",
    "[one.vcpu is None for one in cpu.machine.cpus]",
    "[len(slots.slots) for slots in reversed(vcpu.kvm.memslots)]",
    "max(slots.generation for slots in vcpu.kvm.memslots)",
    "lib.vcpu_mode(cpu.m, vcpu.id)",
    "lib.kvm_requests(cpu.m, vcpu.id)",
    "lib.mm_present(cpu.m, 0, 0x10, 0x11)",
    "[len(active_roots(one)) for one in vcpu.kvm.vcpus]",
    "type(vcpu).loaded.__get__(vcpu)",
    "object.__getattribute__(cpu.machine.cpus[2], 'vcpu') is None",
    "attrgetter('vcpu')(cpu.machine.cpus[2]) is None",
    "copy(cpu.machine.cpus[2]).vcpu is None",
]
IMPORTS = """from copy import copy
from operator import attrgetter
from emulator.kvm.mmu.roots import active_roots
from native import lib"""
OTHERS = [
    ("", one) for one in ('"host-unmap 0x10"', '"zap-all"', '"log-arm"', '"flush-remote"', '"slot-delete"')
]


@pytest.mark.stress
@pytest.mark.timeout(300)  # machines are busy
@settings(
    max_examples=6,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.reuse, Phase.generate),  # each example is many executions
)
@given(
    reads=st.lists(st.sampled_from(READS), min_size=1, max_size=2),
    other=st.sampled_from([('"read 0x20"', ""), *OTHERS]),
    kept=st.booleans(),
)
def test_all_that_random_walks_read_is_in_a_search(
    tmp_path_factory: Any, reads: list[str], other: tuple[str, str], kept: bool
) -> None:
    """Walks come to nothing that a complete search has not seen: not with their steps as they were before
    the policy's reads were known, and not with those of the search."""
    directory = tmp_path_factory.mktemp("reads")
    look = [f"self.log.append({read})" for read in reads]
    if kept:
        # A container that it got the first time, before the threads ran.
        first, last = "self.kept = self.kept or vcpu.kvm.memslots", "self.log.append(self.kept[0].generation)"
        look = [first, *look, last]
    test, policy = moving(*other), looking(*look, imports=IMPORTS)
    found, known = outcomes(directory, test, policy, exhaustive, most=150)
    if not found.complete:
        return
    for strategy in (lambda _: RandomWalk(25, 1), lambda _: Pct(25, 1, 3)):
        for knows in (known, NOTHING):
            walks, _ = outcomes(directory, test, policy, strategy, knows, frozen=True)
            assert set(walks.outcomes) <= set(found.outcomes)


# --- in parts, and again ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("answer", "kinds"), [("all-contexts", False), ("none", True)])
def test_processes_agree_on_what_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, kinds: bool
) -> None:
    """The attribute is found in a part of the search, wherever that is done."""
    monkeypatch.setattr(team, "FIRST_PARTS", 0)
    monkeypatch.setattr(rounds, "wide_search", partial(wide_search, plain=1, part=3))
    # No probes: with so few executions the search begins with bounds.
    plan = Plan(executions=2000, bound=1)
    policy = LOOKS.format(condition=LOADED, answer=answer)
    alone, together = (explored(tmp_path, policy, plan, jobs) for jobs in (1, 2))
    assert bool(alone.kinds) is kinds
    assert alone.document() == together.document()
    assert alone.executions > 10


@pytest.mark.slow
def test_a_counterexample_has_the_reads_and_replays(tmp_path: Path) -> None:
    found = explored(tmp_path, LOOKS.format(condition=LOADED, answer="none")).counterexample
    assert found is not None
    steps = [(step["thread"], step["text"], step["mode"]) for step in found.steps]
    assert ("v0", "Cpu.vcpu 2", "read") in steps
    assert ("w", "Cpu.vcpu 2", "write") in steps
    file = tmp_path / "found.json"
    found.write(file)
    assert load(file)["watched"]["shared"] == ["Cpu.vcpu"]
    assert replay(file).document() == found.document()


@pytest.mark.slow
@pytest.mark.parametrize(
    "look",
    [
        (LOADED,),
        ("vcpu.kvm.memslots[0].generation and vcpu.loaded", "vcpu.mmu.prev_roots[0]"),
        (
            "[root.tdp_mmu_root_count.value for root in vcpu.kvm.tdp_mmu_roots]",
            "vcpu.kvm.memslots[0].generation",
        ),
        ("[one.kick_mask[0] for one in cpu.machine.cpus]", "vcpu.loaded_vmcs.cpu"),
    ],
    ids=["pcpu", "containers", "counts", "memory"],
)
def test_the_audit_has_nothing_to_say(tmp_path: Path, look: tuple[str, ...]) -> None:
    """Each access happens before or after a conflicting one, and other steps commute."""
    policy = written(tmp_path, "looks.py", looking(*(f"self.kept = {one}" for one in look)))
    found = run_audit(load_test("return-zap"), named_policy(policy), 10)
    assert found.swaps
    assert found.clean, found.document()


@pytest.mark.slow
def test_a_read_is_a_step_for_the_audit_as_well(tmp_path: Path) -> None:
    """The audit's own descriptor stands between the policy and the attribute, which another task writes."""
    (test,) = load_tests([written(tmp_path, "returns.toml", RETURNS)])
    policy = written(tmp_path, "looks.py", LOOKS.format(condition=LOADED, answer="all-contexts"))
    found = run_audit(test, named_policy(policy), 3)
    assert found.swaps
    assert found.clean, found.document()


# --- writes of a policy -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_a_policy_writes_races_what_reads_it(tmp_path: Path) -> None:
    """One method writes an attribute and another one, of another task, reads it: either may be first."""
    policy = looking("vcpu.arch.smi_pending = vcpu.arch.smi_pending or False", "self.log.append(0)")
    found, known = outcomes(tmp_path, moving('"read 0x20"'), policy, exhaustive)
    assert found.complete
    assert "VcpuArch.smi_pending" in known.written
    other = looking(
        "for one in (0, 1):",
        "    cpu.machine.cpus[2].vcpu = cpu.machine.cpus[2].vcpu",
        "self.log.append(cpu.machine.cpus[2].vcpu is None)",
    )
    found, known = outcomes(tmp_path, moving('"read 0x20"'), other, exhaustive)
    assert known.written == {"Cpu.vcpu"}
    # A value read before the load may be written after it.
    assert {(True,), (False,)} == last_logged(found, 1)
    assert found.executions == comb(3 + 2 + 2, 2)


def test_a_container_that_a_policy_changes(tmp_path: Path) -> None:
    policy = looking("vcpu.kvm.at_host_work[:] = [9]", "self.log.append(tuple(vcpu.kvm.at_host_work))")
    found, known = outcomes(tmp_path, moving('"read 0x20"'), policy, exhaustive)
    assert known.written == {"Kvm.at_host_work[]"}
    assert last_logged(found, 1) == {((9,),)}
