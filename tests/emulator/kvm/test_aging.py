"""Aging with and without A/D bits in EPT, and its meaning for code that reads W."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from emulator.kvm.kvm_host import KVM_MEM_LOG_DIRTY_PAGES
from emulator.kvm.mmu.mmu import kvm_mmu_zap_all_fast_back, kvm_mmu_zap_all_fast_front
from emulator.kvm.mmu.spte import is_access_track_spte, is_shadow_present_pte, is_writable_pte, root_to_sp
from emulator.kvm.mmu.structs import KvmMmuPageRole
from emulator.kvm.mmu.tdp_map import tdp_entry
from emulator.kvm.mmu.tdp_roots import (
    KVM_VALID_ROOTS,
    for_each_tdp_mmu_root_yield_safe,
    kvm_tdp_mmu_alloc_root,
    kvm_tdp_mmu_put_root,
)
from emulator.kvm.structs import Kvm
from emulator.kvm.virt.kvm_main import (
    kvm_mmu_notifier_clear_flush_young,
    kvm_mmu_notifier_clear_young,
    kvm_set_memory_region,
    kvm_vm_ioctl_get_dirty_log,
)
from emulator.machine.runtime import WRITE, Cpu
from emulator.points import PointKind
from emulator.policy import MUTANTS, Policy, preset
from native import lib
from native.types import Gfn, Hva, Level
from tests.emulator.kvm.rig import GFNS, SLOT, Guest, Rig, at_point


def spte_of(rig: Rig, guest: Guest, gfn: int) -> int:
    root = root_to_sp(guest.vcpu.mmu.root)
    assert root is not None
    return tdp_entry(rig.host, root, Gfn(gfn), Level(1)).spte


def young(rig: Rig, kvm: Kvm) -> bool:
    return kvm_mmu_notifier_clear_young(rig.host, kvm, Hva(0), Hva(64))


@pytest.mark.parametrize("eptad", [True, False])
def test_use_since_the_last_time(rig: Rig, eptad: bool) -> None:
    kvm = rig.vm(eptad=eptad)
    guest = rig.guest(kvm)
    assert not young(rig, kvm)
    guest.write(0, 5)
    with rig.counting(kvm) as counts:
        assert young(rig, kvm)
        assert not young(rig, kvm)
    assert counts == {}, "no flush"
    guest.read(0, 5)
    assert not young(rig, kvm), "the TLB still has the translation"
    rig.unmap(kvm, 600, 700)
    guest.write(0, 600)
    rig.unmap(kvm, 600, 700)  # which flushes
    guest.read(0, 5)
    assert young(rig, kvm)
    assert rig.violations() == {}


@pytest.mark.parametrize("eptad", [True, False])
@pytest.mark.parametrize(
    ("name", "flushes"), [("linux-7.3", 0), ("linux-6.12", 1), ("linux-5.18", 1), ("linux-5.14", 1)]
)
def test_reclaim_flushes_for_pages_that_were_used_before_6_13(
    rig: Rig, name: str, flushes: int, eptad: bool
) -> None:
    """A real 6.1 made one request for each page that it asked about."""
    kvm = rig.vm(preset(name), eptad=eptad)
    guest = rig.guest(kvm)
    for gfn in (5, 6):
        guest.write(0, gfn)
    for start, young, requests in ((5, True, flushes), (5, False, 0), (6, True, flushes), (7, False, 0)):
        with rig.counting(kvm) as counts:
            assert kvm_mmu_notifier_clear_flush_young(rig.host, kvm, Hva(start), Hva(start + 1)) is young
        assert counts.get("remote_tlb_flush_requests", 0) == requests
    with rig.counting(kvm) as counts:
        guest.write(0, 5)
        assert kvm_mmu_notifier_clear_young(rig.host, kvm, Hva(5), Hva(6)) is bool(flushes), (
            "else TLBs still have it"
        )
    assert "remote_tlb_flush_requests" not in counts, "others than reclaim never flush"
    assert rig.violations() == {}


@dataclass(frozen=True)
class Held:
    """Return the locks of the ager where it looks at SPTEs, and where it makes the request for a flush."""

    mmu_lock: int
    in_rcu: bool
    references: int


@pytest.mark.parametrize(
    ("name", "mmu_lock"),
    [("linux-7.3", 0), ("linux-6.12", WRITE), ("linux-5.18", WRITE), ("linux-5.14", WRITE)],
)
def test_mmu_lock_is_held_for_ageing_before_6_15(rig: Rig, name: str, mmu_lock: int) -> None:
    """Never are references taken: without mmu_lock the ager could not put the last one."""
    kvm = rig.vm(preset(name))
    guest = rig.guest(kvm)
    guest.write(0, 5)
    root = root_to_sp(guest.vcpu.mmu.root)
    assert root is not None
    references = root.tdp_mmu_root_count.value
    seen: dict[str, set[Held]] = {}

    def hook(at: Cpu, kind: PointKind, obj: object, mode: str) -> None:
        held = Held(at.mmu_lock_held, at.rcu_depth > 0, root.tdp_mmu_root_count.value)
        seen.setdefault(kind, set()).add(held)

    rig.machine.install(hook)
    assert kvm_mmu_notifier_clear_flush_young(rig.host, kvm, Hva(5), Hva(6))
    rig.machine.install(None)
    assert seen["sptes"] == seen["role"] == {Held(mmu_lock, True, references)}
    flushes = {Held(mmu_lock, False, references)} if mmu_lock else set()
    assert seen.get("requests", set()) == flushes
    assert ("mmu_lock" in seen) == bool(mmu_lock)
    assert rig.host.mmu_lock_held == rig.host.rcu_depth == 0


def test_ageing_goes_on_from_a_root_that_is_unlinked_meanwhile(rig: Rig) -> None:
    """The ager is at the root of SMM, the first in the list, when a vCPU that leaves it drops the last
    reference."""
    kvm = rig.vm(Policy(root_put="inline"))
    rig.smm_slots(kvm)
    guest = rig.guest(kvm)
    guest.write(0, 5)
    smm = kvm_tdp_mmu_alloc_root(rig.host, kvm, KvmMmuPageRole(smm=1))
    assert kvm.tdp_mmu_roots[0] is smm

    def put() -> None:
        with kvm.mmu_lock.read_lock(rig.other):
            kvm_tdp_mmu_put_root(rig.other, kvm, smm)

    with at_point(rig, rig.host.id, "role", "read", put):
        assert young(rig, kvm), "the next root was used"
    assert smm not in kvm.tdp_mmu_roots
    assert not young(rig, kvm)


@pytest.mark.parametrize(
    ("name", "aged"), [("linux-7.3", False), ("linux-6.12", True), ("linux-5.18", True), ("linux-5.14", True)]
)
def test_invalid_roots_are_aged_under_mmu_lock_alone(rig: Rig, name: str, aged: bool) -> None:
    kvm = rig.vm(preset(name))
    rig.guest(kvm).write(0, 5)
    kvm_mmu_zap_all_fast_front(rig.host, kvm)
    assert [root.role.invalid for root in kvm.tdp_mmu_roots] == [True]
    assert young(rig, kvm) is aged
    kvm_mmu_zap_all_fast_back(rig.host, kvm)
    assert rig.violations() == {}


def test_roots_are_walked_with_references_under_mmu_lock_alone(rig: Rig) -> None:
    """The last reference may be put in such a walk, which takes the root out of the list."""
    kvm = rig.vm()
    rig.guest(kvm).write(0, 5)
    with pytest.raises(AssertionError):
        list(for_each_tdp_mmu_root_yield_safe(rig.host, kvm, KVM_VALID_ROOTS))
    with pytest.raises(AssertionError):
        kvm_tdp_mmu_put_root(rig.host, kvm, kvm.tdp_mmu_roots[0])
    with kvm.mmu_lock.read_lock(rig.host):
        assert list(for_each_tdp_mmu_root_yield_safe(rig.host, kvm, KVM_VALID_ROOTS)) == [*kvm.tdp_mmu_roots]


def test_access_tracking_takes_permissions_and_a_fault_restores_them(rig: Rig) -> None:
    kvm = rig.vm(eptad=False)
    guest = rig.guest(kvm)
    guest.write(0, 5)
    young(rig, kvm)
    spte = spte_of(rig, guest, 5)
    assert is_access_track_spte(spte)
    assert is_shadow_present_pte(spte)
    assert not spte & 7
    other = rig.guest(kvm)  # another vCPU, on a pCPU without the translation
    other.read(1, 5)
    spte = spte_of(rig, guest, 5)
    assert not is_access_track_spte(spte)
    assert not is_writable_pte(spte)
    other.write(1, 5)
    assert is_writable_pte(spte_of(rig, guest, 5))
    assert rig.violations() == {}


def test_a_tracked_spte_is_zapped_and_flushed(rig: Rig) -> None:
    kvm = rig.vm(eptad=False)
    guest = rig.guest(kvm)
    guest.write(0, 5)
    young(rig, kvm)
    with rig.counting(kvm) as counts:
        rig.unmap(kvm, 0, 64)
    assert counts["remote_tlb_flush_requests"] == 1
    guest.read(0, 5)
    assert rig.violations() == {}


def log_after_aging(rig: Rig, policy: Policy) -> dict[str, int]:
    """All of the slot's SPTEs have lost W to aging, without a flush, when logging is armed."""
    kvm = rig.vm(policy, eptad=False)
    guest = rig.guest(kvm)
    guest.write(0, 5)
    young(rig, kvm)
    kvm_set_memory_region(rig.host, kvm, SLOT, Gfn(0), GFNS, Hva(0), KVM_MEM_LOG_DIRTY_PAGES)
    guest.write(0, 5)
    assert kvm_vm_ioctl_get_dirty_log(rig.host, kvm, SLOT)[0] == 1 << 5, "the oracle keeps memory right"
    return rig.violations()


def test_w_that_is_clear_proves_nothing(rig: Rig) -> None:
    """B7: logging is armed, and writes through the old translation go unnoticed."""
    assert set(log_after_aging(rig, preset("mutant:protect-flush-if-changed"))) >= set(
        MUTANTS["protect-flush-if-changed"].expected
    )


def test_arming_always_flushes(rig: Rig) -> None:
    assert log_after_aging(rig, preset("linux-7.3")) == {}


def test_with_a_d_bits_the_same_answer_is_right(rig: Rig) -> None:
    """With them aging leaves W alone, and some SPTE loses it when logging is armed."""
    kvm = rig.vm(preset("mutant:protect-flush-if-changed"))
    guest = rig.guest(kvm)
    guest.write(0, 5)
    young(rig, kvm)
    kvm_set_memory_region(rig.host, kvm, SLOT, Gfn(0), GFNS, Hva(0), KVM_MEM_LOG_DIRTY_PAGES)
    guest.write(0, 5)
    assert rig.violations() == {}
    assert rig.counter(lib.COUNT_ACCESSES) >= 2
