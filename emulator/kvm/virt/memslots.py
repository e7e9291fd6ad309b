"""virt/kvm/kvm_main.c: memory slots.

The active set of slots is replaced whole and read under SRCU.  Deleting or moving a slot replaces the set
twice.  The first new set has an INVALID copy of the slot: faults on it retry, and mmu_notifiers still find
it.  Once everything mapped through the slot has been zapped, the final set follows.
"""

from __future__ import annotations

from emulator.kvm.kvm_host import (
    KVM_MAX_NR_ADDRESS_SPACES,
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS,
    KVM_MEMSLOT_INVALID,
)
from emulator.kvm.mmu.mmu import (
    kvm_arch_flush_shadow_memslot,
    kvm_dirty_log_manual_protect_and_init_set,
    kvm_mmu_invalidate_mmio_sptes,
    kvm_mmu_slot_apply_flags,
)
from emulator.kvm.structs import Kvm, KvmMemorySlot, KvmMemslots, tdp_enabled
from emulator.kvm.virt.requests import kvm_vcpu_kick
from emulator.machine.runtime import Cpu, wait_until
from native import lib
from native.types import NO_TICKET, Gfn, Hva

CREATE, DELETE, MOVE, FLAGS_ONLY = "create", "delete", "move", "flags-only"


def kvm_set_memory_region(
    cpu: Cpu,
    kvm: Kvm,
    slot_id: int,
    base_gfn: Gfn,
    npages: int,
    userspace_addr: Hva,
    flags: int = 0,
    as_id: int = 0,
) -> None:
    """KVM_SET_USER_MEMORY_REGION: create, delete, move a slot, or arm or disarm its dirty logging.

    npages 0 deletes; an existing slot with another base moves, one with other flags arms or disarms.
    userspace_addr is in pages.  as_id 1 is the address space of vCPUs in SMM.
    """
    with kvm.slots_lock.held(cpu):
        old = kvm.memslots[as_id].by_id.get(slot_id)
        if not npages:
            if old is None:
                raise ValueError(f"memslot {slot_id} does not exist")
            kvm_set_memslot(cpu, kvm, old, None, DELETE)
            return
        new = KvmMemorySlot(slot_id, as_id, base_gfn, npages, userspace_addr, flags)
        _check(kvm, old, new)
        if old is None:
            change = CREATE
        elif old.base_gfn != new.base_gfn:
            change = MOVE
        elif old.flags != new.flags:
            change = FLAGS_ONLY
            new.arch = old.arch
        else:
            return  # nothing to change
        kvm_prepare_memory_region(kvm, old, new, change)
        kvm_set_memslot(cpu, kvm, old, new, change)


def _check(kvm: Kvm, old: KvmMemorySlot | None, new: KvmMemorySlot) -> None:
    """Raise ValueError where kvm_set_memory_region() returns -EINVAL or -EEXIST."""
    if new.base_gfn < 0 or new.end_gfn > kvm.gfns:
        raise ValueError(f"{new!r} is beyond guest memory of {kvm.gfns:#x} pages")
    if new.flags & ~KVM_MEM_LOG_DIRTY_PAGES:
        raise ValueError(f"{new!r} has unknown flags")
    if old is not None and (old.npages, old.userspace_addr) != (new.npages, new.userspace_addr):
        raise ValueError(f"{old!r} cannot change its size or its memory")
    for other in kvm.memslots[new.as_id].slots:
        if other is not old and other.base_gfn < new.end_gfn and new.base_gfn < other.end_gfn:
            raise ValueError(f"{new!r} overlaps {other!r}")
    for other in kvm.memslots[1 - new.as_id].slots:
        overlaps = other.base_gfn < new.end_gfn and new.base_gfn < other.end_gfn
        if overlaps and other.gfn_to_hva(Gfn(0)) != new.gfn_to_hva(Gfn(0)):
            # The oracle's ledger has one frame for each gfn of a VM.
            raise ValueError(f"{new!r} and {other!r} of the other address space map gfns to different memory")


def _revoke(cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot) -> None:
    """Record the ioctl's promise that the guest no longer uses the slot's memory through its gfns.

    Revoke here, while mmu_notifiers still find the INVALID slot: once it is gone, the host may free its pages
    without notifying KVM.  Leave out the gfns at which the other address space still has the same memory.
    """
    start = slot.base_gfn
    for other in kvm.memslots[1 - slot.as_id].slots:
        if other.base_gfn < slot.end_gfn and start < other.end_gfn:
            _revoke_range(cpu, kvm, start, other.base_gfn)
            start = other.end_gfn
    _revoke_range(cpu, kvm, start, slot.end_gfn)


