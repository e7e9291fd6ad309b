"""CPUs, errors, locks: the ground that KVM's code stands on."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from emulator.machine.locks import MmuLock, Mutex, Refcount, SpinLock
from emulator.machine.runtime import (
    READ,
    WRITE,
    Cpu,
    CpuOffline,
    Machine,
    MachineError,
    MachineMisuse,
    MachineStopped,
    OutOfFrames,
    TryAgain,
    rcu_enter,
    rcu_leave,
    rcu_read_lock,
    wait_until,
    wake,
)
from native import lib
from native.types import VmId
from tests.support import CPU2

CONFIG = {
    "pcpus": 1,
    "housekeeping": 4,
    "vms": 2,
    "vcpus": 2,
    "root_frames": 4,
    "table_frames": 8,
    "guest_frames": 16,
    "guest_blocks": 1,
    "l1_ways": 4,
    "l2_entries": 64,
    "l2_ways": 4,
    "psc_entries": 8,
    "chaos": 0,
    "seed": 1,
}


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine(CONFIG)
    for cpu in machine.cpus:
        lib.cpu_online(machine.m, cpu.id)
    yield machine
    machine.stop()
    machine.destroy()


@pytest.fixture
def cpu(machine: Machine) -> Cpu:
    return machine.cpus[1]


@pytest.fixture
def mmu_lock(machine: Machine) -> MmuLock:
    return MmuLock(VmId(machine.cpus[1].check(lib.vm_create(machine.m, 16))))


def in_thread(action: object) -> threading.Thread:
    thread = threading.Thread(target=action)  # type: ignore[arg-type]
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("rc", "error"),
    [
        (lib.MACHINE_STOPPED, MachineStopped),
        (lib.MACHINE_OFFLINE, CpuOffline),
        (lib.MACHINE_NOMEM, OutOfFrames),
        (lib.MACHINE_AGAIN, TryAgain),
        (lib.MACHINE_MISUSE, MachineMisuse),
        (-1, MachineError),
    ],
)
def test_negative_returns_become_exceptions(cpu: Cpu, rc: int, error: type[MachineError]) -> None:
    with pytest.raises(error) as raised:
        cpu.check(rc)
    assert raised.type is error
    assert cpu.check(5) == 5


def test_cpus_are_pcpus_first(machine: Machine) -> None:
    assert [cpu.is_pcpu for cpu in machine.cpus] == [True, False, False, False, False]


def test_points_call_the_hook_with_their_footprint(machine: Machine, cpu: Cpu) -> None:
    seen: list[tuple[int, str, object, str]] = []
    cpu.point("spte", 1, "write")
    machine.install(lambda at, kind, obj, mode: seen.append((at.id, kind, obj, mode)))
    cpu.point("spte", 2, "write")
    machine.install(None)
    cpu.point("spte", 3, "write")
    assert seen == [(1, "spte", 2, "write")]


def test_wait_until_is_woken(machine: Machine, cpu: Cpu) -> None:
    done: list[int] = []

    def later() -> None:
        done.append(1)
        wake(machine, cpu.id)

    thread = in_thread(later)
    wait_until(cpu, lambda: bool(done), "done")
    thread.join()


def test_a_stopping_machine_ends_waits(machine: Machine, cpu: Cpu) -> None:
    machine.stop()
    with pytest.raises(MachineStopped):
        wait_until(cpu, lambda: False, "nothing")


def test_waiting_under_a_spinlock_is_refused(cpu: Cpu, mmu_lock: MmuLock) -> None:
    with SpinLock("s").held(cpu):
        with pytest.raises(MachineMisuse, match="holds a spinlock"):
            wait_until(cpu, lambda: True, "anything")
        with pytest.raises(MachineMisuse, match="mmu_lock"), mmu_lock.read_lock(cpu):
            pass
        with pytest.raises(MachineMisuse, match="slots_lock"), Mutex("slots_lock").held(cpu):
            pass
    assert cpu.spinlocks == 0


@pytest.mark.parametrize("kind", [SpinLock, Mutex])
def test_locks_exclude(machine: Machine, kind: type[SpinLock] | type[Mutex]) -> None:
    lock = kind("tested")
    inside: list[int] = []
    overlaps: list[int] = []

    def work(cpu: Cpu) -> None:
        for _ in range(2000):
            with lock.held(cpu):
                inside.append(cpu.id)
                lib.cpu_event(cpu.m, cpu.id)  # gives the GIL away
                if len(inside) != 1:
                    overlaps.append(cpu.id)
                inside.pop()

    threads = [in_thread(lambda cpu=cpu: work(cpu)) for cpu in machine.cpus[1:]]
    for thread in threads:
        thread.join()
    assert not overlaps
    assert lock.owner == -1


def test_a_waiter_for_a_lock_sees_the_stop(machine: Machine, cpu: Cpu) -> None:
    lock = Mutex("held for ever")
    errors: list[type[BaseException]] = []

    def other() -> None:
        try:
            with lock.held(machine.cpus[2]):
                pass
        except MachineStopped as error:
            errors.append(type(error))

    with lock.held(cpu):
        thread = in_thread(other)
        machine.stop()
        thread.join()
    assert errors == [MachineStopped]
    with lock.held(cpu) as held:
        held.unlock()
        assert lock.owner == -1


def test_refcount(cpu: Cpu) -> None:
    count = Refcount(1)
    assert count.inc_not_zero(cpu)
    assert not count.dec_and_test(cpu)
    assert count.dec_and_test(cpu)
    assert not count.inc_not_zero(cpu)
    with pytest.raises(AssertionError):
        count.dec_and_test(cpu)


def test_mmu_lock_and_rcu_are_left_as_found(cpu: Cpu, mmu_lock: MmuLock) -> None:
    with mmu_lock.write_lock(cpu):
        assert cpu.mmu_lock_held == WRITE
        assert lib.mmu_read_trylock(cpu.m, CPU2, mmu_lock.vm) == lib.MACHINE_AGAIN
    with mmu_lock.read_lock(cpu), rcu_read_lock(cpu):
        assert cpu.mmu_lock_held == READ
        mmu_lock.cond_resched(cpu)
        assert cpu.mmu_lock_held == READ
    assert (cpu.mmu_lock_held, cpu.rcu_depth) == (0, 0)


def test_guards_release_nothing_that_a_failed_yield_lost(
    machine: Machine, cpu: Cpu, mmu_lock: MmuLock
) -> None:
    """As in tdp_mmu_iter_cond_resched when the machine stops while mmu_lock is dropped."""
    other = machine.cpus[2]
    ready = threading.Event()

    def hold() -> None:
        mmu_lock.lock(other, WRITE)
        ready.set()
        while not machine.stopping:
            lib.cpu_halt(other.m, other.id, 1000)
        mmu_lock.unlock(other)

    with mmu_lock.write_lock(cpu), rcu_read_lock(cpu):
        rcu_leave(cpu)
        mmu_lock.unlock(cpu)
        thread = in_thread(hold)
        ready.wait()
        machine.stop()
        # Unless the other one was quick enough and the lock is free again.
        try:
            mmu_lock.lock(cpu, WRITE)
            rcu_enter(cpu)
        except MachineStopped:
            assert (cpu.mmu_lock_held, cpu.rcu_depth) == (0, 0)
    thread.join()
    assert (cpu.mmu_lock_held, cpu.rcu_depth) == (0, 0)
    assert lib.mmu_write_trylock(cpu.m, cpu.id, mmu_lock.vm) == 0
    lib.mmu_write_unlock(cpu.m, cpu.id, mmu_lock.vm)
