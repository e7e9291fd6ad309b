"""SMM, control registers and levels: a vCPU's root, and the flushes on the way to it."""

from __future__ import annotations

import pytest

from emulator.kvm.kvm_host import (
    RESCHED,
    X86_CR0_PG,
    X86_CR0_WP,
    X86_CR4_PAE,
    X86_CR4_PCIDE,
    X86_CR4_PGE,
    X86_CR4_PSE,
    X86_CR4_SMEP,
    ExitToUser,
)
from emulator.kvm.mmu.roots import kvm_mmu_after_set_cpuid
from emulator.kvm.mmu.spte import root_to_sp
from emulator.kvm.smm import kvm_inject_smi
from emulator.kvm.structs import Kvm
from emulator.kvm.virt.kvm_main import kvm_set_memory_region
from emulator.policy import Policy
from native import lib
from native.types import Gfn, Hva
from tests.emulator.kvm.rig import GFNS, SLOT, Guest, Rig

FLUSHES = ("flush_all", "flush_current", "flush_guest", "mmu_load", "tlb_flush")
SMRAM = 3000


def smm_guest(rig: Rig, policy: Policy | None = None) -> tuple[Kvm, Guest]:
    kvm = rig.vm(policy)
    rig.smm_slots(kvm)
    return kvm, rig.guest(kvm)


def flushes(counts: dict[str, int]) -> dict[str, int]:
    return {name: counts[name] for name in FLUSHES if name in counts}


def roles(kvm: Kvm) -> set[tuple[int, int]]:
    return {(root.role.level, root.role.smm) for root in kvm.tdp_mmu_roots}


# --- SMM ----------------------------------------------------------------------------------------------------


def test_smm_has_a_root_of_its_own_and_rsm_finds_the_old_one(rig: Rig) -> None:
    kvm, guest = smm_guest(rig)
    guest.write(0, 5)
    normal = root_to_sp(guest.vcpu.mmu.root)
    guest.enter_smm(0, 70, 71)
    smm = root_to_sp(guest.vcpu.mmu.root)
    assert smm is not None
    assert normal is not None
    assert (normal.role.smm, smm.role.smm) == (0, 1)
    guest.next_slice(0)
    guest.next_slice(0)
    assert root_to_sp(guest.vcpu.mmu.root) is normal
    assert roles(kvm) == {(4, 0), (4, 1)}
    assert rig.violations() == {}


def test_what_an_smi_with_rsm_at_once_takes(rig: Rig) -> None:
    """With CR4.PGE set, RSM owes the guest one INVVPID."""
    kvm, guest = smm_guest(rig)
    guest.write(0, 5)
    with rig.counting(kvm) as counts:
        guest.enter_smm(0)
        guest.write(0, 5)
    assert flushes(counts) == {"flush_current": 2, "flush_guest": 1, "mmu_load": 2, "tlb_flush": 1}


def test_smm_sees_memory_that_the_guest_does_not(rig: Rig) -> None:
    kvm = rig.vm(slot=False)
    kvm_set_memory_region(rig.host, kvm, SLOT, Gfn(0), SMRAM, Hva(0))
    kvm_set_memory_region(rig.host, kvm, SLOT, Gfn(0), GFNS, Hva(0), as_id=1)
    guest = rig.guest(kvm)
    assert isinstance(guest.read(0, SMRAM), ExitToUser)
    guest.write(0, 5)
    guest.enter_smm(0, SMRAM)
    assert guest.vcpu.arch.smm
    assert kvm.memslots[1].search(Gfn(SMRAM)) is not None
    assert guest.next_slice(0) is RESCHED
    assert isinstance(guest.read(0, SMRAM), ExitToUser)


def test_a_second_smi_waits_until_smm_ends(rig: Rig) -> None:
    _, guest = smm_guest(rig)
    guest.write(0, 5)
    guest.enter_smm(0, 70, 71)
    kvm_inject_smi(rig.host, guest.vcpu)
    guest.next_slice(0)
    assert guest.vcpu.arch.smi_pending
    guest.next_slice(0)
    assert guest.vcpu.arch.smm
    assert not guest.vcpu.arch.smi_pending


