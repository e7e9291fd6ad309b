"""Steps that are declared independent commute, and others conflict: seen in whole executions."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import NamedTuple

import pytest

from emulator.explore.audit.residue import ResidueProgram
from emulator.explore.engine.objects import Objects
from emulator.explore.engine.scheduler import Execution, Label, Task
from emulator.explore.machine.control import Walks
from emulator.explore.machine.lib import instrument
from emulator.explore.machine.program import LitmusProgram
from emulator.explore.results.record import record
from emulator.explore.strategies.dpor import Exhaustive
from emulator.explore.strategies.search import Found, Limits, search
from emulator.kvm.mmu import tdp_iter
from emulator.litmus.loader import load_test, parse_test
from emulator.litmus.policies import named_policy
from emulator.policy import Policy
from native import lib
from native.types import CpuId, Hfn


class Step(NamedTuple):
    label: Label
    reads: list[Hashable]
    writes: list[Hashable]


class Watched(Exhaustive):
    """All executions, and the steps of the first one."""

    def __init__(self, objects: Objects, bound: int | None) -> None:
        super().__init__(objects, bound=bound)
        self.steps: list[Step] = []

    def stepped(self, task: Task) -> None:
        super().stepped(task)
        assert task.label is not None
        of = self.objects.of
        self.steps.append(Step(task.label, of(task.reads), of(task.writes)))


def searched(
    test: str,
    policy: str,
    executions: int,
    program_of: type[LitmusProgram] = LitmusProgram,
    bound: int | None = None,
    every: bool = False,
) -> tuple[Found, list[Step]]:
    """No samples: the reduced search alone finds or proves."""
    named = named_policy(policy)
    with named.confined():
        program = program_of(load_test(test), named)
        try:
            with instrument(program.control):
                strategy = Watched(program.objects, bound)
                limits = Limits(executions=executions, first_only=not every)
                found = search(program, program.objects, strategy, limits, bool, lambda: False)
        finally:
            program.close()
        return found, strategy.steps


def steps_of(test: str, policy: str, kind: str) -> list[Step]:
    """Return the steps of this kind in the first execution."""
    return [step for step in searched(test, policy, 1)[1] if step.label[0] == kind]


@pytest.mark.slow
def test_a_walk_from_a_cached_pointer_races_the_freeing_of_the_table() -> None:
    """Nothing else orders them: the link is gone before, the flush comes after."""
    late = "zap_scope=leafs-and-tables,zap_yield=unlock-then-flush"
    found, _ = searched("zap-table-walk", late, 6000)
    assert found.outcome == "walk-after-free"


def roots(test: str, names: Iterable[Hashable]) -> set[Hashable]:
    """Return the root pages among the pages of these custodies."""
    tables = {name[1] for name in names if isinstance(name, tuple) and name[0] == "custody of table"}
    return tables & set(range(1, load_test(test).machine.root_frames + 1))


NEW_ROOT = """
doc = "A vCPU goes on with a new root while the old one is freed."
source = "kvm_mmu_zap_all_fast()"
init = ["v0: migrate 1", "v0: read 0x10", "v0: migrate 0", "v0: read 0x10"]
[threads.v0]
vcpu = 0
ops = ["migrate 1", "read 0x11", "block k 1", "migrate 0", "read 0x10"]
[threads.k]
ops = ["zap-all", "rcu"]
[expect]
needs = "tables-freed"
"""


def test_walks_race_the_freeing_of_their_root_alone(tmp_path: Path) -> None:
    test = written(tmp_path, NEW_ROOT)
    _, steps = searched(test, "linux-7.3", 1)
    walked = roots(test, (name for step in steps if step.label[0] == "read" for name in step.reads))
    freed = roots(test, (name for step in steps if step.label[0] == "grace period" for name in step.writes))
    assert walked
    assert freed
    assert walked.isdisjoint(freed)  # vCPUs are on the new root by then


def test_a_root_that_was_loaded_before_may_be_any() -> None:
    test = "return-zap"
    _, steps = searched(test, "linux-7.3", 1)
    first = next(s for s in steps if s.label[0] in ("read", "write") and roots(test, s.reads))
    assert len(roots(test, first.reads)) == load_test(test).machine.root_frames


class Judging(Watched):
    """The steps of the first execution, and those of guests in which a use was judged or the EPT refused."""

    def __init__(self, program: LitmusProgram) -> None:
        super().__init__(program.objects, None)
        self.program = program
        self.refused: dict[bool, list[Step]] = {True: [], False: []}  # by whether a use was judged
        self.walks = Walks(0, 0, 0, 0)

    def stepped(self, task: Task) -> None:
        super().stepped(task)
        control = self.program.control
        before, self.walks = self.walks, control.walks(CpuId(0))
        if task.label[0] == "read" and control.exit_reason == lib.EXIT_EPT_VIOLATION:
            self.refused[self.walks.judged_since(before)].append(self.steps[-1])


def test_a_refused_access_depends_on_custody_only_if_a_use_was_judged() -> None:
    """The ghost of a flushed translation is judged by its first walk, so that its count of averted violations
    depends on the host; the walks behind it depend on SPTEs alone."""
    program = LitmusProgram(load_test("away-zap"), Policy())
    try:
        with instrument(program.control):
            strategy = Judging(program)
            search(program, program.objects, strategy, Limits(executions=1), lambda _: False)
    finally:
        program.close()
    assert len(strategy.refused[True]) == 1
    assert len(strategy.refused[False]) == 1
    for judged, steps in strategy.refused.items():
        for step in steps:
            assert ("ept",) in step.reads
            assert (("custody",) in step.reads) == judged
            assert (("memory", 0) in step.reads) == judged


def test_a_grace_period_waits_for_those_who_were_inside() -> None:
    ends = [s for s in steps_of("log-huge", "linux-7.3", "grace period") if s.label[1] == "ends"]
    assert ends
    for step in ends:
        assert ("rcu",) not in step.writes
        assert any(name[0] == "callbacks done" for name in step.writes if isinstance(name, tuple))


def test_an_interrupt_commutes_with_promises() -> None:
    interrupts = steps_of("return-zap", "linux-7.3", "interrupt")
    assert interrupts
    assert all(("custody",) not in step.reads for step in interrupts)


@pytest.mark.slow
def test_a_test_with_grace_periods_is_proved_in_few_executions() -> None:
    found, _ = searched("log-huge", "linux-7.3", 400)
    assert found.complete
    assert found.schedule is None


ROOTS = """
doc = "A root page comes back as a root on a pCPU that has entries of its life before."
source = "kvm_mmu_load()"
init = ["w0: read 0x10", "v0: read 0x10", "k: zap-all", "v0: read 0x11", "ka: zap-all", "w0: read 0x10"]
[machine]
root_frames = 3
[[vm]]
pages = 2048
[[vm]]
pages = 2048
[threads.v0]
vcpu = 0
ops = ["read 0x11"]
[threads.w0]
vcpu = 0
vm = 1
pcpu = 1
ops = []
[threads.k]
ops = ["zap-all"]
[threads.ka]
vm = 1
ops = []
[expect]
"root_load=none" = ["foreign-root"]
"""


def written(directory: Path, text: str) -> str:
    path = directory / "test.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.slow
def test_the_last_root_page_is_freed_like_others(tmp_path: Path) -> None:
    """All three are in use: which one the vCPU gets depends on whether the grace period is over."""
    found, _ = searched(written(tmp_path, ROOTS), "root_load=none", 3000, bound=1)
    assert found.outcome == "foreign-root"


GRANTED_AGAIN = """
doc = "A stale read is no violation any more when somebody else has mapped the page again."
source = "kvm_zap_gfn_range()"
init = ["v1: read 0x11", "v0: read 0x10"]
[[vm]]
vcpus = 2
[threads.v1]
vcpu = 1
pcpu = 1
ops = ["wait k 1", "read 0x10"]
[threads.v0]
vcpu = 0
ops = ["read 0x10"]
[threads.k]
ops = ["zap 0x10"]
[expect]
"mutant:zap-leaves-flush-to-next" = ["stale-after-revoke"]
"""


def test_a_stale_use_races_whoever_grants_the_right_again(tmp_path: Path) -> None:
    """The use hits the TLB.  v1 comes first in the first execution."""
    found, _ = searched(written(tmp_path, GRANTED_AGAIN), "mutant:zap-leaves-flush-to-next", 100)
    assert found.outcome == "stale-after-revoke"


CONTENDED = """
doc = "An unmap that yields, because somebody waits for mmu_lock, and does not flush."
source = "tdp_mmu_iter_need_resched()"
init = ["v0: write 0x10", "k: host-touch 0x300"]
[[vm]]
chunk = 1
[threads.v0]
vcpu = 0
ops = ["wait mm 1", "write 0x10"]
[threads.k]
ops = ["host-touch 0x300", "zap 0x300"]
[threads.mm]
ops = ["host-unmap 0x10 2"]
[expect]
"zap_yield=no-flush" = ["use-after-free"]
"""


@pytest.mark.slow
def test_who_finds_mmu_lock_taken_races_its_holder(tmp_path: Path) -> None:
    """A thread that comes while the lock is held makes the holder yield, one that comes later does not."""
    found, _ = searched(written(tmp_path, CONTENDED), "zap_yield=no-flush", 2000)
    assert found.outcome == "use-after-free"


AGED = """
doc = "A walk sets the accessed flag that the host clears."
source = "kvm_age_gfn()"
init = ["v1: read 0x10", "v0: read 0x11", "k: host-age 0x10"]
[[vm]]
vcpus = 2
[threads.k]
ops = ["host-age 0x10"]
[threads.v0]
vcpu = 0
ops = ["read 0x10"]
[threads.v1]
vcpu = 1
pcpu = 1
ops = []
[expect]
"""


def test_the_flags_that_walks_set_race_whoever_clears_them(tmp_path: Path) -> None:
    found, _ = searched(written(tmp_path, AGED), "linux-7.3", 100, ResidueProgram, every=True)
    assert found.complete
    sptes = (int(spte, 16) for one in found.outcomes for spte in re.findall(r" 0x10 (\w+)", one))
    assert {bool(spte & lib.SPTE_ACCESSED) for spte in sptes} == {False, True}


class LateLook(LitmusProgram):
    """`k` frees a table by RCU; `r` has a link to it from an earlier read section and looks in a later one,
    which the grace period does not wait for."""

    def start(self, execution: Execution) -> None:
        super().start(execution)
        m, control = self.machine.m, self.control
        seen = control.bit("inside")
        k, r = (self.harness.threads[name].home.id for name in ("k", "r"))
        vm, controlled = self.harness.kvms[0].id, tdp_iter.__dict__["lib"]
        table = lib.ept_table_alloc(m, k, lib.FRAME_TABLE)
        link = lib.make_nonleaf_spte(m, Hfn(table))
        inside: list[bool] = []

        def frees() -> None:
            controlled.rcu_read_lock(m, k)
            controlled.ept_table_free_rcu(m, k, table)
            execution.step(("inside", None, "read"), seen, 0, lambda: bool(inside), "r")
            controlled.rcu_read_unlock(m, k)

        def looks() -> None:
            controlled.rcu_read_lock(m, r)
            execution.step(("inside", None, "write"), 0, seen)
            inside.append(True)
            controlled.tdp_table_holds(m, r, vm, link, 2, 0)
            control.judge()
            execution.step(("nothing", None, "read"), 0, 0)
            controlled.rcu_read_unlock(m, r)

        for task in execution.tasks:
            task.body = {"k": frees, "r": looks}.get(task.name, task.body)


def test_kvms_own_look_at_a_table_races_its_freeing(tmp_path: Path) -> None:
    test = 'doc = "d"\nsource = "s"\nfinal = ["k: linger"]\n[[vm]]\n[threads.k]\n[threads.r]\n[expect]\n'
    found, _ = searched(written(tmp_path, test), "linux-7.3", 100, LateLook)
    assert found.outcome == "walk-after-free"


def test_copies_conflict_with_stores_to_the_same_page() -> None:
    """The pages copied before or after a store decide at the end; only pages that are copied matter to it."""
    text = """doc = "d"
