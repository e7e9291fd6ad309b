"""Orders that x86 keeps although stores are late: releases, grace periods, handlers' answers, own loads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from emulator.explain.processor import VISIBLE
from emulator.explore.engine.scheduler import Execution, Task
from emulator.explore.machine import store_buffer_lib as buffered
from emulator.explore.machine.control import Readers
from emulator.explore.machine.lib import instrument
from emulator.explore.machine.options import ExploreOptions
from emulator.explore.machine.program import LitmusProgram
from emulator.explore.machine.store_buffers import BufferedControl, Store
from emulator.explore.strategies.dpor import Exhaustive
from emulator.explore.strategies.sampling import RandomWalk
from emulator.explore.strategies.search import Limits, search
from emulator.kvm.virt import requests
from emulator.litmus.loader import load_test, parse_test
from emulator.litmus.policies import named_policy
from emulator.litmus.thread import LitmusThread
from emulator.machine.locks import SpinLock
from emulator.machine.runtime import Cpu, smp_mb
from native import ffi, lib
from tests.support import CPU0

TEXT = """
doc = "A vCPU, and two threads that do what a test tells them."
source = "here"
final = ["a: linger"]  # a test without any operation is refused
[threads.v0]
vcpu = 0
ops = []
[threads.a]
ops = []
[threads.b]
ops = []
[expect]
needs = "nothing"
"""
IN, OUTSIDE = lib.IN_GUEST_MODE, lib.OUTSIDE_GUEST_MODE
FREE = 40  # a request that KVM does not have


class Script:
    """The bodies of threads a and b; `saw` is the outcome."""

    def __init__(self) -> None:
        self.lock = SpinLock("a lock")
        self.order: list[str] = []
        self.saw: list[int] = []

    def a(self, k: Any, cpu: Cpu, vm: int) -> None:
        raise NotImplementedError

    def b(self, k: Any, cpu: Cpu, vm: int) -> None:
        raise NotImplementedError


scripts: list[Script] = []


def outcomes(script: type[Script], monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Return the script's notes, in every interleaving."""
    current = scripts

    class Scripted(LitmusProgram):
        def start(self, execution: Execution) -> None:
            current[:] = [script()]
            super().start(execution)

        def finish(self, execution: Execution) -> str:
            return f"{super().finish(execution)} {current[0].order} {current[0].saw}"

    def run(thread: LitmusThread) -> None:
        if thread.name in ("a", "b"):
            getattr(current[0], thread.name)(vars(requests)["lib"], thread.cpu, thread.kvm.id)

    monkeypatch.setattr(LitmusThread, "run", run)
    program = Scripted(
        parse_test(TEXT, "script", None), named_policy("linux-7.3"), ExploreOptions(store_buffers=True)
    )
    try:
        with instrument(program.control):
            found = search(program, program.objects, Exhaustive(program.objects), Limits(), lambda _: False)
    finally:
        program.close()
    assert found.complete
    return set(found.outcomes)


class Unlocks(Script):
    def a(self, k: Any, cpu: Cpu, vm: int) -> None:
        k.mmu_write_trylock(cpu.m, cpu.id, vm)
        self.order.append("a")
        k.mmu_invalidate_begin(cpu.m, vm)
        k.mmu_invalidate_end(cpu.m, vm)
        k.mmu_write_unlock(cpu.m, cpu.id, vm)

    def b(self, k: Any, cpu: Cpu, vm: int) -> None:
        k.mmu_read_trylock(cpu.m, cpu.id, vm)
        self.order.append("b")
        self.saw.append(k.mmu_invalidate_seq(cpu.m, vm))
        k.mmu_read_unlock(cpu.m, cpu.id, vm)


