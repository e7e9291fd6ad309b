"""KVM on real threads: pCPUs that take vCPUs in turn, two that play the host, one that makes ioctls."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from random import Random

import pytest

from emulator.actors.chaos import Chaos
from emulator.kvm.kvm_host import KVM_MEM_LOG_DIRTY_PAGES, RunState
from emulator.kvm.mmu.mmu import kvm_zap_gfn_range
from emulator.kvm.mmu.tdp_roots import flush_workqueue
from emulator.kvm.smm import kvm_inject_smi
from emulator.kvm.structs import Kvm
from emulator.kvm.virt.kvm_main import (
    kvm_mmu_notifier_invalidate_range_end,
    kvm_mmu_notifier_invalidate_range_start,
    kvm_sched_in,
    kvm_sched_out,
    kvm_set_memory_region,
    kvm_vm_ioctl_get_dirty_log,
)
from emulator.machine.runtime import Cpu, MachineStopped
from emulator.policy import Policy, preset
from native import lib
from native.types import Gfn, Hva
from tests.emulator.kvm.rig import GFNS, SLOT, Guest, Rig, running_rig

PAGES = 1024


class Storm:
    """Threads that end when the machine stops; an exception in one stops it."""

    def __init__(self, rig: Rig, kvm: Kvm, vcpus: int) -> None:
        self.rig = rig
        self.kvm = kvm
        self.runnable = deque(Guest(rig, kvm, pages=PAGES, end_gfn=PAGES) for _ in range(vcpus))
        self.threads: list[threading.Thread] = []
        self.errors: list[BaseException] = []
        self.rounds: dict[str, int] = {}
        self.stats: dict[str, int] = {}
        self.averted = 0

    def start(self, cpu: Cpu, turn: Callable[[Cpu], None]) -> None:
        def body() -> None:
            lib.cpu_online(cpu.m, cpu.id)
            try:
                with suppress(MachineStopped):
                    while not self.rig.machine.stopping:
                        turn(cpu)
                        name = getattr(turn, "__name__", "turn")
                        self.rounds[name] = self.rounds.get(name, 0) + 1
            except BaseException as error:
                self.errors.append(error)
                self.rig.machine.stop()
            finally:
                lib.cpu_offline(cpu.m, cpu.id)

        self.threads.append(threading.Thread(target=body))

    def pcpu(self, cpu: Cpu) -> None:
        """One vCPU for some turns; whatever it is in the middle of, another pCPU may go on with it."""
        try:
            guest = self.runnable.popleft()
        except IndexError:
            cpu.check(lib.cpu_halt(cpu.m, cpu.id, 50))
            return
        if guest.on is not None and guest.scheduled_out:
            kvm_sched_in(cpu, guest.vcpu)
        guest.on = cpu
        for _ in range(8):
            if not isinstance(guest.run.send(cpu), RunState):
                break
        guest.scheduled_out = guest.vcpu.loaded
        if guest.scheduled_out:
            kvm_sched_out(cpu, guest.vcpu)
        self.runnable.append(guest)

    def host(self, cpu: Cpu) -> None:
        """Pages 0 to 511 are unmapped in small pieces, the others also in one, and collapsed."""
        rng = self.randoms.setdefault(cpu.id, Random(cpu.id))
        action = rng.choice(("piece", "piece", "huge piece", "all", "collapse"))
        notified = range(512, 1024)
        unmapped = notified
        if action == "piece":
            notified = unmapped = range(start := rng.randrange(448), start + 64)
        elif action == "huge piece":
            # A host that splits a huge page invalidates all of it (__split_huge_pmd).
            unmapped = range(start := rng.randrange(512, 960), start + 64)
        m, vm = cpu.m, self.kvm.id
        kvm_mmu_notifier_invalidate_range_start(cpu, self.kvm, Hva(notified.start), Hva(notified.stop))
        if action == "collapse":
            lib.mm_collapse(m, cpu.id, vm, Hva(notified.start))
        else:
            lib.mm_unmap(m, cpu.id, vm, Hva(unmapped.start), Hva(unmapped.stop), True)
        kvm_mmu_notifier_invalidate_range_end(cpu, self.kvm, Hva(notified.start), Hva(notified.stop))
        # The merged range of invalidations only shrinks when none is in progress.
        cpu.check(lib.cpu_halt(cpu.m, cpu.id, 2000))

    randoms: dict[int, Random] = {}  # noqa: RUF012 - by CPU, the same in every run

    def ioctls(self, cpu: Cpu) -> None:
        kvm = self.kvm
        kvm_set_memory_region(cpu, kvm, SLOT, Gfn(0), GFNS, Hva(0), KVM_MEM_LOG_DIRTY_PAGES)
        for _ in range(3):
            kvm_vm_ioctl_get_dirty_log(cpu, kvm, SLOT)
        kvm_set_memory_region(cpu, kvm, SLOT, Gfn(0), GFNS, Hva(0))
        kvm_zap_gfn_range(cpu, kvm, Gfn(100), Gfn(200))
        kvm_set_memory_region(cpu, kvm, SLOT, Gfn(0), 0, Hva(0))
        kvm_set_memory_region(cpu, kvm, SLOT, Gfn(0), GFNS, Hva(0))

    def smis(self, cpu: Cpu) -> None:
        """SMIs for all vCPUs; this thread is the workqueue, too."""
        for vcpu in self.kvm.vcpus:
            kvm_inject_smi(cpu, vcpu)
        cpu.check(lib.cpu_halt(cpu.m, cpu.id, 500))
        flush_workqueue(cpu, self.kvm)

    def look(self) -> None:
        """Read the counters."""
        self.averted = self.rig.counter(lib.COUNT_AVERTED)
        self.stats = self.rig.stats(self.kvm)

    def run(self, seconds: float, until: Callable[[], bool]) -> None:
        self.randoms.clear()
        for thread in self.threads:
            thread.start()
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not until() and not self.rig.machine.stopping:
            time.sleep(0.02)
        self.rig.machine.stop()
        for thread in self.threads:
            thread.join(20)
        assert not [thread for thread in self.threads if thread.is_alive()]
        if self.errors:
            raise self.errors[0]
        # VMs that stopped in the middle of an operation cannot be destroyed in order.
        self.rig.vms.clear()


def storm(
    policy: Policy, seconds: float, until: Callable[[Storm], bool], smm: bool = False
) -> tuple[dict[str, int], Storm]:
    """Return the violations, and the storm that ran."""
    with running_rig(pcpus=2, housekeeping=5, root_frames=16, chaos=64) as rig:
        kvm = rig.vm(policy, slice_accesses=2000, fault_around=16, chunk=32, resched_chunks=2)
        storm = Storm(rig, kvm, 3)
        rig.machine.install(Chaos(100, 1, len(rig.machine.cpus)))
        for cpu in rig.machine.cpus[:2]:
            storm.start(cpu, storm.pcpu)
        for cpu in rig.machine.cpus[3:5]:
            storm.start(cpu, storm.host)
        if smm:
            rig.smm_slots(kvm)
            for guest in storm.runnable:
                guest.set_handler(*range(0, 512, 32))
            storm.start(rig.machine.cpus[5], storm.smis)
        storm.start(rig.host, storm.ioctls)
        storm.run(seconds, lambda: until(storm))
        storm.look()
        return rig.violations(), storm


# Seconds of a storm in which nothing may go wrong.  On a busy machine it goes on until all has happened that
# the test asserts.
LEAST, MOST = 1.5, 60.0


def clean_storm(policy: Policy, done: Callable[[Storm], bool], smm: bool = False) -> Storm:
    began = time.monotonic()

    def enough(ran: Storm) -> bool:
        ran.look()
        return time.monotonic() - began >= LEAST and ran.averted > 0 and done(ran)

    violations, ran = storm(policy, MOST, enough, smm)
    assert violations == {}
    assert ran.averted > 0
    return ran


@pytest.mark.stress
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"huge_recovery": "zap-each"},
        {"migration": "active-roots"},
        {"zap_scope": "leafs-and-tables"},
        {"zap_scope": "leafs-and-tables", "zap": "disconnected-list", "zap_yield": "unlock-then-flush"},
        {"zap_scope": "leafs-and-tables", "zap": "flush-per-table", "zap_yield": "unlock-then-flush"},
        {"zap": "flush-per-table", "zap_root": "root"},
        {"zap": "disconnected-list", "zap_root": "1g-root", "huge_recovery": "zap-each"},
        {"slot_delete": "zap-slot-leafs"},
        {"remote_kick": "vm-pcpu-mask"},
    ],
    ids=str,
)
def test_nothing_goes_wrong(settings: dict[str, str]) -> None:

    def done(ran: Storm) -> bool:
        stats, rounds = ran.stats, ran.rounds
        return (
            stats.get("faults", 0) > 100
            and stats.get("migrations", 0) > 20
            and stats.get("yields", 0) > 0
            and all(rounds.get(name, 0) > 2 for name in ("pcpu", "host", "ioctls"))
        )

    ran = clean_storm(Policy().with_settings(settings), done)
    assert done(ran), (ran.stats, ran.rounds)


KEEP = {"role_change": "keep-roots"}


@pytest.mark.stress
@pytest.mark.parametrize(
    ("policy", "settings"),
    [
        ("linux-7.3", {}),
        ("linux-5.18", {}),
        ("linux-5.14", {}),
        ("lkml-2021-single-context", {}),
        ("lkml-2025-active-roots", KEEP),
        ("cpu-flushed-mask-cleared", KEEP),
        ("root-tlb-gen", {}),
        ("root-tlb-gen", KEEP),
        ("root-tlb-gen", {**KEEP, "root_load": "none"}),
        ("linux-7.3", {"root_put": "flush", "cached_root": "flush-current", **KEEP}),
    ],
    ids=str,
)
def test_nothing_goes_wrong_with_several_roots(policy: str, settings: dict[str, str]) -> None:
    chosen = preset(policy).with_settings(settings) if settings else preset(policy)

    def done(ran: Storm) -> bool:
        return ran.stats.get("migrations", 0) > 20 and ran.rounds.get("smis", 0) > 20

    assert done(clean_storm(chosen, done, smm=True))


def caught(policy: Policy, smm: bool = False) -> None:
    """A rare race on a machine that others may use: up to ten storms."""
    for _ in range(10):
        violations, ran = storm(policy, 22, lambda ran: bool(ran.rig.violations()), smm)
        if violations:
            return
    raise AssertionError(f"nothing found in ten storms, the last with {ran.rounds}")


@pytest.mark.stress
@pytest.mark.timeout(300)
@pytest.mark.parametrize("policy", ["mutant:migration-current-only", "mutant:remote-flush-current-only"])
def test_the_oracle_fires_with_several_roots(policy: str) -> None:
    caught(preset(policy), smm=True)


@pytest.mark.stress
@pytest.mark.timeout(300)
@pytest.mark.parametrize("settings", [{"kick_wait": "no-wait"}, {"write_protect": "none"}], ids=str)
def test_the_oracle_fires(settings: dict[str, str]) -> None:
    caught(Policy().with_settings(settings))
