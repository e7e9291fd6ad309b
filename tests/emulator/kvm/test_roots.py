"""Roots: the cache of previous ones, references, obsolete roots, EPTPs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from emulator.kvm.kvm_host import KVM_REQ_LOAD_MMU_PGD, KVM_REQ_TLB_FLUSH_CURRENT
from emulator.kvm.mmu.fault import KvmPageFault
from emulator.kvm.mmu.roots import (
    cached_root_find_and_keep_current,
    cached_root_find_without_current,
    fast_pgd_switch,
    is_obsolete_root,
    is_root_usable,
    kvm_init_mmu,
    kvm_mmu_free_obsolete_roots,
    kvm_mmu_free_roots,
    kvm_mmu_new_pgd,
    kvm_mmu_unload,
)
from emulator.kvm.mmu.spte import root_to_sp
from emulator.kvm.mmu.structs import KvmMmu, KvmMmuPage, KvmMmuPageRole, KvmMmuRootInfo
from emulator.kvm.mmu.tdp_roots import kvm_tdp_mmu_alloc_root
from emulator.kvm.structs import Kvm, Vcpu
from emulator.kvm.virt.requests import kvm_test_request
from emulator.kvm.vmx.vmx import (
    construct_eptp,
    vmx_flush_tlb_current,
)
from emulator.machine.runtime import READ, WRITE, Cpu
from emulator.points import PointKind
from emulator.policy import Policy, preset
from native import lib
from native.types import Hfn, Level
from tests.emulator.kvm.rig import Rig, cr4_toggle, scopes

NORMAL, SMM = KvmMmuPageRole(), KvmMmuPageRole(smm=1)
FIVE, FIVE_SMM = KvmMmuPageRole(level=Level(5)), KvmMmuPageRole(level=Level(5), smm=1)
ROLES = (NORMAL, SMM, FIVE, FIVE_SMM)


def root_info(sp: KvmMmuPage, pgd: int = 0) -> KvmMmuRootInfo:
    return KvmMmuRootInfo(pgd=pgd, hfn=sp.hfn, sp=sp)


@contextmanager
def cache(rig: Rig, *roles: KvmMmuPageRole) -> Iterator[tuple[Kvm, KvmMmu]]:
    """Return an MMU with a current root and previous ones of these roles."""
    kvm = rig.vm()
    mmu = KvmMmu(NORMAL)
    roots = [root_info(kvm_tdp_mmu_alloc_root(rig.host, kvm, role)) for role in roles]
    mmu.root, mmu.prev_roots = roots[0], [*roots[1:], *[None] * (4 - len(roots))]
    yield kvm, mmu
    kvm_mmu_free_roots(rig.host, kvm, mmu, lambda root: True)


def order(mmu: KvmMmu) -> list[KvmMmuPageRole | None]:
    return [None if root is None or root.sp is None else root.sp.role for root in (mmu.root, *mmu.prev_roots)]


# --- the cache ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "after"),
    [
        (NORMAL, [NORMAL, SMM, FIVE, FIVE_SMM]),
        (SMM, [SMM, NORMAL, FIVE, FIVE_SMM]),
        (FIVE, [FIVE, NORMAL, SMM, FIVE_SMM]),
        (FIVE_SMM, [FIVE_SMM, NORMAL, SMM, FIVE]),
    ],
)
def test_a_cached_root_is_rotated_to_the_front(
    rig: Rig, wanted: KvmMmuPageRole, after: list[KvmMmuPageRole]
) -> None:
    with cache(rig, *ROLES) as (kvm, mmu):
        assert cached_root_find_and_keep_current(rig.host, kvm, mmu, 0, wanted)
        assert order(mmu) == after


def test_a_miss_frees_the_oldest(rig: Rig) -> None:
    with cache(rig, *ROLES) as (kvm, mmu):
        oldest = mmu.prev_roots[2]
        assert oldest is not None
        assert oldest.sp is not None
        missing = KvmMmuPageRole(guest_mode=True)
        assert not cached_root_find_and_keep_current(rig.host, kvm, mmu, 0, missing)
        assert order(mmu) == [None, NORMAL, SMM, FIVE]
        assert oldest.sp.tdp_mmu_root_count.value == 1  # the TDP MMU's own


@pytest.mark.parametrize(
    ("name", "how"), [("linux-7.3", READ), ("linux-6.12", READ), ("linux-5.18", WRITE), ("linux-5.14", WRITE)]
)
def test_roots_are_taken_and_dropped_under_mmu_lock_for_write_before_6_9(
    rig: Rig, name: str, how: int
) -> None:
    kvm = rig.vm(preset(name))
    guest = rig.guest(kvm)
    held: set[int] = set()

    def hook(at: Cpu, kind: PointKind, obj: object, mode: str) -> None:
        references = {id(root.tdp_mmu_root_count._lock) for root in kvm.tdp_mmu_roots}
        if kind == "tdp_mmu_roots" or (kind == "lock" and id(obj) in references):
            held.add(at.mmu_lock_held)

    rig.machine.install(hook)
    guest.write(0, 5)
    assert held == {how}, "a root was made"
    held.clear()
    rig.guest(kvm).write(1, 5)
    assert held == {how}, "it was found"
    held.clear()
    kvm_mmu_unload(rig.host, guest.vcpu)
    rig.machine.install(None)
    assert held == {how}, "a reference was dropped"
    guest.write(0, 5)
    assert rig.violations() == {}


def test_previous_roots_are_freed_before_the_current_one(rig: Rig) -> None:
    with cache(rig, *ROLES) as (kvm, mmu):
        current, *previous = (root.sp for root in (mmu.root, *mmu.prev_roots) if root is not None)
        put: list[object] = []

        def hook(at: Cpu, kind: PointKind, obj: object, mode: str) -> None:
            for sp in (current, *previous):
                if sp is not None and kind == "unlocking" and obj is sp.tdp_mmu_root_count._lock:
                    put.append(sp)

        rig.machine.install(hook)
        kvm_mmu_free_roots(rig.host, kvm, mmu, lambda root: True)
        rig.machine.install(None)
        assert put == [*previous, current]


@pytest.mark.parametrize(
    ("wanted", "after"),
    [
        (NORMAL, [NORMAL, SMM, FIVE, None]),
        (SMM, [SMM, NORMAL, FIVE, None]),
        (FIVE, [FIVE, NORMAL, SMM, None]),
        (FIVE_SMM, [None, NORMAL, SMM, FIVE]),
    ],
)
def test_without_a_current_root_the_gap_is_closed(
    rig: Rig, wanted: KvmMmuPageRole, after: list[KvmMmuPageRole | None]
) -> None:
    with cache(rig, NORMAL, SMM, FIVE) as (_, mmu):
        mmu.root, mmu.prev_roots = None, [mmu.root, *mmu.prev_roots[:2]]
        assert cached_root_find_without_current(mmu, 0, wanted) == (wanted in (NORMAL, SMM, FIVE))
        assert order(mmu) == after


def test_a_root_of_the_guests_tables_is_used_for_its_pgd_alone(rig: Rig) -> None:
    """A direct root stands for no table of the guest, and is used for all of them."""
    with cache(rig, NORMAL) as (_, mmu):
        assert mmu.root is not None
        assert mmu.root.pgd == 0
        assert is_root_usable(mmu.root, 0x7000, NORMAL)
    shadow = KvmMmuPageRole(direct=False)
    root = root_info(KvmMmuPage(Hfn(0x123), shadow, tdp_mmu_page=False), pgd=0x7000)
    assert not is_root_usable(root, 0x7000, NORMAL)
    cached = KvmMmu(shadow)
    cached.prev_roots[1] = root
    assert not cached_root_find_without_current(cached, 0x8000, shadow)
    assert cached_root_find_without_current(cached, 0x7000, shadow)
    assert order(cached) == [shadow, None, None, None]


def test_only_tdp_roots_are_put(rig: Rig) -> None:
    kvm = rig.vm()
    mmu = KvmMmu(NORMAL)
    mmu.root = root_info(KvmMmuPage(Hfn(0x123), NORMAL, tdp_mmu_page=False))
    with pytest.raises(AssertionError, match="is a root of no MMU"):
        kvm_mmu_free_roots(rig.host, kvm, mmu, lambda root: True)


def test_the_role_says_whether_a_nested_guest_runs(rig: Rig) -> None:
    vcpu = rig.guest(rig.vm()).vcpu
    kvm_init_mmu(vcpu)
    assert vcpu.root_mmu.root_role == NORMAL
    vcpu.arch.guest_mode = True
    kvm_init_mmu(vcpu)
    assert vcpu.root_mmu.root_role == KvmMmuPageRole(guest_mode=True)


def test_faults_are_the_current_mmus(rig: Rig) -> None:
    kvm = rig.vm()
    guest = rig.guest(kvm)
    handler, faults = guest.vcpu.mmu.page_fault, []
    assert handler is not None

    def page_fault(cpu: Cpu, vcpu: Vcpu, fault: KvmPageFault) -> int:
        faults.append(fault.gfn)
        return handler(cpu, vcpu, fault)

    guest.vcpu.mmu.page_fault = page_fault
    guest.write(0, 5)
    assert len(faults) == 1
    # A change of role chooses the handler anew.
    cr4_toggle(rig, guest)
    assert guest.vcpu.mmu.page_fault is handler
    guest.write(0, 70)
    assert len(faults) == 1
    assert rig.violations() == {}


def test_an_invalid_root_matches_no_role(rig: Rig) -> None:
    with cache(rig, NORMAL, SMM) as (kvm, mmu):
        smm = root_to_sp(mmu.prev_roots[0])
        assert smm is not None
        smm.role = KvmMmuPageRole(smm=1, invalid=True)
        assert not fast_pgd_switch(rig.host, kvm, mmu, 0, SMM)
        smm.role = SMM


def test_a_special_root_is_not_kept(rig: Rig) -> None:
    with cache(rig, NORMAL) as (kvm, mmu):
        mmu.root, mmu.prev_roots[0] = KvmMmuRootInfo(pgd=0, hfn=Hfn(0), sp=None), mmu.root
        assert fast_pgd_switch(rig.host, kvm, mmu, 0, NORMAL)
        assert order(mmu) == [NORMAL, None, None, None]


@pytest.mark.parametrize("answer", ["none", "flush-current"])
def test_what_is_requested_for_a_cached_root(rig: Rig, answer: str) -> None:
    kvm = rig.vm(Policy().with_settings({"cached_root": answer}))
    guest = rig.guest(kvm)
    guest.write(0, 5)
    cpu = rig.machine.cpus[0]
    kvm_mmu_new_pgd(cpu, guest.vcpu, 0)
    assert kvm_test_request(cpu, guest.vcpu, KVM_REQ_LOAD_MMU_PGD)
    assert kvm_test_request(cpu, guest.vcpu, KVM_REQ_TLB_FLUSH_CURRENT) == (answer == "flush-current")
    guest.read(0, 5)
    assert rig.violations() == {}


def test_a_root_that_was_switched_to_is_the_one_the_guest_uses(rig: Rig) -> None:
    kvm = rig.vm(Policy().with_settings({"role_change": "keep-roots"}))
    rig.smm_slots(kvm)
    guest = rig.guest(kvm)
    guest.write(0, 5)
    with rig.counting(kvm) as counts:
        for _ in range(3):
            guest.enter_smm(0, 70)
            guest.write(0, 5)
    # Only the first SMI loads a root.
    assert counts["mmu_load"] == 1
    rig.unmap(kvm, 0, 64)
    guest.enter_smm(0, 5)
    guest.read(0, 5)
    assert rig.violations() == {}


# --- obsolete roots and unloading ---------------------------------------------------------------------------


def test_obsolete_roots_of_both_mmus_go(rig: Rig) -> None:
    kvm = rig.vm()
    guest = rig.guest(kvm)
    guest.write(0, 5)
    vcpu = guest.vcpu
    root = kvm_tdp_mmu_alloc_root(rig.host, kvm, SMM)
    held = root_info(root)
    vcpu.guest_mmu.prev_roots[1] = held
    kvm_mmu_free_obsolete_roots(rig.host, vcpu)
    assert vcpu.guest_mmu.prev_roots == [None, held, None]
    root.invalidate()
    kvm_mmu_free_obsolete_roots(rig.host, vcpu)
    assert vcpu.guest_mmu.prev_roots == [None, None, None]
    assert vcpu.root_mmu.root is not None
    root.role = SMM
    vcpu.guest_mmu.root = root_info(kvm_tdp_mmu_alloc_root(rig.host, kvm, SMM))
    kvm_mmu_unload(rig.host, vcpu)
    assert [mmu.root for mmu in (vcpu.root_mmu, vcpu.guest_mmu)] == [None, None]


def test_active_roots_are_those_of_both_mmus(rig: Rig) -> None:
    kvm = rig.vm(preset("lkml-2025-active-roots"))
    guest = rig.guest(kvm)
    guest.write(0, 5)
    vcpu = guest.vcpu
    vcpu.guest_mmu.prev_roots[2] = root_info(kvm_tdp_mmu_alloc_root(rig.host, kvm, SMM))
    before = scopes(rig)["invept_single"]
    guest.write(1, 5)
    assert scopes(rig)["invept_single"] - before == 2


# --- EPTP ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("role", "walk"), [(NORMAL, 3), (FIVE, 4)])
def test_the_eptp_is_of_the_roots_role(role: KvmMmuPageRole, walk: int) -> None:
    page = KvmMmuPage(Hfn(0x123), role, tdp_mmu_page=True)
    sp, eptp = construct_eptp(root_info(page))
    assert sp is page
    assert eptp >> 12 == 0x123
    assert (eptp & 7, eptp >> 3 & 7, eptp >> 6 & 1) == (6, walk, 1)


def test_a_root_without_a_shadow_page_counts_as_obsolete(rig: Rig) -> None:
    assert is_obsolete_root(rig.vm(), KvmMmuRootInfo(pgd=0, hfn=Hfn(0), sp=None))


def test_without_a_root_there_is_nothing_to_flush(rig: Rig) -> None:
    kvm = rig.vm()
    guest = rig.guest(kvm)
    before = scopes(rig)["invept_single"]
    vmx_flush_tlb_current(rig.machine.cpus[0], guest.vcpu, lib.REASON_OTHER)
    assert scopes(rig)["invept_single"] == before
