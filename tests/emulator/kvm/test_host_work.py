"""Between two flushes the host works for longer than a vCPU needs to serve the first one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest

from emulator.kvm.host_work import host_works
from emulator.kvm.virt.kvm_main import kvm_flush_remote_tlbs, kvm_sched_out
from emulator.machine.runtime import Cpu, MachineStopped
from native import lib
from tests.emulator.kvm.rig import Guest, Rig, online, running_rig

SECONDS = 10.0


class Work:
    """host_works() on a thread of its own."""

    def __init__(self, cpu: Cpu, guest: Guest) -> None:
        self.result: bool | type[BaseException] | None = None
        self._thread = threading.Thread(target=self._run, args=(cpu, guest), daemon=True)
        self._thread.start()

    def _run(self, cpu: Cpu, guest: Guest) -> None:
        try:
            with online(cpu) if cpu.is_pcpu else nullcontext():
                self.result = host_works(cpu, guest.vcpu.kvm)
        except MachineStopped as stopped:
            self.result = type(stopped)

    def ends(self, seconds: float = SECONDS) -> bool:
        self._thread.join(seconds)
        return not self._thread.is_alive()


def guest_that_owes_a_flush(rig: Rig, **params: bool) -> Guest:
    kvm = rig.vm(None, True, **{"host_takes_time": True, **params})
    guest = rig.guest(kvm)
    guest.write(0, 5)
    assert not host_works(rig.host, kvm), "it owes nothing yet"
    flush(rig, guest)
    return guest


def flush(rig: Rig, guest: Guest) -> None:
    kvm_flush_remote_tlbs(rig.host, guest.vcpu.kvm, lib.REASON_OTHER)


@contextmanager
def waiting(rig: Rig, guest: Guest) -> Iterator[Work]:
    work = Work(rig.host, guest)
    assert not work.ends(0.05), "it went on although the vCPU owes a flush"
    assert rig.host.id in guest.vcpu.kvm.at_host_work
    yield work
    assert work.ends()
    assert not guest.vcpu.kvm.at_host_work


def test_the_host_waits_until_the_flush_is_served(rig: Rig) -> None:
    guest = guest_that_owes_a_flush(rig)
    with waiting(rig, guest) as work:
        guest.write(0, 5)
    assert work.result is True


def test_the_host_does_not_wait_for_a_vcpu_that_is_not_loaded(rig: Rig) -> None:
    guest = guest_that_owes_a_flush(rig)
    with waiting(rig, guest):
        kvm_sched_out(rig.machine.cpus[0], guest.vcpu)
    flush(rig, guest)
    assert not host_works(rig.host, guest.vcpu.kvm)


def test_a_vcpu_at_host_work_of_its_own_is_not_waited_for_until_it_is_done(rig: Rig) -> None:
    guest = guest_that_owes_a_flush(rig)
    pcpu, at_work = rig.machine.cpus[0], guest.vcpu.kvm.at_host_work
    other = rig.guest(guest.vcpu.kvm)
    other.write(1, 5)
    flush(rig, guest)
    with waiting(rig, guest):
        # The guest's own work waits for the other vCPU, which is all that the host has to wait for now.
        work = Work(pcpu, guest)
        assert not work.ends(0.05)
        assert sorted(at_work) == [pcpu.id, rig.host.id]
        other.write(1, 5)
        assert work.ends()
    assert other.vcpu.kvm.at_host_work == []
    # Done, it is on its way to an entry.
    with waiting(rig, guest):
        guest.write(0, 5)


def test_two_vcpus_at_host_work_do_not_wait_for_each_other(rig: Rig) -> None:
    guest = guest_that_owes_a_flush(rig)
    other = rig.guest(guest.vcpu.kvm)
    other.write(1, 5)
    flush(rig, guest)
    first = Work(rig.machine.cpus[0], guest)
    assert not first.ends(0.05)
    second = Work(rig.machine.cpus[1], other)
    assert second.ends()
    assert second.result is False
    assert not first.ends(0.05), "the second one is on its way to an entry"
    other.write(1, 5)
    assert first.ends()
    assert first.result is True


def test_nothing_waits_where_vcpus_do_not_run_by_themselves(rig: Rig) -> None:
    guest = guest_that_owes_a_flush(rig, host_takes_time=False)
    assert not host_works(rig.host, guest.vcpu.kvm)


def test_a_machine_that_stops_ends_the_wait() -> None:
    with running_rig() as rig:
        work = Work(rig.host, guest_that_owes_a_flush(rig))
        assert not work.ends(0.05)
        rig.machine.stop()
        assert work.ends()
        assert work.result is MachineStopped
        rig.vms.clear()


@pytest.mark.parametrize("host_takes_time", [True, False])
def test_a_zap_that_is_scheduled_away_lets_the_vcpus_serve_its_flush(rig: Rig, host_takes_time: bool) -> None:
    kvm = rig.vm(host_takes_time=host_takes_time, chunk=1, resched_chunks=1)
    guest = rig.guest(kvm)
    for gfn in (5, 6):
        guest.write(0, gfn)
    with rig.counting(kvm) as counts:
        thread = threading.Thread(target=rig.unmap, args=(kvm, 5, 7), daemon=True)
        thread.start()
        for _ in range(1000):
            if not thread.is_alive():
                break
            guest.read(0, 700)
            thread.join(0.01)
        assert not thread.is_alive()
        guest.read(0, 700)
    assert counts["remote_tlb_flush_requests"] == 2
    if host_takes_time:
        assert counts["tlb_flush"] == 2
