"""struct rw_semaphore: readers beside readers, writers alone, and no writer waits for ever."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from emulator.machine.locks import RwSemaphore, SpinLock
from emulator.machine.runtime import Cpu, Machine, MachineMisuse, MachineStopped
from native import lib
from tests.support import machine_fields, wait_until


@pytest.fixture
def machine() -> Iterator[Machine]:
    fields = {
        "vms": 1,
        "vcpus": 1,
        "root_frames": 4,
        "table_frames": 8,
        "guest_frames": 16,
        "guest_blocks": 1,
    }
    machine = Machine(machine_fields(pcpus=1, housekeeping=5, **fields))
    for cpu in machine.cpus:
        lib.cpu_online(machine.m, cpu.id)
    yield machine
    machine.stop()
    machine.destroy()


def test_readers_share_and_writers_exclude(machine: Machine) -> None:
    semaphore = RwSemaphore("tested")
    readers: list[int] = []
    writers: list[int] = []
    wrong: list[int] = []

    def read(cpu: Cpu) -> None:
        for _ in range(1000):
            with semaphore.read_lock(cpu):
                readers.append(cpu.id)
                lib.cpu_event(cpu.m, cpu.id)  # gives the GIL away
                if writers:
                    wrong.append(cpu.id)
                readers.remove(cpu.id)

    def write(cpu: Cpu) -> None:
        for _ in range(1000):
            with semaphore.write_lock(cpu):
                writers.append(cpu.id)
                lib.cpu_event(cpu.m, cpu.id)
                if readers or len(writers) > 1:
                    wrong.append(cpu.id)
                writers.pop()

    bodies = zip((read, read, write, write), machine.cpus[1:5], strict=True)
    threads = [threading.Thread(target=body, args=(cpu,)) for body, cpu in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    first, second = machine.cpus[1:3]
    with semaphore.read_lock(first), semaphore.read_lock(second):
        assert semaphore.free_for(False)
        assert not semaphore.free_for(True)
    with semaphore.write_lock(first):
        assert not semaphore.free_for(False)
    assert semaphore.free_for(True)


def test_a_waiting_writer_keeps_new_readers_out(machine: Machine) -> None:
    semaphore = RwSemaphore("tested")
    mine, writer, reader = machine.cpus[1:4]
    order: list[str] = []

    def write() -> None:
        with semaphore.write_lock(writer):
            order.append("writer")

    def read() -> None:
        with semaphore.read_lock(reader):
            order.append("reader")

    threads = [threading.Thread(target=write), threading.Thread(target=read)]
    with semaphore.read_lock(mine):
        threads[0].start()
        wait_until(lambda: writer.id in semaphore._waiters, "the writer waits")
        threads[1].start()
        wait_until(lambda: reader.id in semaphore._waiters or bool(order), "the reader waits")
        assert not order, "a reader went past the writer"
    for thread in threads:
        thread.join()
    assert sorted(order) == ["reader", "writer"]


def test_a_waiter_sees_the_stop_and_leaves_no_trace(machine: Machine) -> None:
    semaphore = RwSemaphore("held for ever")
    mine, waiter = machine.cpus[1:3]
    errors: list[type[BaseException]] = []

    def work() -> None:
        try:
            with semaphore.write_lock(waiter):
                pass
        except MachineStopped as error:
            errors.append(type(error))

    thread = threading.Thread(target=work)
    with semaphore.read_lock(mine):
        thread.start()
        wait_until(lambda: waiter.id in semaphore._waiters, "the writer waits")
        machine.stop()
        thread.join()
    assert errors == [MachineStopped]
    assert not semaphore._writers
    assert semaphore.free_for(True)


def test_it_may_not_be_taken_under_a_spinlock(machine: Machine) -> None:
    cpu = machine.cpus[1]
    with SpinLock("s").held(cpu), pytest.raises(MachineMisuse, match="tested"):
        RwSemaphore("tested").read_lock(cpu).__enter__()