def test_notifiers_reach_the_roots_of_both_address_spaces(rig: Rig) -> None:
    kvm, guest = smm_guest(rig)
    guest.write(0, 5)
    guest.enter_smm(0, 5, 6, 5)
    rig.unmap(kvm, 0, 64)
    guest.next_slice(0)
    guest.next_slice(0)
    guest.read(0, 5)
    assert rig.violations() == {}


def test_a_slot_of_one_address_space_goes_and_the_other_stays(rig: Rig) -> None:
    kvm, guest = smm_guest(rig)
    guest.write(0, 5)
    guest.enter_smm(0, 5, 6)
    kvm_set_memory_region(rig.host, kvm, SLOT, Gfn(0), 0, Hva(0), as_id=1)
    guest.next_slice(0)
    guest.read(0, 5)
    assert rig.violations() == {}


def test_nothing_is_promised_of_what_the_other_address_space_maps_as_well(rig: Rig) -> None:
    kvm, guest = smm_guest(rig, Policy().with_settings({"slot_delete": "zap-slot-leafs"}))
    guest.write(0, 5)
    kvm_set_memory_region(rig.host, kvm, SLOT, Gfn(0), 0, Hva(0), as_id=1)
    guest.write(0, 5)
    assert rig.violations() == {}
    kvm_set_memory_region(rig.host, kvm, SLOT, Gfn(0), 0, Hva(0))
    assert isinstance(guest.read(0, 5), ExitToUser)


def test_slots_of_both_address_spaces_map_the_same_memory(rig: Rig) -> None:
    kvm = rig.vm()
    with pytest.raises(ValueError, match="other address space"):
        kvm_set_memory_region(rig.host, kvm, SLOT, Gfn(0), 64, Hva(64), as_id=1)


def test_paging_is_off_in_smm_and_back_after_it(rig: Rig) -> None:
    kvm = rig.vm(slice_accesses=40)
    rig.smm_slots(kvm)
    guest = Guest(rig, kvm, pages=16, paging=1, pcid=1, unmap_every=10, end_gfn=512)
    guest.run_slices(0, 20)
    for _ in range(10):
        guest.enter_smm(0, *range(600, 608))
        guest.run_slices(0, 5)
    assert not guest.vcpu.arch.smm
    assert rig.violations() == {}


# --- control registers --------------------------------------------------------------------------------------

REGISTERS: list[tuple[str, int, int, dict[str, int]]] = [
    ("CR0.WP", lib.GUEST_INSN_MOV_CR0, X86_CR0_WP, {}),
    ("CR0.PG", lib.GUEST_INSN_MOV_CR0, X86_CR0_PG, {"flush_guest": 1, "mmu_load": 1, "flush_current": 1}),
    ("CR4.PSE", lib.GUEST_INSN_MOV_CR4, X86_CR4_PSE, {"mmu_load": 1, "flush_current": 1}),
    ("CR4.PGE", lib.GUEST_INSN_MOV_CR4, X86_CR4_PGE, {"flush_guest": 1}),
    ("CR4.PCIDE on", lib.GUEST_INSN_MOV_CR4, X86_CR4_PCIDE, {}),
    ("CR4.SMEP on", lib.GUEST_INSN_MOV_CR4, X86_CR4_SMEP, {"mmu_load": 1, "flush_current": 1}),
]


@pytest.mark.parametrize(("name", "insn", "bit", "expected"), REGISTERS, ids=lambda v: str(v))
def test_a_register_bit_changes(rig: Rig, name: str, insn: int, bit: int, expected: dict[str, int]) -> None:
    kvm = rig.vm()
    guest = rig.guest(kvm)
    guest.write(0, 5)
    arch = guest.vcpu.arch
    old = arch.cr0 if insn == lib.GUEST_INSN_MOV_CR0 else arch.cr4
    with rig.counting(kvm) as counts:
        guest.execute(0, insn, old ^ bit)
        guest.write(0, 5)
    seen = flushes(counts)
    seen.pop("tlb_flush", None)
    assert seen == expected


