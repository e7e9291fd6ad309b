"""virt/kvm/kvm_main.c: KVM_GET_DIRTY_LOG and KVM_CLEAR_DIRTY_LOG.

Bitmaps are lists of 64-bit words, one bit per page of the slot.  Reaping clears a page's mark first and then
write-protects the page, so that a later write faults and marks it again.  Until the flush, a vCPU can still
write through a writable translation in its TLB; user space reads the pages after the flush.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from emulator.kvm.bitops import for_each_set_bit
from emulator.kvm.kvm_host import KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE
from emulator.kvm.mmu.mmu import kvm_arch_mmu_enable_log_dirty_pt_masked, write_protect_flush
from emulator.kvm.structs import Kvm, KvmMemorySlot
from emulator.machine.runtime import Cpu
from native import lib

_WORD = 64


def kvm_vm_ioctl_enable_manual_dirty_log(
    cpu: Cpu, kvm: Kvm, flags: int = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE
) -> None:
    """Enable KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, before dirty logging is armed for any slot.

    With INITIALLY_SET, arming write-protects nothing and all pages start dirty.
    """
    if flags & KVM_DIRTY_LOG_INITIALLY_SET and not flags & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE:
        raise ValueError("INITIALLY_SET needs MANUAL_PROTECT_ENABLE")
    with kvm.slots_lock.held(cpu):
        kvm.dirty_log_manual = flags


def _logged_slot(kvm: Kvm, slot_id: int, as_id: int) -> tuple[KvmMemorySlot, bytearray]:
    slot = kvm.memslots[as_id].by_id.get(slot_id)
    if slot is None or slot.dirty_bitmap is None:
        raise ValueError(f"memslot {slot_id} has no dirty log")
    return slot, slot.dirty_bitmap


def _word(bitmap: bytearray, offset: int) -> int:
    """Return the marks of 64 pages as bits."""
    word = 0
    at = bitmap.find(1, offset, offset + _WORD)
    while at >= 0:
        word |= 1 << (at - offset)
        at = bitmap.find(1, at + 1, offset + _WORD)
    return word


def _words(
    cpu: Cpu, slot: KvmMemorySlot, bitmap: bytearray, offsets: Iterable[int]
) -> Iterator[tuple[int, int]]:
    """Yield the marks word by word.  vCPUs may mark pages meanwhile, because fast_page_fault() takes no
    mmu_lock."""
    looked = False
    for offset in offsets:
        if not looked:
            cpu.point("dirty_bitmap", (slot.as_id, slot.id), "read")
        word = _word(bitmap, offset)
        # The caller's changes for a word that is not empty are steps, so the next read needs a point.
        looked = not word
        yield offset, word


def _clear(cpu: Cpu, slot: KvmMemorySlot, bitmap: bytearray, offset: int, mask: int) -> None:
    """Clear marks that were read as set: xchg() or atomic_long_fetch_andnot()
    (include/linux/atomic/atomic-instrumented.h) of a bitmap word."""
    cpu.point("dirty_bitmap", (slot.as_id, slot.id), "write")
    for bit in for_each_set_bit(mask):
        bitmap[offset + bit] = 0


def _reap(cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot, bitmap: bytearray, offset: int, mask: int) -> int:
    """Clear the marks, then write-protect the pages; return how many SPTEs lost W.

    A write between the two steps leaves no mark, but user space copies the page later, and the write with it.
    """
    _clear(cpu, slot, bitmap, offset, mask)
    return kvm_arch_mmu_enable_log_dirty_pt_masked(cpu, kvm, slot, offset, mask)


def kvm_vm_ioctl_get_dirty_log(cpu: Cpu, kvm: Kvm, slot_id: int, as_id: int = 0) -> list[int]:
    """kvm_get_dirty_log_protect(): return the pages written since the last call.

    Without manual protect they are write-protected again.  With it they stay dirty and writable until
    KVM_CLEAR_DIRTY_LOG, so this call makes no promise about later writes.
    """
    with kvm.slots_lock.held(cpu):
        slot, bitmap = _logged_slot(kvm, slot_id, as_id)
        if kvm.dirty_log_manual:
            return [word for _, word in _words(cpu, slot, bitmap, range(0, slot.npages, _WORD))]
        words, changed = [], 0
        with kvm.mmu_lock.write_lock(cpu):
            for offset, mask in _words(cpu, slot, bitmap, range(0, slot.npages, _WORD)):
                words.append(mask)
                if mask:
                    changed += _reap(cpu, kvm, slot, bitmap, offset, mask)
        _flush_and_promise(cpu, kvm, slot, 0, words, changed)
        return words


def kvm_vm_ioctl_clear_dirty_log(
    cpu: Cpu,
    kvm: Kvm,
    slot_id: int,
    first_page: int,
    num_pages: int,
    words: list[int],
    as_id: int = 0,
) -> None:
    """kvm_clear_dirty_log_protect(): clean and write-protect the dirty pages among those set in `words`.

    Bit 0 of the first word is first_page, a multiple of 64.
    """
    with kvm.slots_lock.held(cpu):
        slot, bitmap = _logged_slot(kvm, slot_id, as_id)
        end = first_page + num_pages
        if first_page % _WORD or end > slot.npages or (num_pages % _WORD and end != slot.npages):
            raise ValueError(f"pages {first_page}+{num_pages} of {slot!r} are not whole words")
        reaped, changed = [], 0
        with kvm.mmu_lock.write_lock(cpu):
            offsets = range(first_page, end, _WORD)
            for wanted, (offset, dirty) in zip(words, _words(cpu, slot, bitmap, offsets), strict=True):
                mask = wanted & dirty
                reaped.append(mask)
                if mask:
                    changed += _reap(cpu, kvm, slot, bitmap, offset, mask)
        _flush_and_promise(cpu, kvm, slot, first_page, reaped, changed)


def _flush_and_promise(
    cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot, first_page: int, words: list[int], changed: int
) -> None:
    """Flush once for the slot, without mmu_lock, iff a page was reaped; then user space may read."""
    if not any(words):
        return
    ticket = lib.oracle_ticket(cpu.m, kvm.id)
    write_protect_flush(cpu, kvm, slot, changed > 0)
    for i, mask in enumerate(words):
        if mask:
            base = slot.base_gfn + first_page + i * _WORD
            lib.oracle_revoke_mask(cpu.m, cpu.id, kvm.id, base, mask, lib.PROMISE_DIRTY_LOG, ticket)
