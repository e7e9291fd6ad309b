"""Page faults that race a change of their SPTE, or meet a root that may be obsolete."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from emulator.kvm.kvm_host import KVM_MEM_LOG_DIRTY_PAGES, KVM_REQ_MMU_FREE_OBSOLETE_ROOTS
from emulator.kvm.mmu.fault import RET_PF_FIXED, RET_PF_INVALID, RET_PF_SPURIOUS, KvmPageFault
from emulator.kvm.mmu.page_fault import (
    fast_page_fault,
    is_page_fault_stale,
    kvm_mmu_page_fault,
    kvm_tdp_page_fault,
)
from emulator.kvm.mmu.spte import PfnAndRights, is_writable_pte, root_to_sp
from emulator.kvm.mmu.structs import KvmMmuPage, KvmMmuPageRole, KvmMmuRootInfo
from emulator.kvm.mmu.tdp_map import kvm_tdp_mmu_map, tdp_entry
from emulator.kvm.mmu.tdp_remove import tdp_mmu_set_spte
from emulator.kvm.structs import Vcpu
from emulator.kvm.virt.kvm_main import kvm_set_memory_region
from emulator.kvm.virt.requests import kvm_check_request, kvm_make_request
from emulator.kvm.virt.slots import gfn_to_memslot
from emulator.machine.runtime import Cpu, rcu_read_lock
from emulator.points import PointKind
from emulator.policy import Policy, preset
from native import lib
from native.types import Custody, Gfn, Hfn, HostWritable, Hva, Level
from tests.emulator.kvm.rig import GFNS, SLOT, Guest, Rig

GFN = 5
TRIES = 5
PF_STATS = ("faults", "pf_fast", "pf_spurious", "pf_emulate")


def written(rig: Rig, policy: Policy | None = None) -> Guest:
    """A guest whose page is write-protected for a dirty log."""
    kvm = rig.vm(policy)
    guest = rig.guest(kvm)
    guest.write(0, GFN)
    kvm_set_memory_region(rig.host, kvm, SLOT, Gfn(0), GFNS, Hva(0), KVM_MEM_LOG_DIRTY_PAGES)
    return guest


def write_fault(rig: Rig, vcpu: Vcpu) -> KvmPageFault:
    fault = KvmPageFault(GFN << 12, lib.ACCESS_WRITE, present=True)
    fault.slot = gfn_to_memslot(rig.host, vcpu.kvm, Gfn(GFN), 0)
    return fault


def spte_of(rig: Rig, vcpu: Vcpu) -> int:
    root = root_to_sp(vcpu.mmu.root)
    assert root is not None
    with rcu_read_lock(rig.host):
        return tdp_entry(rig.host, root, Gfn(GFN), Level(1)).spte


def toggle_accessed(rig: Rig, vcpu: Vcpu) -> None:
    """Change the SPTE as ageing and a walk do."""
    root = root_to_sp(vcpu.mmu.root)
    assert root is not None
    with rcu_read_lock(rig.other):
        entry = tdp_entry(rig.other, root, Gfn(GFN), Level(1))
        tdp_mmu_set_spte(rig.other, vcpu.kvm, entry, entry.spte ^ lib.SPTE_ACCESSED)


def fast_with_changes(rig: Rig, guest: Guest, times: int, change: Callable[[], None]) -> tuple[int, int]:
    """Return the result of the fault, and how often it tried; `change` precedes the first `times` tries."""
    tries = 0

    def hook(at: Cpu, kind: PointKind, obj: object, mode: str) -> None:
        nonlocal tries
        if at is rig.host and (kind, mode) == ("spte", "write"):
            tries += 1
            if tries <= times:
                change()

    rig.machine.install(hook)
    result = fast_page_fault(rig.host, guest.vcpu, write_fault(rig, guest.vcpu))
    rig.machine.install(None)
    return result, tries


@pytest.mark.parametrize("lost", range(TRIES))
def test_the_fast_path_reads_an_spte_again_that_changed(rig: Rig, lost: int) -> None:
    guest = written(rig)
    result = fast_with_changes(rig, guest, lost, lambda: toggle_accessed(rig, guest.vcpu))
    assert result == (RET_PF_FIXED, lost + 1)
    assert is_writable_pte(spte_of(rig, guest.vcpu))
    assert rig.stats(guest.vcpu.kvm)["pf_fast"] == 1
    slot = gfn_to_memslot(rig.host, guest.vcpu.kvm, Gfn(GFN), 0)
    assert slot is not None
    assert slot.dirty_bitmap is not None
    assert sum(slot.dirty_bitmap) == slot.dirty_bitmap[GFN] == 1, "the page is marked"
    assert rig.violations() == {}


def test_the_slow_path_follows_the_last_try(rig: Rig) -> None:
    guest = written(rig)
    vcpu, tries, locked_after = guest.vcpu, 0, list[int]()

    def change() -> None:
        toggle_accessed(rig, vcpu)

    assert fast_with_changes(rig, guest, TRIES, change) == (RET_PF_INVALID, TRIES)
    assert not is_writable_pte(spte_of(rig, vcpu))

    def hook(at: Cpu, kind: PointKind, obj: object, mode: str) -> None:
        nonlocal tries
        tries += kind == "spte"
        if kind == "spte" and tries <= TRIES:
            change()
        elif (kind, mode) == ("mmu_lock", "read"):
            locked_after.append(tries)

    rig.host.hook = hook
    assert kvm_tdp_page_fault(rig.host, vcpu, write_fault(rig, vcpu)) == RET_PF_FIXED
    rig.host.hook = None
    assert locked_after[0] == TRIES
    assert is_writable_pte(spte_of(rig, vcpu))
    assert rig.stats(vcpu.kvm)["pf_fast"] == 0
    assert rig.violations() == {}


def test_another_vcpus_fault_makes_this_one_spurious(rig: Rig) -> None:
    """The second try finds that the access is permitted by now."""
    guest = written(rig)
    other = rig.guest(guest.vcpu.kvm)
    other.read(1, GFN)

    def fixes() -> None:
        hook = rig.host.hook
        rig.machine.install(None)
        assert fast_page_fault(rig.other, other.vcpu, write_fault(rig, other.vcpu)) == RET_PF_FIXED
        rig.machine.install(hook)

    assert fast_with_changes(rig, guest, 1, fixes) == (RET_PF_SPURIOUS, 1)


def test_each_page_fault_is_counted_by_what_became_of_it(rig: Rig) -> None:
    guest = written(rig)
    vcpu = guest.vcpu
    kvm = vcpu.kvm

    def write() -> int:
        return kvm_mmu_page_fault(rig.host, vcpu, GFN << 12, lib.ACCESS_WRITE, present=True)

    with rig.counting(kvm) as changed:
        assert write() == RET_PF_FIXED
    assert [changed.get(name, 0) for name in PF_STATS] == [1, 1, 0, 0]
    with rig.counting(kvm) as changed:
        assert write() == RET_PF_SPURIOUS
    assert [changed.get(name, 0) for name in PF_STATS] == [0, 1, 1, 0]


@pytest.mark.parametrize("invalidated", [False, True])
@pytest.mark.parametrize("requested", [False, True])
@pytest.mark.parametrize("root", ["valid", "obsolete", "without a shadow page"])
def test_a_fault_is_stale(rig: Rig, root: str, requested: bool, invalidated: bool) -> None:
    """A root with a shadow page says itself whether it is obsolete; for others, a pending request says that
    it may be."""
    vcpu = written(rig).vcpu
    fault, kept = write_fault(rig, vcpu), vcpu.mmu.root
    fault.mmu_seq = lib.mmu_invalidate_seq(rig.machine.m, vcpu.kvm.id)
    obsolete = KvmMmuPage(Hfn(0x123), KvmMmuPageRole(invalid=True), tdp_mmu_page=True)
    if root != "valid":
        sp = obsolete if root == "obsolete" else None
        vcpu.mmu.root = KvmMmuRootInfo(pgd=0, hfn=obsolete.hfn, sp=sp)
    if requested:
        kvm_make_request(rig.host, vcpu, KVM_REQ_MMU_FREE_OBSOLETE_ROOTS)
    if invalidated:
        rig.unmap(vcpu.kvm, GFN, GFN + 1)
    may_be_obsolete = root == "obsolete" or (root != "valid" and requested)
    with vcpu.kvm.mmu_lock.read_lock(rig.host):
        assert is_page_fault_stale(rig.host, vcpu, fault) == (may_be_obsolete or invalidated)
    assert kvm_check_request(rig.host, vcpu, KVM_REQ_MMU_FREE_OBSOLETE_ROOTS) == requested, "still pending"
    vcpu.mmu.root = kept


@pytest.mark.parametrize(
    ("policy", "returned", "writable", "dirty"),
    [("linux-7.3", RET_PF_SPURIOUS, False, True), ("linux-6.12", RET_PF_FIXED, True, True)],
)
def test_a_fault_on_a_leaf_that_permits_the_access(
    rig: Rig, policy: str, returned: int, writable: bool, dirty: bool
) -> None:
    """Read on the slow path a page that dirty logging has write-protected: before 6.13 it has W again."""
    guest = written(rig, preset(policy))
    assert slow_read(rig, guest.vcpu) == returned
    spte = spte_of(rig, guest.vcpu)
    assert (is_writable_pte(spte), bool(spte & lib.SPTE_DIRTY)) == (writable, dirty)


def test_a_leaf_that_is_made_anew_loses_its_dirty_flag_before_6_13(rig: Rig) -> None:
    guest = rig.guest(rig.vm(preset("linux-6.12")))
    guest.write(0, GFN)
    before = spte_of(rig, guest.vcpu)
    assert slow_read(rig, guest.vcpu) == RET_PF_FIXED
    assert spte_of(rig, guest.vcpu) == before & ~lib.SPTE_DIRTY
    # Then nothing changes any more.
    assert slow_read(rig, guest.vcpu) == RET_PF_SPURIOUS


def test_without_accessed_and_dirty_flags_a_leaf_stays_the_same(rig: Rig) -> None:
    guest = rig.guest(rig.vm(preset("linux-6.12"), eptad=False))
    guest.write(0, GFN)
    before = spte_of(rig, guest.vcpu)
    assert slow_read(rig, guest.vcpu) == RET_PF_SPURIOUS
    assert spte_of(rig, guest.vcpu) == before


def slow_read(rig: Rig, vcpu: Vcpu) -> int:
    """Do the part of a read fault under mmu_lock, for the frame that the SPTE has."""
    spte = spte_of(rig, vcpu)
    fault = KvmPageFault(GFN << 12, lib.ACCESS_READ, present=False)
    fault.slot = gfn_to_memslot(rig.host, vcpu.kvm, Gfn(GFN), 0)
    custody = spte >> lib.SPTE_CUSTODY_SHIFT & lib.FRAME_TAG_MASK
    fault.pfn = PfnAndRights(
        Hfn(spte >> lib.SPTE_HFN_SHIFT & 0xFFFFFF), Custody(custody), host_writable=HostWritable(True)
    )
    with vcpu.kvm.mmu_lock.read_lock(rig.host):
        return kvm_tdp_mmu_map(rig.host, vcpu, fault)
