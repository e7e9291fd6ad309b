"""CPUs, calls, mmu_lock, RCU and SRCU as Python sees them: results, sentences, no thread that hangs.

The races themselves are hunted in C (sync_*.c beside this file, `make -C native test tsan asan`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from native import COUNTER_NAMES, ffi, lib
from native.types import CpuId, EventSeq
from tests.support import VM0, BareMachine, wait_until

if TYPE_CHECKING:
    from native._native import MachinePtr

FIRST, SECOND = CpuId(0), CpuId(1)  # pCPUs
HOUSEKEEPER, RCU = CpuId(2), CpuId(3)
ROUNDS = 100_000


@pytest.fixture
def m(bare_machine: BareMachine) -> MachinePtr:
    return bare_machine.pointer


def sentence(m: MachinePtr, cpu: CpuId) -> str:
    return str(ffi.string(lib.machine_error_text(m, cpu)).decode())


def counter(m: MachinePtr, name: str) -> int:
    values = ffi.new("uint64_t[]", lib.COUNTERS)
    lib.counters_sum(m, values)
    return int(values[COUNTER_NAMES.index(name)])


class Runner(threading.Thread):
    """A thread that hands its exception to the test."""

    def __init__(self, body: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._body = body
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._body()
        except BaseException as error:
            self._error = error

    def finish(self, seconds: float = 20) -> None:
        self.join(seconds)
        assert not self.is_alive(), "the thread hangs"
        if self._error is not None:
            raise self._error


def idle(m: MachinePtr, cpu: CpuId) -> None:
    """Idle as a pCPU without work does."""
    lib.cpu_online(m, cpu)
    while (bits := lib.cpu_halt(m, cpu, 0)) >= 0:
        lib.cpu_clear_attention(m, cpu, bits)
    assert bits == lib.MACHINE_STOPPED
    lib.cpu_offline(m, cpu)


@contextmanager
def running(m: MachinePtr, *bodies: Callable[[], None]) -> Iterator[None]:
    """Threads that end when the machine stops."""
    threads = [Runner(body) for body in bodies]
    try:
        yield
    finally:
        lib.machine_stop(m)
        for thread in threads:
            thread.finish()


def halted(m: MachinePtr, cpu: CpuId) -> None:
    wait_until(lambda: lib.cpu_power(m, cpu) == lib.CPU_HALTED, f"CPU {cpu} halts")


# --- machine_create -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"pcpus": 0}, "pcpus is 0"),
        ({"pcpus": 16384, "housekeeping": 1}, "exceed 16384"),
        ({"l1_ways": 8}, "l1_ways must be 4"),
        ({"l2_ways": 0}, "l2_ways is 0"),
        ({"l2_ways": 7}, "l2_ways must divide l2_entries"),
        ({"guest_blocks": 1 << 20}, "2^24 host frames"),
    ],
)
def test_impossible_machines_are_explained(change: dict[str, int], expected: str) -> None:
    config = {"pcpus": 1, "vms": 1, "vcpus": 1, "l1_ways": 4, "l2_entries": 64, "l2_ways": 4} | change
    error = ffi.new("char[]", 256)
    m = lib.machine_create(ffi.new("struct machine_config *", config), error, 256)
    assert m == ffi.NULL
    assert expected in ffi.string(error).decode()


# --- halting and notifying ------------------------------------------------------------------------


def test_halt_ends_at_a_message_a_timeout_and_a_stop(m: MachinePtr) -> None:
    lib.cpu_online(m, FIRST)
    assert lib.cpu_halt(m, FIRST, 100) == 0
    lib.cpu_notify(m, FIRST, lib.ATTENTION_MESSAGE)
    assert lib.cpu_halt(m, FIRST, 0) == lib.ATTENTION_MESSAGE
    lib.machine_stop(m)
    assert lib.cpu_halt(m, FIRST, 0) == lib.ATTENTION_MESSAGE | lib.ATTENTION_STOP
    lib.cpu_clear_attention(m, FIRST, lib.ATTENTION_MESSAGE | lib.ATTENTION_STOP)
    assert lib.cpu_halt(m, FIRST, 0) == lib.MACHINE_STOPPED


def test_notify_wakes_a_halted_cpu(m: MachinePtr) -> None:
    seen: list[int] = []

    def sleeper() -> None:
        lib.cpu_online(m, FIRST)
        seen.append(lib.cpu_halt(m, FIRST, 0))

    thread = Runner(sleeper)
    halted(m, FIRST)
    lib.cpu_notify(m, FIRST, lib.ATTENTION_RESCHED)
    thread.finish()
    assert seen == [lib.ATTENTION_RESCHED]


def test_event_ends_a_wait_that_python_tests(m: MachinePtr) -> None:
    before = lib.cpu_event(m, HOUSEKEEPER)
    assert lib.cpu_wait_event(m, HOUSEKEEPER, before, 100) == 0
    assert lib.cpu_event(m, HOUSEKEEPER) == before
    lib.cpu_wake(m, HOUSEKEEPER)
    assert lib.cpu_wait_event(m, HOUSEKEEPER, before, 0) == 0
    lib.machine_stop(m)
    assert lib.cpu_wait_event(m, HOUSEKEEPER, lib.cpu_event(m, HOUSEKEEPER), 0) == lib.MACHINE_STOPPED


def test_offline_cpu_neither_waits_nor_sends(m: MachinePtr) -> None:
    assert lib.cpu_power(m, FIRST) == lib.CPU_OFFLINE
    assert lib.cpu_halt(m, FIRST, 0) == lib.MACHINE_OFFLINE
    assert lib.on_each_cpu(m, FIRST, lib.IPI_ACK_KICK, 0, lib.IPI_WAIT) == lib.MACHINE_OFFLINE
    lib.cpu_online(m, FIRST)
    assert lib.cpu_power(m, FIRST) == lib.CPU_RUNNING


# --- calls ----------------------------------------------------------------------------------------


def test_calls_to_halted_cpus_are_served_by_the_sender(m: MachinePtr) -> None:
    with running(m, lambda: idle(m, FIRST), lambda: idle(m, SECOND)):
        halted(m, FIRST)
        halted(m, SECOND)
        assert lib.on_each_cpu(m, HOUSEKEEPER, lib.IPI_ACK_KICK, 0, lib.IPI_WAIT) == 2
        assert lib.smp_call_function_single(m, HOUSEKEEPER, SECOND, lib.IPI_ACK_KICK, 0, lib.IPI_WAIT) == 1
        mask = ffi.new("uint64_t[]", [1 << FIRST])
        assert lib.smp_call_function_many(m, HOUSEKEEPER, mask, lib.IPI_ACK_KICK, 0, lib.IPI_WAIT) == 1
        assert counter(m, "csd_queued") == counter(m, "ipis_sent") == counter(m, "ipis_received") == 4
        assert counter(m, "calls_run") == counter(m, "calls_serviced") == 4


def test_interrupts_off_delay_a_call(m: MachinePtr) -> None:
    lib.cpu_online(m, FIRST)
    lib.local_irq_disable(m, FIRST, b"the test")
    assert lib.smp_call_function_single(m, HOUSEKEEPER, FIRST, lib.IPI_ACK_KICK, 0, lib.IPI_NO_WAIT) == 1
    assert lib.ipi_drain(m, FIRST) == 0
    assert lib.cpu_attention(m, FIRST) == lib.ATTENTION_IPI
    lib.local_irq_enable(m, FIRST)
    assert lib.cpu_attention(m, FIRST) == 0
    assert counter(m, "calls_run") == 1


def test_a_dying_target_runs_the_calls_that_it_has(m: MachinePtr) -> None:
    """Its senders go on before it is offline: a VMCS, for instance, must be clear by then."""
    lib.cpu_online(m, FIRST)
    thread = Runner(
        lambda: _equal(
            lib.smp_call_function_single(m, HOUSEKEEPER, FIRST, lib.IPI_ACK_KICK, 0, lib.IPI_WAIT), 1
        )
    )
    halted(m, HOUSEKEEPER)
    lib.cpu_offline(m, FIRST)
    thread.finish()
    assert counter(m, "calls_run") == 1


def _equal(found: int, expected: int) -> None:
    assert found == expected


# --- misuse ---------------------------------------------------------------------------------------


WAITS: list[tuple[str, Callable[[MachinePtr], int]]] = [
    ("cpu_halt", lambda m: lib.cpu_halt(m, FIRST, 1)),
    ("cpu_wait_event", lambda m: lib.cpu_wait_event(m, FIRST, EventSeq(0), 1)),
    ("on_each_cpu", lambda m: lib.on_each_cpu(m, FIRST, lib.IPI_ACK_KICK, 0, lib.IPI_NO_WAIT)),
    (
        "smp_call_function_single",
        lambda m: lib.smp_call_function_single(m, FIRST, SECOND, lib.IPI_ACK_KICK, 0, lib.IPI_WAIT),
    ),
    ("mmu_read_lock", lambda m: lib.mmu_read_lock(m, FIRST, VM0)),
    ("mmu_write_lock", lambda m: lib.mmu_write_lock(m, FIRST, VM0)),
    ("synchronize_rcu", lambda m: lib.synchronize_rcu(m, FIRST)),
    ("rcu_barrier", lambda m: lib.rcu_barrier(m, FIRST)),
    ("synchronize_srcu", lambda m: lib.synchronize_srcu(m, FIRST, VM0)),
]


@pytest.mark.parametrize(("name", "wait"), WAITS, ids=[name for name, _ in WAITS])
def test_waiting_with_interrupts_off_names_the_place(
    m: MachinePtr, name: str, wait: Callable[[MachinePtr], int]
) -> None:
    lib.cpu_online(m, FIRST)
    lib.local_irq_disable(m, FIRST, b"vcpu_enter_guest")
    assert wait(m) == lib.MACHINE_MISUSE
    assert sentence(m, FIRST) == f"{name} on CPU 0 with interrupts off since vcpu_enter_guest"
    lib.local_irq_enable(m, FIRST)


@pytest.mark.parametrize("name", ["synchronize_rcu", "rcu_barrier", "synchronize_srcu", "cpu_halt"])
def test_sleeping_in_a_read_section_or_under_mmu_lock(m: MachinePtr, name: str) -> None:
    wait = dict(WAITS)[name]
    lib.cpu_online(m, FIRST)
    lib.rcu_read_lock(m, FIRST)
    assert wait(m) == lib.MACHINE_MISUSE
    assert sentence(m, FIRST) == f"{name} on CPU 0 inside an RCU read section"
    lib.rcu_read_unlock(m, FIRST)
    assert lib.mmu_read_lock(m, FIRST, VM0) == 0
    assert wait(m) == lib.MACHINE_MISUSE
    assert sentence(m, FIRST) == f"{name} on CPU 0 under mmu_lock"
    lib.mmu_read_unlock(m, FIRST, VM0)


def test_unbalanced_unlocks_are_named(m: MachinePtr) -> None:
    lib.rcu_read_unlock(m, HOUSEKEEPER)
    assert sentence(m, HOUSEKEEPER) == "rcu_read_unlock on CPU 2 outside a read section"
    lib.mmu_write_unlock(m, HOUSEKEEPER, VM0)
    assert sentence(m, HOUSEKEEPER) == "mmu_write_unlock on CPU 2: VM 0's is not held"


# --- mmu_lock, RCU --------------------------------------------------------------------------------


def test_mmu_lock_forms(m: MachinePtr) -> None:
    assert lib.mmu_read_lock(m, HOUSEKEEPER, VM0) == 0
    assert lib.mmu_read_trylock(m, RCU, VM0) == 0
    assert lib.mmu_lock_needbreak(m, VM0) == 0
    lib.mmu_read_unlock(m, RCU, VM0)
    assert lib.mmu_write_trylock(m, RCU, VM0) == lib.MACHINE_AGAIN
    lib.mmu_read_unlock(m, HOUSEKEEPER, VM0)
    assert lib.mmu_write_trylock(m, RCU, VM0) == 0
    assert lib.mmu_read_trylock(m, HOUSEKEEPER, VM0) == lib.MACHINE_AGAIN
    lib.mmu_locks_abandon(m, RCU)
    assert lib.mmu_write_lock(m, HOUSEKEEPER, VM0) == 0
    lib.mmu_write_unlock(m, HOUSEKEEPER, VM0)


def test_callbacks_wait_for_a_reader_that_was_there_before(m: MachinePtr) -> None:
    with running(m, lambda: _equal(lib.rcu_thread(m, RCU), 0)):
        lib.rcu_read_lock(m, FIRST)
        assert lib.call_rcu(m, HOUSEKEEPER, lib.RCU_NOTHING, 0) == 0
        wait_until(lambda: lib.rcu_holdout(m) == FIRST, "the grace period waits for CPU 0")
        assert lib.rcu_pending(m) == 1
        lib.rcu_read_unlock(m, FIRST)
        assert lib.rcu_barrier(m, HOUSEKEEPER) == 0
        assert lib.rcu_pending(m) == 0
        assert lib.synchronize_rcu(m, HOUSEKEEPER) == 0
        assert counter(m, "rcu_invoked") == counter(m, "rcu_callbacks") == 1


# --- many rounds ----------------------------------------------------------------------------------


@pytest.mark.stress
@pytest.mark.timeout(110)
def test_simultaneous_broadcasts_under_mmu_lock_contention(m: MachinePtr) -> None:
    """Two pCPUs that flush each other, each under mmu_lock held for read and now and then for write."""
    left = [ROUNDS, ROUNDS]

    def broadcaster(cpu: CpuId) -> None:
        lib.cpu_online(m, cpu)
        while left[cpu]:
            lock, unlock = lib.mmu_read_lock, lib.mmu_read_unlock
            if left[cpu] % 8 == 0:
                lock, unlock = lib.mmu_write_lock, lib.mmu_write_unlock
            assert lock(m, cpu, VM0) == 0
            assert lib.on_each_cpu(m, cpu, lib.IPI_ACK_KICK, 0, lib.IPI_WAIT) >= 1
            unlock(m, cpu, VM0)
            left[cpu] -= 1
        lib.cpu_offline(m, cpu)

    def scraper() -> None:
        values = ffi.new("uint64_t[]", lib.COUNTERS)
        while any(left):
            lib.counters_sum(m, values)

    threads = [Runner(lambda: broadcaster(FIRST)), Runner(lambda: broadcaster(SECOND)), Runner(scraper)]
    for thread in threads:
        thread.finish(100)
    assert left == [0, 0]
    # They did meet: calls crossed, and the lock was waited for.
    assert counter(m, "csd_queued") > ROUNDS // 10
    buckets, total = ffi.new("uint64_t[]", lib.HISTOGRAM_BUCKETS), ffi.new("uint64_t *")
    lib.histogram_sum(m, lib.HISTOGRAM_LOCK_WAIT, buckets, total)
    assert sum(buckets) > ROUNDS // 1000, list(buckets)
