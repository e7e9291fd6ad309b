"""INIT: the guest boots again, and its cached translations are gone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from emulator.job.job import Job
from emulator.kvm.kvm_host import (
    KVM_REQ_EVENT,
    KVM_REQ_TLB_FLUSH_GUEST,
    X86_CR0_PG,
    X86_CR4_PAE,
    X86_CR4_PCIDE,
    X86_CR4_PGE,
    ExitToUser,
)
from emulator.kvm.reset import apic_send_init, kvm_vcpu_reset, power_on
from emulator.kvm.structs import Kvm, is_long_mode
from emulator.kvm.virt.requests import kvm_check_request, kvm_test_request
from emulator.kvm.vmx.exits import handle_cr
from emulator.policy import MUTANTS, Policy, preset
from emulator.scenario.config import load_scenario
from native import lib
from tests.emulator.kvm.rig import Guest, Rig, scopes

PAGES = 4


def booted(rig: Rig, policy: Policy) -> tuple[Kvm, Guest]:
    """A guest OS that has touched its pages twice."""
    kvm = rig.vm(policy)
    guest = rig.guest(kvm, pages=PAGES, paging=1, pcid=1)
    guest.run_slices(0, 2 * PAGES)
    return kvm, guest


def boot_again(rig: Rig, guest: Guest) -> None:
    apic_send_init(rig.host, guest.vcpu)
    guest.run_slices(0, 2 * PAGES)


@contextmanager
def invvpids(rig: Rig, expected: int) -> Iterator[None]:
    before = scopes(rig)["invvpid_single"]
    yield
    assert scopes(rig)["invvpid_single"] - before == expected


def test_a_guest_that_boots_again_uses_nothing_that_it_had_cached(rig: Rig) -> None:
    kvm, guest = booted(rig, Policy())
    averted = rig.counter(lib.COUNT_AVERTED)
    with rig.counting(kvm) as stats:
        boot_again(rig, guest)
    assert stats["resets"] == 1
    assert rig.counter(lib.COUNT_AVERTED) - averted == PAGES
    assert rig.violations() == {}
    # It has set its registers up itself.
    arch = guest.vcpu.arch
    assert arch.cr0 & X86_CR0_PG
    assert arch.cr4 == X86_CR4_PAE | X86_CR4_PGE | X86_CR4_PCIDE


def test_page_tables_are_built_anew(rig: Rig) -> None:
    _, guest = booted(rig, Policy())
    used = lib.guest_frames_used(rig.machine.m, guest.vcpu.id)
    faults = rig.counter(lib.COUNT_GUEST_FAULTS)
    boot_again(rig, guest)
    assert rig.counter(lib.COUNT_GUEST_FAULTS) - faults == PAGES
    # Its frames are free: it needs as many as before.
    assert lib.guest_frames_used(rig.machine.m, guest.vcpu.id) == used


def test_without_a_flush_the_oracle_catches_it(rig: Rig) -> None:
    _, guest = booted(rig, preset("mutant:init-without-flush"))
    boot_again(rig, guest)
    assert "guest-stale" in rig.violations()


def test_the_flushes_of_the_boot_cover_those_of_the_reset(rig: Rig) -> None:
    """CR4.PGE and CR0.PG change, and roots are loaded: on real KVM, too, the reset's own are to be safe."""
    patch = MUTANTS["init-without-flush"].patch
    assert patch is not None
    policy = Policy().patched(patch, "", "reset-without-flush")
    _, guest = booted(rig, policy)
    boot_again(rig, guest)
    assert rig.violations() == {}


def test_the_flushes_of_the_reset_cover_those_of_the_boot(rig: Rig) -> None:
    _, guest = booted(rig, preset("mutant:paging-off-without-flush"))
    boot_again(rig, guest)
    assert rig.violations() == {}


def test_the_vpid_is_flushed_at_once_and_the_rest_is_requested(rig: Rig) -> None:
    _, guest = booted(rig, Policy())
    vcpu, cpu = guest.vcpu, rig.machine.cpus[0]
    with invvpids(rig, 1):
        kvm_vcpu_reset(cpu, vcpu, init_event=True)
    assert kvm_check_request(cpu, vcpu, KVM_REQ_TLB_FLUSH_GUEST)
    assert [vcpu.mmu.root] == [None]
    # With paging off: INIT flushes all the same, and the roots stay.
    guest.resume(0)
    root = vcpu.mmu.root
    assert root is not None
    kvm_vcpu_reset(cpu, vcpu, init_event=True)
    assert kvm_check_request(cpu, vcpu, KVM_REQ_TLB_FLUSH_GUEST)
    kvm_vcpu_reset(cpu, vcpu, init_event=False)
    assert not kvm_test_request(cpu, vcpu, KVM_REQ_TLB_FLUSH_GUEST)
    assert vcpu.mmu.root is root


def test_power_on_after_paging_flushes_too(rig: Rig) -> None:
    """KVM resets a vCPU only once without INIT, before it has paging; the code does not rely on it."""
    _, guest = booted(rig, Policy())
    kvm_vcpu_reset(rig.machine.cpus[0], guest.vcpu, init_event=False)
    assert kvm_test_request(rig.host, guest.vcpu, KVM_REQ_TLB_FLUSH_GUEST)


