"""Injected bugs around requests, faults, flushes and SMM: each is caught by the violation that it allows."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread

import pytest

from emulator.kvm.kvm_host import X86_CR0_PG
from emulator.kvm.virt.kvm_main import (
    kvm_mmu_notifier_invalidate_range_end,
    kvm_mmu_notifier_invalidate_range_start,
    kvm_set_memory_region,
)
from emulator.kvm.vmx.exits import handle_instruction
from emulator.machine.runtime import Cpu
from emulator.policy import MUTANTS, Policy, preset
from native import ffi, lib
from native.types import CpuId, Gfn, Hva
from tests.emulator.kvm.rig import GFNS, SLOT, Guest, Rig, unmap_while_entering
from tests.support import CPU0, CPU1

Scenario = Callable[[Rig, Policy], set[str]]
SMRAM = 3000
LINEAR = 0


def hook_nth(rig: Rig, cpu: CpuId, kind: str, mode: str, nth: int, action: Callable[[], object]) -> list[int]:
    """Do `action` when that CPU passes the nth point of this kind; returns the passes so far."""
    passed: list[int] = []

    def hook(at: Cpu, what: str, obj: object, access: str) -> None:
        if at.id == cpu and (what, access) == (kind, mode):
            passed.append(at.id)
            if len(passed) == nth:
                action()

    rig.machine.install(hook)
    return passed


def page_freed(rig: Rig, policy: Policy) -> set[str]:
    """A page is taken back and read again on the pCPU that has its translation."""
    kvm = rig.vm(policy)
    guest = rig.guest(kvm)
    guest.write(0, 5)
    rig.unmap(kvm, 0, 64)
    guest.read(0, 5)
    return set(rig.violations())


def enters_while_a_request_is_made(rig: Rig, policy: Policy) -> set[str]:
    """A vCPU enters between two steps of the flusher, and is in guest mode until the flush is over."""
    kvm = rig.vm(policy)
    guest = rig.guest(kvm)
    guest.read(0, 5)
    unmap_while_entering(rig, kvm, guest, "requests", lambda: None)
    return set(rig.violations())


def interrupted_before_entry(rig: Rig, policy: Policy) -> set[str]:
    """The kick comes between the last look at requests and VM entry."""
    kvm = rig.vm(policy)
    guest = rig.guest(kvm)
    guest.read(0, 5)
    flusher = Thread(target=rig.unmap, args=(kvm, 0, 64))

    def hook(at: Cpu, what: str, obj: object, access: str) -> None:
        if at.id != 0 or what not in ("interrupts", "guest"):
            return
        if not flusher.ident:
            flusher.start()
            while not lib.ipi_pending(rig.machine.m, CPU0):
                pass
        elif (what, access) == ("interrupts", "read"):
            flusher.join()

    rig.machine.install(hook)
    guest.read(0, 5)
    rig.machine.install(None)
    flusher.join()
    return set(rig.violations())


def frame_before_sequence(rig: Rig, policy: Policy) -> set[str]:
    """The page goes right after the fault has looked its frame up, and before the fault goes on."""
    kvm = rig.vm(policy)
    guest = rig.guest(kvm)
    guest.write(0, 70)
    # Points of a fault: the sequence; the sequence again (the mutant), or mmu_lock.
    late = policy.patch is not None
    kind = "mmu_invalidate_seq" if late else "mmu_lock"
    passed = hook_nth(rig, CPU0, kind, "read", 2 if late else 1, lambda: rig.unmap(kvm, 0, 64))
    guest.write(0, 5)
    rig.machine.install(None)
    assert passed
    return set(rig.violations())


def try_access(guest: Guest, pcpu: CpuId, gfn: int, kind: int) -> None:
    """One access, but given up when its fault is to be retried."""
    m, entries = guest.rig.machine.m, []
    cpu = guest.rig.machine.cpus[pcpu]
    hook = cpu.hook

    def give_up(at: Cpu, what: str, obj: object, access: str) -> None:
        if what == "guest":
            entries.append(at)
            if len(entries) == 3:
                lib.cpu_notify(m, pcpu, lib.ATTENTION_RESCHED)

    cpu.hook = give_up
    guest.access(pcpu, gfn, kind)
    cpu.hook = hook
    lib.cpu_clear_attention(m, pcpu, lib.ATTENTION_RESCHED)


def faults_while_in_progress(rig: Rig, policy: Policy) -> set[str]:
    """A fault between invalidate_range_start and the moment when the host frees the page."""
    kvm = rig.vm(policy)
    guest = rig.guest(kvm)
    guest.write(0, 5)
    kvm_mmu_notifier_invalidate_range_start(rig.host, kvm, Hva(0), Hva(64))
    try_access(guest, CPU0, 5, lib.ACCESS_WRITE)
    lib.mm_unmap(rig.machine.m, rig.host.id, kvm.id, Hva(0), Hva(64), True)
    kvm_mmu_notifier_invalidate_range_end(rig.host, kvm, Hva(0), Hva(64))
    guest.read(0, 5)
    return set(rig.violations())


def faults_on_a_slot_that_goes(rig: Rig, policy: Policy) -> set[str]:
    """A write to a read-only page of a slot that is being deleted, then a notifier for that page."""
    kvm = rig.vm(policy)
    reader, writer = rig.guest(kvm), rig.guest(kvm)
    reader.write(0, 5)
    writer.write(1, 70)
    rig.protect(kvm, 0, 64, 0)
    reader.read(0, 5)
    fired: list[bool] = []

    def hook(at: Cpu, what: str, obj: object, access: str) -> None:
        slot = kvm.memslots[0].by_id.get(SLOT)
        if at is rig.host and what == "mmu_lock" and slot is not None and slot.invalid and not fired:
            fired.append(True)
            try_access(writer, CPU1, 5, lib.ACCESS_WRITE)
            kvm_mmu_notifier_invalidate_range_start(rig.other, kvm, Hva(0), Hva(64))
            lib.mm_unmap(rig.machine.m, rig.other.id, kvm.id, Hva(0), Hva(64), True)
            kvm_mmu_notifier_invalidate_range_end(rig.other, kvm, Hva(0), Hva(64))
            try_access(reader, CPU0, 5, lib.ACCESS_READ)

    rig.host.hook = hook
    kvm_set_memory_region(rig.host, kvm, SLOT, Gfn(0), 0, Hva(0))
    rig.host.hook = None
    assert fired
    return set(rig.violations())


def smm_memory_freed(rig: Rig, policy: Policy) -> set[str]:
    """Memory that only SMM sees is taken back, and the next SMI reads it."""
    kvm = rig.vm(policy, slot=False)
    kvm_set_memory_region(rig.host, kvm, SLOT, Gfn(0), SMRAM, Hva(0))
    kvm_set_memory_region(rig.host, kvm, SLOT, Gfn(0), GFNS, Hva(0), as_id=1)
    guest = rig.guest(kvm)
    guest.write(0, 70)
    guest.enter_smm(0, SMRAM)
    guest.read(0, 70)
    rig.unmap(kvm, SMRAM, SMRAM + 64)
    guest.enter_smm(0, SMRAM)
    guest.read(0, 70)
    return set(rig.violations())


def paging_off_and_on(rig: Rig, policy: Policy) -> set[str]:
    """The guest changes a page table and clears CR0.PG, which drops all translations that it had."""
    kvm = rig.vm(policy)
    guest = Guest(rig, kvm, paging=1, end_gfn=512)
    vcpu = guest.vcpu
    run_program(guest, (lib.GUEST_OP_MAP, LINEAR, 600), (lib.GUEST_OP_READ, LINEAR, 0))
    run_program(guest, (lib.GUEST_OP_MAP, LINEAR, 601))
    cpu = rig.machine.cpus[0]
    for cr0 in (vcpu.arch.cr0 & ~X86_CR0_PG, vcpu.arch.cr0 | X86_CR0_PG):
        handle_instruction(cpu, vcpu, lib.GUEST_INSN_MOV_CR0, cr0)
    run_program(guest, (lib.GUEST_OP_READ, LINEAR, 0))
    return set(rig.violations())


def run_program(guest: Guest, *ops: tuple[int, int, int]) -> None:
    """Kind, page, value of each; until the end."""
    m, vcpu = guest.rig.machine.m, guest.vcpu
    array = ffi.new(
        "struct guest_op[]",
        [{"kind": kind, "flags": 0, "linear": page << 12, "value": value} for kind, page, value in ops],
    )
    guest.rig.host.check(lib.guest_set_program(m, vcpu.id, array, len(ops)))
    while lib.guest_program_position(m, vcpu.id) < len(ops):
        guest.resume(0)


CAUGHT: list[tuple[str, Scenario, str]] = [
    ("mutant:interrupts-before-entry", interrupted_before_entry, "use-after-free"),
    ("mutant:mode-before-request", enters_while_a_request_is_made, "use-after-free"),
    ("mutant:flush-all-by-invvpid", page_freed, "use-after-free"),
    ("mutant:sequence-after-lookup", frame_before_sequence, "use-after-free"),
    ("mutant:retry-ignores-range", faults_while_in_progress, "use-after-free"),
    ("mutant:mmio-over-live-spte", faults_on_a_slot_that_goes, "use-after-free"),
    ("mutant:paging-off-without-flush", paging_off_and_on, "guest-stale"),
    ("mutant:smm-keeps-root", smm_memory_freed, "use-after-free"),
]


def _id(value: object) -> str | None:
    return getattr(value, "__name__", None)


@pytest.mark.parametrize(("policy", "scenario", "kind"), CAUGHT, ids=_id)
def test_the_bug_is_caught(rig: Rig, policy: str, scenario: Scenario, kind: str) -> None:
    assert kind in scenario(rig, preset(policy))


@pytest.mark.parametrize("scenario", [scenario for _, scenario, _ in CAUGHT], ids=_id)
def test_linux_is_silent(rig: Rig, scenario: Scenario) -> None:
    assert scenario(rig, Policy()) == set()


@pytest.mark.parametrize(
    ("name", "without_ept"), [("guest-flush-by-invept", True), ("role-change-zaps-tree", False)]
)
@pytest.mark.parametrize("scenario", [page_freed, smm_memory_freed, paging_off_and_on], ids=_id)
def test_what_only_costs_with_ept_is_not_caught(
    rig: Rig, name: str, without_ept: bool, scenario: Scenario
) -> None:
    """Without EPT INVEPT drops no linear mapping (litmus test nested-ept0-no-vpid)."""
    assert MUTANTS[name].cost_only != without_ept
    assert scenario(rig, preset(f"mutant:{name}")) == set()


def test_to_5_17_the_guest_relied_on_the_flush_at_load(rig: Rig) -> None:
    """So a load that flushes only old roots needs the separate flushes of 5.18."""
    policy = preset("root-tlb-gen")
    assert paging_off_and_on(rig, policy) == set()
    assert "guest-stale" in paging_off_and_on(rig, policy.with_settings({"role_change": "unload-all"}))


@pytest.mark.parametrize("answer", ["keep-roots", "unload-all"])
def test_other_ways_to_change_roles_flush_for_the_guest(rig: Rig, answer: str) -> None:
    assert paging_off_and_on(rig, Policy().with_settings({"role_change": answer})) == set()
