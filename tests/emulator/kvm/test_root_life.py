"""The flushes of a root's life: as it is allocated, used again, invalidated, zapped and put."""

from __future__ import annotations

import pytest

from emulator.kvm.kvm_host import KVM_MEM_LOG_DIRTY_PAGES
from emulator.kvm.mmu.spte import root_to_sp
from emulator.kvm.mmu.structs import KvmMmuPageRole
from emulator.kvm.mmu.tdp_dirty import (
    kvm_tdp_mmu_clear_dirty_pt_masked,
    kvm_tdp_mmu_recover_huge_pages,
    kvm_tdp_mmu_write_protect_gfn,
)
from emulator.kvm.mmu.tdp_map import tdp_entry
from emulator.kvm.mmu.tdp_mmu import (
    kvm_tdp_mmu_unmap_gfn_range,
    kvm_tdp_mmu_zap_invalidated_roots,
    kvm_tdp_mmu_zap_leafs,
)
from emulator.kvm.mmu.tdp_roots import (
    flush_workqueue,
    kvm_tdp_mmu_alloc_root,
    kvm_tdp_mmu_invalidate_roots,
    kvm_tdp_mmu_put_root,
)
from emulator.kvm.virt.kvm_main import kvm_set_memory_region
from emulator.machine.runtime import Cpu, Mode, rcu_read_lock
from emulator.points import PointKind
from emulator.policy import Policy, preset
from native import lib
from native.types import Gfn, Hva, Level
from tests.emulator.kvm.rig import GFNS, SLOT, Rig, cr4_toggle, idle_pcpus, online, recreate_slot, scopes
from tests.support import CPU0, CPU1, CPU2


@pytest.mark.parametrize(("answer", "flushed"), [("none", 0), ("on-each-cpu", 3), ("vm-pcpu-mask", 2)])
def test_which_pcpus_a_new_root_flushes(rig: Rig, answer: str, flushed: int) -> None:
    """The VM has run on pCPUs 0 and 1."""
    kvm = rig.vm(Policy().with_settings({"root_alloc": answer}))
    guest = rig.guest(kvm)
    guest.read(0, 5)
    guest.read(1, 5)
    with idle_pcpus(rig, CPU0, CPU1, CPU2):
        before = scopes(rig)["invept_single"]
        root = kvm_tdp_mmu_alloc_root(rig.host, kvm, KvmMmuPageRole(smm=1))
        assert scopes(rig)["invept_single"] - before == flushed
        # Found, not allocated.
        assert kvm_tdp_mmu_alloc_root(rig.host, kvm, KvmMmuPageRole(smm=1)) is root
        assert scopes(rig)["invept_single"] - before == flushed
    for _ in range(2):
        with kvm.mmu_lock.read_lock(rig.host):
            kvm_tdp_mmu_put_root(rig.host, kvm, root)


def test_a_pcpu_that_allocates_a_root_flushes_itself_too(rig: Rig) -> None:
    kvm = rig.vm(Policy().with_settings({"root_alloc": "vm-pcpu-mask"}))
    guest = rig.guest(kvm)
    guest.read(0, 5)
    guest.read(1, 5)
    cpu = rig.machine.cpus[0]
    with idle_pcpus(rig, CPU1, CPU2), online(cpu):
        before = scopes(rig)["invept_single"]
        root = kvm_tdp_mmu_alloc_root(cpu, kvm, KvmMmuPageRole(smm=1))
        assert scopes(rig)["invept_single"] - before == 2
    with kvm.mmu_lock.read_lock(rig.host):
        kvm_tdp_mmu_put_root(rig.host, kvm, root)


def test_a_pcpu_that_joins_is_flushed(rig: Rig) -> None:
    kvm = rig.vm(preset("lkml-2025-vm-pcpu-mask"))
    guest = rig.guest(kvm)
    guest.read(0, 5)
    with rig.counting(kvm) as counts:
        guest.read(1, 5)
        guest.read(0, 5)
        guest.read(1, 5)
    assert counts["flush_all"] == 1


@pytest.mark.parametrize(
    ("answer", "faults"), [("sync-no-flush", 0), ("flush", 0), ("async", 2), ("inline", 2)]
)
def test_whether_a_role_change_costs_the_tree(rig: Rig, answer: str, faults: int) -> None:
    """Since 6.4 the TDP MMU holds a reference of its own (edbdb43fc96b)."""
    kvm = rig.vm(Policy().with_settings({"root_put": answer}))
    guest = rig.guest(kvm)
    guest.write(0, 5)
    guest.write(0, 70)
    with rig.counting(kvm) as counts:
        cr4_toggle(rig, guest)
        guest.write(0, 5)
    assert counts.get("faults", 0) == faults
    assert counts["mmu_load"] == 1
    flush_workqueue(rig.host, kvm)
    assert len(kvm.tdp_mmu_roots) == 1
    assert rig.violations() == {}


def test_the_worker_zaps_what_notifiers_still_find(rig: Rig) -> None:
    kvm = rig.vm(Policy().with_settings({"root_put": "async"}))
    guest = rig.guest(kvm)
    guest.write(0, 5)
    cr4_toggle(rig, guest)
    assert [root.role.invalid for root in kvm.tdp_mmu_roots] == [False, True]
    zapped = rig.counter(lib.COUNT_SPTES_ZAPPED)
    rig.unmap(kvm, 0, 64)
    assert rig.counter(lib.COUNT_SPTES_ZAPPED) - zapped == 2
    flush_workqueue(rig.host, kvm)
    assert len(kvm.tdp_mmu_roots) == 1