def test_in_smm_an_init_waits_for_rsm(rig: Rig) -> None:
    kvm, guest = booted(rig, Policy())
    rig.smm_slots(kvm)
    guest.enter_smm(0, 5, 6)
    with rig.counting(kvm) as stats:
        apic_send_init(rig.host, guest.vcpu)
        guest.next_slice(0)
    assert "resets" not in stats
    assert not kvm_test_request(rig.host, guest.vcpu, KVM_REQ_EVENT)
    with rig.counting(kvm) as stats:
        guest.run_slices(0, 2)
    assert stats["resets"] == 1
    assert rig.violations() == {}


def test_an_smi_that_was_to_come_does_not(rig: Rig) -> None:
    kvm, guest = booted(rig, Policy())
    guest.vcpu.arch.smi_pending = True
    kvm_vcpu_reset(rig.machine.cpus[0], guest.vcpu, init_event=True)
    with rig.counting(kvm) as stats:
        guest.run_slices(0, PAGES)
    assert "smis" not in stats


def test_a_guest_that_was_about_to_turn_paging_on_is_back_at_the_start(rig: Rig) -> None:
    _, guest = booted(rig, Policy())
    cpu, vcpu = rig.machine.cpus[0], guest.vcpu
    kvm_vcpu_reset(cpu, vcpu, init_event=True)
    handle_cr(cpu, vcpu, lib.GUEST_INSN_MOV_CR4, X86_CR4_PAE)
    boot_again(rig, guest)
    assert vcpu.arch.cr4 == X86_CR4_PAE | X86_CR4_PGE | X86_CR4_PCIDE
    assert rig.violations() == {}


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "caught"), [("linux-7.3", False), ("mutant:init-without-flush", True)])
def test_guests_that_boot_all_the_time(policy: str, caught: bool) -> None:
    """Nothing else flushes here: uses are averted by resets only."""
    scenario = load_scenario()
    quiet = scenario.changed(
        host=scenario.host.model_copy(update=dict.fromkeys(("unmap", "reclaim", "mprotect", "migrate"), 0.0)),
        kvm=scenario.kvm.model_copy(update={"resets": 40.0, "memslot_cycles": 0.0, "dirty_log_cycles": 0.0}),
        scheduler=scenario.scheduler.model_copy(update={"mode": "pin"}),
    )
    job = Job(quiet, preset(policy), seed=1, duration=2.0)
    snapshot = job.run(lambda now: None, threading.Event()).snapshot
    assert snapshot.kvm("resets") > 10
    if caught:
        assert snapshot.violations["guest-stale"]
    else:
        assert not snapshot.violations
        averted = sum(f.necessary for f in snapshot.flushes if f.reason == "guest")
        assert averted > 0


@pytest.mark.parametrize("pcid", [False, True])
def test_with_ept_a_guest_starts_with_the_cr4_that_its_os_has_set(rig: Rig, pcid: bool) -> None:
    guest = rig.guest(rig.vm(), pcid=int(pcid))
    power_on(rig.host, guest.vcpu, paging=True, pcid=pcid)
    assert bool(guest.vcpu.arch.cr4 & X86_CR4_PCIDE) == pcid


def test_with_ept_a_guest_without_paging_starts_without_it(rig: Rig) -> None:
    """Its reset has nothing to flush then, except on INIT."""
    vcpu = rig.guest(rig.vm(), paging=0).vcpu
    power_on(rig.host, vcpu, paging=False, pcid=False)
    assert not vcpu.arch.cr0 & X86_CR0_PG
    assert not is_long_mode(vcpu)
    kvm_check_request(rig.host, vcpu, KVM_REQ_TLB_FLUSH_GUEST)
    kvm_vcpu_reset(rig.machine.cpus[0], vcpu, init_event=False)
    assert not kvm_test_request(rig.host, vcpu, KVM_REQ_TLB_FLUSH_GUEST)


def test_an_os_that_boots_meets_a_host_that_forbids_stores_to_its_tables(rig: Rig) -> None:
    """If KVM had to set the accessed flag above the OS's map of memory, it could not, and would inject a
    page fault that no OS survives.  An OS's tables for the kernel have that flag from the start."""
    kvm = rig.vm(ept=False)
    guest = rig.guest(kvm, pages=PAGES, paging=1, pcid=1)
    vcpu = guest.vcpu
    power_on(rig.host, vcpu, paging=True, pcid=True)
    while not vcpu.arch.cr0 & X86_CR0_PG:
        guest.resume(0)
    top = vcpu.arch.cr3 >> 12
    rig.protect(kvm, top, top + 1, writable=0)
    # Its next stores to the table wait for the host.
    assert ExitToUser("shutdown") not in [guest.resume(0) for _ in range(40)]
    accesses = rig.counter(lib.COUNT_ACCESSES)
    rig.protect(kvm, top, top + 1, writable=1)
    guest.run_slices(0, 2 * PAGES)
    assert rig.counter(lib.COUNT_ACCESSES) > accesses
    assert rig.violations() == {}