def test_mmu_lock_is_released_behind_what_it_protects(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = outcomes(Unlocks, monkeypatch)
    first = {outcome for outcome in seen if "['a', 'b']" in outcome}
    assert len(first) == 1
    assert len(seen) == 2


class SpinUnlocks(Script):
    def a(self, k: Any, cpu: Cpu, vm: int) -> None:
        with self.lock.held(cpu):
            self.order.append("a")
            k.vcpu_set_mode(cpu.m, 0, IN)

    def b(self, k: Any, cpu: Cpu, vm: int) -> None:
        with self.lock.held(cpu):
            self.order.append("b")
            self.saw.append(k.vcpu_mode(cpu.m, 0))


class SrcuReaders(Script):
    def a(self, k: Any, cpu: Cpu, vm: int) -> None:
        index = k.srcu_read_lock(cpu.m, cpu.id, vm)
        k.vcpu_set_mode(cpu.m, 0, IN)
        k.srcu_read_unlock(cpu.m, cpu.id, vm, index)

    def b(self, k: Any, cpu: Cpu, vm: int) -> None:
        k.synchronize_srcu(cpu.m, cpu.id, vm)
        self.saw.append(k.vcpu_mode(cpu.m, 0))


class RcuReaders(Script):
    """The store comes when the grace period may have begun already."""

    def a(self, k: Any, cpu: Cpu, vm: int) -> None:
        k.rcu_read_lock(cpu.m, cpu.id)
        k.kvm_test_request(cpu.m, 0, FREE)
        k.vcpu_set_mode(cpu.m, 0, IN)
        k.rcu_read_unlock(cpu.m, cpu.id)

    def b(self, k: Any, cpu: Cpu, vm: int) -> None:
        k.kvm_make_request(cpu.m, 0, FREE)
        k.synchronize_rcu(cpu.m, cpu.id)
        self.saw.append(k.vcpu_mode(cpu.m, 0))


class Locked(Script):
    """A locked instruction behind the store."""

    def a(self, k: Any, cpu: Cpu, vm: int) -> None:
        k.vcpu_set_mode(cpu.m, 0, IN)
        k.kvm_make_request(cpu.m, 0, FREE)

    def b(self, k: Any, cpu: Cpu, vm: int) -> None:
        self.order.append("a" if k.kvm_test_request(cpu.m, 0, FREE) else "b")
        self.saw.append(k.vcpu_mode(cpu.m, 0))


class Plain(Locked):
    """... and one that is none, but stores stay in order."""

    def a(self, k: Any, cpu: Cpu, vm: int) -> None:
        k.vcpu_set_mode(cpu.m, 0, IN)
        cpu.point("plain store", 0, "write")
        k.kvm_make_request(cpu.m, 0, FREE)


@pytest.mark.parametrize("script", [SpinUnlocks, Locked, Plain])
def test_who_sees_the_later_sees_the_earlier(script: type[Script], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = outcomes(script, monkeypatch)
    after = [outcome for outcome in seen if "['a'" in outcome]
    assert after
    assert all(outcome.endswith(f"[{IN}]") for outcome in after)
    assert any(outcome.endswith(f"[{OUTSIDE}]") for outcome in seen)


@pytest.mark.parametrize("script", [SrcuReaders, RcuReaders])
def test_a_grace_period_contains_barriers(script: type[Script], monkeypatch: pytest.MonkeyPatch) -> None:
    now = Readers.now

    def noted(readers: Readers) -> tuple[tuple[int, int], ...]:
        found = now(readers)
        # b's synchronize_*() has begun: is a inside?
        scripts[0].order.append("inside" if found else "outside")
        return found

    monkeypatch.setattr(Readers, "now", noted)
    seen = outcomes(script, monkeypatch)
    inside = [outcome for outcome in seen if "['inside']" in outcome]
    assert inside
    assert all(outcome.endswith(f"[{IN}]") for outcome in inside)
    assert any(outcome.endswith(f"[{OUTSIDE}]") for outcome in seen)


class Dekker(Script):
    """Each stores, then loads the other's variable; the subject of the test is between the two steps of a."""

    def between(self, k: Any, cpu: Cpu) -> None:
        pass

    def a(self, k: Any, cpu: Cpu, vm: int) -> None:
        k.vcpu_set_mode(cpu.m, 0, IN)
        self.between(k, cpu)
        self.saw.append(k.kvm_test_request(cpu.m, 0, FREE))

    def b(self, k: Any, cpu: Cpu, vm: int) -> None:
        k.kvm_make_request(cpu.m, 0, FREE)
        self.order.append("sees" if k.vcpu_mode(cpu.m, 0) == IN else "misses")


class WithLock(Dekker):
    def a(self, k: Any, cpu: Cpu, vm: int) -> None:
        k.vcpu_set_mode(cpu.m, 0, IN)
        with self.lock.held(cpu):
            self.saw.append(k.kvm_test_request(cpu.m, 0, FREE))


class WithBarrier(Dekker):
    def between(self, k: Any, cpu: Cpu) -> None:
        smp_mb(cpu)


class WithInterrupt(Dekker):
    """One that has come while interrupts were off."""

    def between(self, k: Any, cpu: Cpu) -> None:
        k.local_irq_disable(cpu.m, cpu.id, ffi.NULL)
        k.local_irq_enable(cpu.m, cpu.id)


def interrupted() -> SimpleNamespace:
    """The native library where an IPI is always there."""
    natives = {name: getattr(lib, name) for name in dir(lib)}
    return SimpleNamespace(**(natives | {"cpu_attention": lambda m, cpu: lib.ATTENTION_IPI}))


BOTH_MISS = " ['misses'] [0]"


def test_without_a_barrier_both_may_miss_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    for script in (Dekker, WithInterrupt):
        assert BOTH_MISS in outcomes(script, monkeypatch)


@pytest.mark.parametrize("script", [WithLock, WithBarrier, WithInterrupt])
def test_with_one_they_do_not(script: type[Script], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffered, "lib", interrupted())
    seen = outcomes(script, monkeypatch)
    assert BOTH_MISS not in seen
    assert len(seen) == 3


class Forwards(Script):
    def a(self, k: Any, cpu: Cpu, vm: int) -> None:
        k.vcpu_set_mode(cpu.m, 0, IN)
        self.saw.append(k.vcpu_mode(cpu.m, 0))
        k.vcpu_set_cpu(cpu.m, 0, 1)
        self.saw.append(k.vcpu_cpu(cpu.m, 0))
        cpu.point("plain store", 0, "write")
        k.kvm_make_request(cpu.m, 0, FREE)
        self.saw.append(k.kvm_check_request(cpu.m, 0, FREE))
        before = k.mmu_invalidate_seq(cpu.m, vm)
        k.mmu_invalidate_begin(cpu.m, vm)
        k.mmu_invalidate_end(cpu.m, vm)
        self.saw.append(k.mmu_invalidate_seq(cpu.m, vm) - before)

    def b(self, k: Any, cpu: Cpu, vm: int) -> None:
        pass


def test_a_cpu_sees_its_own_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {outcome.partition("] ")[2] for outcome in outcomes(Forwards, monkeypatch)} == {f"[{IN}, 1, 1, 1]"}


def test_an_interrupt_answers_behind_all_stores() -> None:
    program = LitmusProgram(
        parse_test(TEXT, "script", None), named_policy("linux-7.3"), ExploreOptions(store_buffers=True)
    )
    control = program.control
    assert isinstance(control, BufferedControl)
    execution = Execution(program.objects, Exhaustive(program.objects))
    with instrument(control):
        program.start(execution)
        stores, arrives = control.interruptible(CPU0)
        control.queued.add(0)
        assert arrives()
        control.stores.store(execution, CPU0, Store(("x",), 1, "x", 0, lambda: None))
        assert not arrives()
        assert stores == control.stores.mask(CPU0)
        control.execution = None
    program.close()


def test_every_explored_call_that_writes_waits_for_the_stores_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from emulator.explore.machine.footprints import FOOTPRINTS

    plain = {
        "bitmap_clear",
        "kvm_check_request",  # a load, unless it is set
        "kvm_make_request",  # if a mutant says so
        "mmu_invalidate_begin",
        "mmu_invalidate_end",
        "mmu_invalidate_range_add",
        "tdp_mmu_set_spte",
        "vcpu_set_cpu",
        "vcpu_set_mode",
    }
    program = LitmusProgram(
        parse_test(TEXT, "script", None), named_policy("linux-7.3"), ExploreOptions(store_buffers=True)
    )
    with instrument(program.control):
        controlled = vars(requests)["lib"]
        for name, footprint in FOOTPRINTS.items():
            fenced = getattr(controlled, name).__qualname__.startswith("BufferedLib._fenced")
            assert fenced == (footprint.writer and name not in plain), name
            settles = getattr(controlled, name).__qualname__.startswith("BufferedLib._settles")
            reads_sptes = ("ept",) in footprint.reads and not footprint.writer
            assert settles >= reads_sptes, name
    program.close()


def test_an_spte_that_is_not_frozen_any_more_is_seen_later() -> None:
    """tdp_mmu_zap_spte_atomic() of 6.12: faults meet the frozen SPTE while the store is on its way."""
    policy = named_policy("linux-6.12")
    program = LitmusProgram(load_test("recover-frozen"), policy, ExploreOptions(store_buffers=True))
    visible: list[object] = []

    def note(task: Task) -> None:
        if task.label[0] == VISIBLE:
            visible.append(task.label[1])

    try:
        with instrument(program.control):
            for seed in range(3):
                strategy = RandomWalk(1, seed)
                execution = Execution(program.objects, strategy)
                program.start(execution)
                execution.on_step = note
                strategy.begin(len(execution.tasks))
                execution.run()
                assert execution.failure is None
                assert program.finish(execution) == ""
    finally:
        program.close()
    assert "an SPTE of gfn 0x200" in visible