@pytest.mark.parametrize(
    ("answer", "flushed"), [("sync-no-flush", 0), ("flush", 1), ("async", 0), ("inline", 0)]
)
def test_what_a_deleted_slot_flushes(rig: Rig, answer: str, flushed: int) -> None:
    kvm = rig.vm(Policy().with_settings({"root_put": answer}))
    guest = rig.guest(kvm)
    guest.write(0, 5)
    with rig.counting(kvm) as counts:
        recreate_slot(rig, kvm)
        guest.write(0, 5)
    assert counts.get("remote_tlb_flush_requests", 0) == flushed
    assert rig.violations() == {}


@pytest.mark.parametrize(("answer", "flushed"), [("no-flush", 0), ("flush", 1)])
def test_whether_zapping_an_invalid_root_flushes(rig: Rig, answer: str, flushed: int) -> None:
    kvm = rig.vm(Policy().with_settings({"invalid_root_zap": answer}))
    guest = rig.guest(kvm)
    guest.write(0, 5)
    with rig.counting(kvm) as counts:
        recreate_slot(rig, kvm)
    assert counts.get("remote_tlb_flush_requests", 0) == flushed


def test_the_last_reference_to_a_valid_root_is_never_put(rig: Rig) -> None:
    kvm = rig.vm()
    root = kvm_tdp_mmu_alloc_root(rig.host, kvm, KvmMmuPageRole(smm=1))
    with kvm.mmu_lock.read_lock(rig.host):
        kvm_tdp_mmu_put_root(rig.host, kvm, root)
        with pytest.raises(AssertionError, match="KVM_BUG_ON"):
            kvm_tdp_mmu_put_root(rig.host, kvm, root)
        root.tdp_mmu_root_count.value = 1


@pytest.mark.parametrize(("answer", "types"), [("skip", "valid"), ("include", "all")])
def test_which_roots_zaps_and_write_protection_change(rig: Rig, answer: str, types: str) -> None:
    """A vCPU still holds an invalidated root that maps three pages.  mmu_notifiers take all types anyway."""
    kvm = rig.vm(Policy().with_settings({"invalid_roots": answer}))
    guest = rig.guest(kvm)
    for gfn in (5, 6, 7, 8):
        guest.write(0, gfn)
    cpu, slot, reason = rig.host, kvm.memslots[0].by_id[SLOT], lib.REASON_REMOTE_ZAP
    with kvm.mmu_lock.write_lock(cpu):
        kvm_tdp_mmu_invalidate_roots(cpu, kvm)
        flush = kvm_tdp_mmu_zap_leafs(cpu, kvm, Gfn(5), Gfn(6), flush=False, reason=reason)
        protected = kvm_tdp_mmu_write_protect_gfn(cpu, kvm, slot, Gfn(6), Level(1))
        cleared = kvm_tdp_mmu_clear_dirty_pt_masked(cpu, kvm, slot, Gfn(0), 1 << 7)
        unmapped = kvm_tdp_mmu_unmap_gfn_range(cpu, kvm, slot, Gfn(8), Gfn(9), flush=False, reason=reason)
    assert (flush, protected, cleared, unmapped) == (
        (True, True, 1, True) if types == "all" else (False, False, 0, False)
    )
    root = root_to_sp(guest.vcpu.mmu.root)
    assert root is not None
    with rcu_read_lock(cpu):
        assert not tdp_entry(cpu, root, Gfn(8), Level(1)).spte
        assert bool(tdp_entry(cpu, root, Gfn(5), Level(1)).spte) == (types == "valid")
    kvm_tdp_mmu_zap_invalidated_roots(cpu, kvm, shared=True)


@pytest.mark.parametrize(
    ("answer", "order"), [("flush-first", ["flush", "free"]), ("tables-first", ["free", "flush"])]
)
def test_whether_a_frozen_table_is_flushed_for_before_it_goes_to_rcu(
    rig: Rig, answer: str, order: list[str]
) -> None:
    """Logging ends: a table that was split becomes huge again, by zapping it."""
    kvm = rig.vm(Policy().with_settings({"frozen_zap": answer, "huge_recovery": "zap-each"}))
    guest = rig.guest(kvm)
    guest.write(0, 5)
    rig.collapse(kvm, 0)
    guest.write(0, 5)
    kvm_set_memory_region(rig.host, kvm, SLOT, Gfn(0), GFNS, Hva(0), KVM_MEM_LOG_DIRTY_PAGES)
    slot = kvm.memslots[0].by_id[SLOT]
    slot.flags = 0
    seen: list[str] = []

    def hook(cpu: Cpu, kind: PointKind, obj: object, mode: Mode) -> None:
        if kind in ("requests", "call_rcu"):
            seen.append("free" if kind == "call_rcu" else "flush")
            assert cpu.rcu_depth

    with kvm.mmu_lock.read_lock(rig.host):
        rig.machine.install(hook)
        kvm_tdp_mmu_recover_huge_pages(rig.host, kvm, slot)
        rig.machine.install(None)
    assert list(dict.fromkeys(seen)) == order
    assert rig.violations() == {}
