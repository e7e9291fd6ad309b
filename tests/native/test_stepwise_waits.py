"""Waiting in steps, as a scheduler does it that has one thread for everything: calls and grace periods."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from emulator.machine.runtime import Machine
from native import ffi, lib
from native.types import Hfn
from tests.support import CPU0, CPU1, CPU3

CONFIG = {
    "pcpus": 2,
    "housekeeping": 2,
    "vms": 1,
    "vcpus": 1,
    "root_frames": 2,
    "table_frames": 4,
    "guest_frames": 4,
    "guest_blocks": 0,
    "l1_ways": 4,
    "l2_entries": 0,
    "l2_ways": 12,
    "psc_entries": 0,
    "chaos": 0,
    "seed": 0,
}


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine(CONFIG)
    for cpu in machine.cpus:
        lib.cpu_online(machine.m, cpu.id)
    yield machine
    machine.destroy()


def test_a_sender_that_waits_later_polls_its_node(machine: Machine) -> None:
    mask = ffi.new("uint64_t[]", [0b11])
    assert lib.smp_call_function_many(machine.m, CPU0, mask, lib.IPI_ACK_KICK, 0, lib.IPI_WAIT_LATER) == 1
    assert lib.csd_busy(machine.m, CPU0, CPU1)
    assert not lib.csd_busy(machine.m, CPU1, CPU0)
    assert lib.ipi_drain(machine.m, CPU1) == 1
    assert not lib.csd_busy(machine.m, CPU0, CPU1)


def test_a_held_call_runs_when_it_arrives(machine: Machine) -> None:
    m, mask = machine.m, ffi.new("uint64_t[]", [0b10])
    lib.ipi_hold(m, CPU1, 1)
    lib.smp_call_function_many(m, CPU0, mask, lib.IPI_ACK_KICK, 0, lib.IPI_WAIT_LATER)
    assert lib.ipi_drain(m, CPU1) == 0
    assert not lib.cpu_attention(m, CPU1)
    assert lib.ipi_arrive(m, CPU1) == 1
    assert not lib.csd_busy(m, CPU0, CPU1)
    lib.smp_call_function_many(m, CPU0, mask, lib.IPI_ACK_KICK, 0, lib.IPI_WAIT_LATER)
    lib.local_irq_disable(m, CPU1, b"a test")
    assert lib.ipi_arrive(m, CPU1) == 0
    assert lib.csd_busy(m, CPU0, CPU1)
    lib.local_irq_enable(m, CPU1)
    assert not lib.csd_busy(m, CPU0, CPU1)


def test_a_grace_period_waits_for_readers_of_before(machine: Machine) -> None:
    m, rcu = machine.m, CPU3
    table = Hfn(lib.ept_table_alloc(m, CPU0, lib.FRAME_TABLE))
    assert lib.rcu_gp_begin(m, rcu) == 0
    lib.rcu_read_lock(m, CPU1)
    lib.ept_table_free_rcu(m, CPU0, table)
    assert lib.rcu_gp_begin(m, rcu) == 1
    assert lib.rcu_gp_begin(m, rcu) == 0
    lib.rcu_read_lock(m, CPU0)  # after the grace period began, which does not wait for it
    assert lib.rcu_gp_end(m, rcu) == lib.MACHINE_AGAIN
    assert lib.rcu_holdout(m) == 1
    assert lib.frames_in_use(m, lib.FRAME_TABLE) == 1
    lib.rcu_read_unlock(m, CPU1)
    assert lib.rcu_gp_end(m, rcu) == 1
    assert lib.frames_in_use(m, lib.FRAME_TABLE) == 0
    assert lib.rcu_gp_end(m, rcu) == 0
    lib.rcu_read_unlock(m, CPU0)


def test_frames_come_in_the_order_of_a_new_machine_again(machine: Machine) -> None:
    m = machine.m
    frames = [Hfn(lib.frame_alloc(m, CPU0, lib.FRAME_TABLE)) for _ in range(3)]
    for hfn in frames:
        lib.frame_free(m, CPU0, hfn)
    assert lib.frame_alloc(m, CPU0, lib.FRAME_TABLE) == frames[2]
    assert lib.frames_order(m) == 1
    lib.frame_free(m, CPU0, frames[2])
    assert lib.frames_order(m) == 0
    assert [lib.frame_alloc(m, CPU0, lib.FRAME_TABLE) for _ in range(3)] == frames