def _revoke_range(cpu: Cpu, kvm: Kvm, start: Gfn, end: Gfn) -> None:
    if start < end:
        lib.oracle_revoke(cpu.m, cpu.id, kvm.id, start, end, lib.PROMISE_MEMSLOT, NO_TICKET)


def kvm_prepare_memory_region(kvm: Kvm, old: KvmMemorySlot | None, new: KvmMemorySlot, change: str) -> None:
    """kvm_prepare_memory_region(): make the dirty bitmap, all set with KVM_DIRTY_LOG_INITIALLY_SET."""
    if not new.log_dirty_pages:
        new.dirty_bitmap = None
    elif old is not None and old.dirty_bitmap is not None:
        new.dirty_bitmap = old.dirty_bitmap
    else:
        fill = b"\x01" if kvm_dirty_log_manual_protect_and_init_set(kvm) else b"\x00"
        new.dirty_bitmap = bytearray(fill * new.npages)


def kvm_set_memslot(
    cpu: Cpu, kvm: Kvm, old: KvmMemorySlot | None, new: KvmMemorySlot | None, change: str
) -> None:
    """kvm_set_memslot(), under slots_lock."""
    if change in (DELETE, MOVE):
        assert old is not None
        kvm_invalidate_memslot(cpu, kvm, old)
    kvm_swap_active_memslots(cpu, kvm, old, new)
    if change == FLAGS_ONLY and old is not None and new is not None:
        kvm_mmu_slot_apply_flags(cpu, kvm, old, new)  # kvm_arch_commit_memory_region()


def kvm_invalidate_memslot(cpu: Cpu, kvm: Kvm, old: KvmMemorySlot) -> None:
    """kvm_invalidate_memslot(): activate the INVALID copy, then zap everything mapped through the slot."""
    invalid = KvmMemorySlot(
        old.id,
        old.as_id,
        old.base_gfn,
        old.npages,
        old.userspace_addr,
        old.flags | KVM_MEMSLOT_INVALID,
        old.dirty_bitmap,
        old.arch,
    )
    kvm_swap_active_memslots(cpu, kvm, old, invalid)
    kvm_arch_flush_shadow_memslot(cpu, kvm, old)
    _revoke(cpu, kvm, old)


def kvm_swap_active_memslots(
    cpu: Cpu, kvm: Kvm, old: KvmMemorySlot | None, new: KvmMemorySlot | None
) -> None:
    """kvm_swap_active_memslots(): replace `old` (by id) by `new`; on return no reader uses the former set.

    An mmu_notifier must find the same slots at its start and its end, so the set does not change in between:
    the invalidation in progress that ends last installs it.  (The kernel wakes the updater to install it.
    Here the updater would starve: a thread takes longer to wake than the pause between two invalidations.)
    """
    given = old if old is not None else new
    assert given is not None
    as_id = given.as_id
    before = kvm.memslots[as_id]
    slots = [slot for slot in before.slots if slot.id != given.id]
    if new is not None:
        slots.append(new)
    after = KvmMemslots(before.generation | KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS, tuple(slots))

    def install() -> None:
        cpu.point("memslots", kvm.id, "write")
        kvm.memslots[as_id] = after

    with kvm.slots_arch_lock.held(cpu):
        with kvm.mn_invalidate_lock.held(cpu):
            if kvm.mn_active_invalidate_count:
                cpu.stat(kvm.id, lib.STAT_SLOT_WAITS)
                kvm.mn_memslots_update = (install, cpu.id)
            else:
                install()
        wait_until(cpu, lambda: kvm.memslots[as_id] is after, "mn_active_invalidate_count")
    cpu.check(lib.synchronize_srcu(cpu.m, cpu.id, kvm.id))
    gen = before.generation + KVM_MAX_NR_ADDRESS_SPACES
    kvm_arch_memslots_updated(cpu, kvm, gen)
    if not tdp_enabled(kvm):
        cpu.point("memslots", kvm.id, "write")
    after.generation = gen


def kvm_arch_memslots_updated(cpu: Cpu, kvm: Kvm, gen: int) -> None:
    """kvm_arch_memslots_updated(): kick every vCPU once, with neither a request nor a flush."""
    kvm_mmu_invalidate_mmio_sptes(cpu, kvm, gen)
    for vcpu in kvm.vcpus:
        kvm_vcpu_kick(cpu, vcpu)
