"""Each invariant of the audit: the structures of a VM at work obey it, and damage to them is reported."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from emulator.audit import audited
from emulator.kvm.kvm_host import KVM_MEM_LOG_DIRTY_PAGES, KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS
from emulator.kvm.mmu.mmio import make_mmio_spte
from emulator.kvm.mmu.shadow_spte import mmu_spte_set
from emulator.kvm.mmu.shadow_structs import ShadowPage, Sptep
from emulator.kvm.mmu.spte import FROZEN_SPTE, SHADOW_HOST_WRITABLE_MASK, SHADOW_MMU_WRITABLE_MASK
from native import lib
from native.types import Gfn, Hfn, Hva, SpteIndex, WordIndex
from tests.emulator.kvm.rig import GFNS, Guest, Rig
from tests.emulator.kvm.shadow_rig import ShadowedGuest, shadowed_guest

LINEAR = 0x7F00_0000_0000


def found(guest: ShadowedGuest | Guest) -> str:
    return audited(guest.rig.machine, guest.rig.vms)


# --- the shadow MMU -----------------------------------------------------------------------------------------


@pytest.fixture
def shadowed(rig: Rig) -> Iterator[ShadowedGuest]:
    with shadowed_guest(rig) as guest:
        guest.map(LINEAR, 7)
        assert guest.fault(LINEAR, write=True) >= 0
        assert not found(guest)
        yield guest
        rig.vms.clear()  # KVM cannot destroy a VM that is damaged; the machine goes as a whole


def _root_twice(guest: ShadowedGuest) -> None:
    shadow, sp = guest.kvm.shadow, guest.root()
    table = Hfn(lib.shadow_page_alloc(guest.cpu.m, guest.cpu.id, lib.FRAME_TABLE))
    twin = ShadowPage(table, sp.role, sp.gfn, sp.mmu_valid_gen, lib.make_nonleaf_spte(guest.cpu.m, table))
    shadow.page_of[table] = twin
    shadow.active_mmu_pages[twin] = None
    shadow.mmu_page_hash[sp.gfn].append(twin)
    shadow.n_mmu_pages += 1


def _inactive(guest: ShadowedGuest) -> None:
    del guest.kvm.shadow.active_mmu_pages[guest.root()]


def _of_old_generation(guest: ShadowedGuest) -> None:
    guest.leaf(LINEAR).sp.mmu_valid_gen ^= 1


def _unsync_root(guest: ShadowedGuest) -> None:
    guest.root().unsync = True


def _without_memslot(guest: ShadowedGuest) -> None:
    sp = guest.leaf(LINEAR).sp
    chains = guest.kvm.shadow.mmu_page_hash
    chains[sp.gfn].remove(sp)
    sp.gfn = Gfn(GFNS)
    chains[sp.gfn] = [sp]


def _mmio(guest: ShadowedGuest) -> None:
    at = Sptep(guest.leaf(LINEAR).sp, SpteIndex(100))
    mmu_spte_set(guest.cpu, guest.kvm, at, Gfn(8), make_mmio_spte(guest.cpu, guest.kvm, 0, Gfn(8)))


def _changed(bits: int, *, to: int) -> Callable[[ShadowedGuest], None]:
    """Return a function that sets or clears bits of the leaf."""

    def change(guest: ShadowedGuest) -> None:
        sp, index = guest.leaf(LINEAR)
        spte = guest.spte(LINEAR)
        changed = spte & ~bits | (bits if to else 0)
        lib.shadow_mmu_set_spte(
            guest.cpu.m, guest.cpu.id, guest.kvm.id, sp.hfn, index, sp.role.level, Gfn(7), changed
        )

    return change


def _unmapped(guest: ShadowedGuest) -> None:
    lib.mm_unmap(guest.cpu.m, guest.rig.host.id, guest.kvm.id, Hva(7), Hva(8), True)


def _protected(guest: ShadowedGuest) -> None:
    lib.mm_protect(guest.cpu.m, guest.rig.host.id, guest.kvm.id, Hva(7), Hva(8), False)


def _unlogged(guest: ShadowedGuest) -> None:
    slot = guest.kvm.memslots[0].slots[0]
    slot.dirty_bitmap = bytearray(slot.npages)
    slot.flags |= KVM_MEM_LOG_DIRTY_PAGES


SHADOW = {
    "two pages of one gfn and role": (_root_twice, "2 shadow pages in use are of gfn "),
    "a page that is not active": (_inactive, "others are on the list of active ones"),
    "a page of an old generation": (_of_old_generation, "is in use, and of an old mmu_valid_gen"),
    "an upper page that is unsync": (_unsync_root, "is unsync, and shadows no table of level 1"),
    "a table without a memslot": (_without_memslot, "is in use, and its table is in no memslot"),
    "MMIO in a memslot": (_mmio, "is MMIO for gfn 0x8, which is in memslot 0"),
    "W without MMU-writable": (
        _changed(SHADOW_MMU_WRITABLE_MASK, to=0), "is writable, and not MMU-writable",
    ),
    "MMU-writable without host-writable": (
        _changed(SHADOW_HOST_WRITABLE_MASK, to=0), "is MMU-writable, and not host-writable",
    ),
    "an old custody": (
        _changed(1 << lib.SPTE_CUSTODY_SHIFT, to=1), "by a lookup that an invalidation has overtaken",
    ),
    "a page that the host has taken": (_unmapped, "maps gfn 0x7, and the host has no page there"),
    "a page that the host protects": (
        _protected, "lets the guest write to gfn 0x7, which the host has read-only",
    ),
    "a page that is not in the log": (_unlogged, "which is not marked in the dirty log"),
}  # fmt: skip


@pytest.mark.parametrize("name", SHADOW)
def test_the_audit_of_the_shadow_mmu_reports(name: str, shadowed: ShadowedGuest) -> None:
    damage, text = SHADOW[name]
    damage(shadowed)
    assert text in found(shadowed)


def test_an_mmio_spte_in_a_memslot_is_reported_of_a_stopped_run_too(shadowed: ShadowedGuest) -> None:
    _mmio(shadowed)
    text = audited(shadowed.rig.machine, shadowed.rig.vms, live=True)
    assert "is MMIO for gfn 0x8, which is in memslot 0" in text


def test_an_mmio_spte_counts_for_nothing_while_the_memslots_are_replaced(shadowed: ShadowedGuest) -> None:
    _mmio(shadowed)
    shadowed.kvm.memslots[0].generation |= KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS
    assert not found(shadowed)


def test_a_page_that_moved_is_reported(shadowed: ShadowedGuest) -> None:
    """The host has another frame for the page: it was freed, and populated again, without an mmu_notifier."""
    m, host, vm = shadowed.cpu.m, shadowed.rig.host, shadowed.kvm.id
    _unmapped(shadowed)
    for page in (9, 7):  # the frame that was freed last goes to the first
        assert not lib.mm_fault(m, host.id, vm, Hva(page), True, host.page)
    assert "maps gfn 0x7 to frame " in found(shadowed)


# --- the TDP MMU --------------------------------------------------------------------------------------------


@pytest.fixture
def mapped(rig: Rig) -> Iterator[Guest]:
    guest = rig.guest(rig.vm())
    guest.write(0, 7)
    guest.write(0, 0x207)
    assert not found(guest)
    yield guest
    rig.vms.clear()


def _entry(guest: Guest, gfn: int, level: int) -> tuple[Hfn, WordIndex, int]:
    """Return table, index and value of an entry on the way to a gfn."""
    cpu, (root,) = guest.rig.host, guest.rig.vms[0].tdp_mmu_roots
    lib.tdp_mmu_get_walk(cpu.m, root.hfn, root.role.level, Gfn(gfn), cpu.sptes, cpu.tables)
    return Hfn(cpu.tables[level]), WordIndex(gfn >> 9 * (level - 1) & 511), cpu.sptes[level]


def _store(guest: Guest, gfn: int, level: int, value: int) -> None:
    table, index, _ = _entry(guest, gfn, level)
    lib.frame_write(guest.rig.machine.m, table, index, value)


def _frozen(guest: Guest) -> None:
    _store(guest, 7, 1, FROZEN_SPTE)


def _junk(guest: Guest) -> None:
    _store(guest, 7, 1, 1 << lib.SPTE_MMU_WRITABLE_BIT)


def _linked_twice(guest: Guest) -> None:
    _store(guest, 7, 2, _entry(guest, 0x207, 2)[2])


def _freed(guest: Guest) -> None:
    m, host = guest.rig.machine.m, guest.rig.host
    table = _entry(guest, 7, 1)[0]
    lib.ept_table_free(m, host.id, table)


def _outside(guest: Guest) -> None:
    _store(guest, GFNS + 7, 1, 0)  # the walk ends above: gfn 0x1007 has no table
    _store(guest, GFNS, 2, _entry(guest, 7, 2)[2])
    _store(guest, 7, 2, 0)


def _lets_write(guest: Guest) -> None:
    lib.mm_protect(guest.rig.machine.m, guest.rig.host.id, guest.rig.vms[0].id, Hva(7), Hva(8), False)


TDP = {
    "a frozen SPTE": (_frozen, "is frozen, and no thread is changing the entry"),
    "an SPTE that means nothing": (_junk, "is neither present nor empty"),
    "a table with two links": (_linked_twice, "and so does another entry"),
    "a link to a free table": (_freed, "which is no table of this link any more"),
    "a leaf outside of the memslots": (_outside, "which is in no memslot"),
    "a page that the host protects": (_lets_write, "which the host has read-only"),
}


@pytest.mark.parametrize("name", TDP)
def test_the_audit_of_the_tdp_mmu_reports(name: str, mapped: Guest) -> None:
    damage, text = TDP[name]
    damage(mapped)
    assert text in found(mapped)


def test_an_audit_names_three_disagreements_at_most(mapped: Guest) -> None:
    m, host, vm = mapped.rig.machine.m, mapped.rig.host, mapped.rig.vms[0].id
    for gfn in range(0x10, 0x15):
        mapped.write(0, gfn)
    lib.mm_unmap(m, host.id, vm, Hva(0x10), Hva(0x15), True)
    assert found(mapped).count("the host has no page there") == 3