source = "s"
init = ["v0: write 0x10", "k: log-arm", "v0: write 0x10"]
[threads.v0]
vcpu = 0
ops = ["write 0x10", "write 0x11"]
[threads.k]
ops = ["wait v0 2", "log-get", "log-disarm", "log-arm"]
"""
    program = LitmusProgram(parse_test(text, "t", None), Policy())
    try:
        with instrument(program.control):
            steps = record(program, ()).steps
    finally:
        program.close()
    stores = {step["text"]: set(step["writes"]) for step in steps if step["kind"] == "write"}
    assert {"contents 0", "contents 0 16"} <= stores["write 0 16"]
    assert {"contents 0", "contents 0 17"} <= stores["write 0 17"]
    copies = [step for step in steps if step["kind"] == "copy"]
    assert [(step["object"], step["reads"]) for step in copies] == [
        ("16 17", ["contents 0 16", "contents 0 17"]),
        ("all pages", ["contents 0"]),
    ]
    assert [step["reads"] for step in steps if step["kind"] == "compare"] == [["contents 0"]]


@pytest.mark.parametrize(
    ("test", "policy"),
    [
        ("log-order", "mutant:log-protects-before-marks"),
        ("log-races-write", "mutant:log-without-protect"),
        ("log-races-write", "mutant:mark-before-writable"),
    ],
)
def test_lost_marks_are_found_by_the_reduced_search(test: str, policy: str) -> None:
    outcome = searched(test, policy, 200, bound=2)[0].outcome
    # The audit at the end of an execution sees the SPTE that may be written to unmarked.
    assert outcome == "lost-dirty" or "is not marked in the dirty log" in outcome