def test_flushes_that_end_something(rig: Rig) -> None:
    """CR4.PCIDE 1 to 0 flushes; SMEP 1 to 0 only loads a root; MOV CR3 flushes unless bit 63 says no."""
    kvm = rig.vm()
    guest = rig.guest(kvm)
    guest.vcpu.arch.cr4 = X86_CR4_PAE | X86_CR4_PCIDE | X86_CR4_SMEP
    guest.write(0, 5)
    for insn, operand, flushed in (
        (lib.GUEST_INSN_MOV_CR3, 1 << 63 | 0x1001, {}),
        (lib.GUEST_INSN_MOV_CR3, 0x1001, {"flush_guest": 1}),
        (lib.GUEST_INSN_MOV_CR4, X86_CR4_PAE | X86_CR4_SMEP, {"flush_guest": 1}),
        (lib.GUEST_INSN_MOV_CR4, X86_CR4_PAE, {"mmu_load": 1, "flush_current": 1}),
    ):
        with rig.counting(kvm) as counts:
            guest.execute(0, insn, operand)
            guest.write(0, 5)
        seen = flushes(counts)
        seen.pop("tlb_flush", None)
        assert seen == flushed
    assert guest.vcpu.arch.cr3 == 0x1001


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("reset-context", {}),
        ("keep-roots", {}),
        ("no-guest-flush", {}),
        ("unload-all", {"mmu_load": 1, "flush_current": 1}),
    ],
)
def test_the_shortcut_for_cr0_wp_is_of_6_4(rig: Rig, answer: str, expected: dict[str, int]) -> None:
    kvm = rig.vm(Policy().with_settings({"role_change": answer}))
    guest = rig.guest(kvm)
    guest.write(0, 5)
    with rig.counting(kvm) as counts:
        guest.execute(0, lib.GUEST_INSN_MOV_CR0, guest.vcpu.arch.cr0 ^ X86_CR0_WP)
        guest.write(0, 5)
    assert flushes(counts) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("reset-context", {"flush_guest": 1, "mmu_load": 1, "flush_current": 1, "tlb_flush": 1}),
        ("keep-roots", {"flush_guest": 1, "tlb_flush": 1}),
        ("no-guest-flush", {}),
        ("unload-all", {"mmu_load": 1, "flush_current": 1}),
    ],
)
def test_what_clearing_cr0_pg_takes(rig: Rig, answer: str, expected: dict[str, int]) -> None:
    kvm = rig.vm(Policy().with_settings({"role_change": answer}))
    guest = rig.guest(kvm)
    guest.write(0, 5)
    with rig.counting(kvm) as counts:
        guest.execute(0, lib.GUEST_INSN_MOV_CR0, guest.vcpu.arch.cr0 & ~X86_CR0_PG)
        guest.write(0, 5)
    assert flushes(counts) == expected


def test_smep_flushes_the_current_context_also_where_roots_are_kept(rig: Rig) -> None:
    kvm = rig.vm(Policy().with_settings({"role_change": "keep-roots"}))
    guest = rig.guest(kvm)
    guest.write(0, 5)
    with rig.counting(kvm) as counts:
        guest.execute(0, lib.GUEST_INSN_MOV_CR4, guest.vcpu.arch.cr4 | X86_CR4_SMEP)
        guest.write(0, 5)
    assert flushes(counts) == {"flush_current": 1, "tlb_flush": 1}


# --- levels -------------------------------------------------------------------------------------------------


def test_vcpus_of_one_vm_use_roots_of_different_levels(rig: Rig) -> None:
    kvm = rig.vm(tdp_level=5)
    wide, narrow = rig.guest(kvm), rig.guest(kvm)
    kvm_mmu_after_set_cpuid(rig.host, narrow.vcpu, 48)
    wide.write(0, 5)
    narrow.write(1, 5)
    assert roles(kvm) == {(4, 0), (5, 0)}
    rig.unmap(kvm, 0, 64)
    wide.read(0, 5)
    narrow.read(1, 5)
    assert rig.violations() == {}


def test_cpuid_that_changes_the_levels_drops_the_roots(rig: Rig) -> None:
    kvm = rig.vm(tdp_level=5)
    guest = rig.guest(kvm)
    guest.write(0, 5)
    kvm_mmu_after_set_cpuid(rig.host, guest.vcpu, 48)
    assert [guest.vcpu.mmu.root] == [None]
    guest.read(0, 5)
    root = root_to_sp(guest.vcpu.mmu.root)
    assert root is not None
    assert root.role.level == 4
    assert rig.violations() == {}
