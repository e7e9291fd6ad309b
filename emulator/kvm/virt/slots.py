"""virt/kvm/kvm_main.c: looking up memory slots, and their dirty marks.  Slots change in memslots.py."""

from __future__ import annotations

from emulator.kvm.structs import Kvm, KvmMemorySlot, KvmMemslots
from emulator.machine.runtime import Cpu
from native.types import Gfn


def kvm_memslots(cpu: Cpu, kvm: Kvm, as_id: int = 0) -> KvmMemslots:
    """__kvm_memslots(), under SRCU or slots_lock: what kvm_swap_active_memslots() has made current."""
    cpu.point("memslots", kvm.id, "read")
    return kvm.memslots[as_id]


def gfn_to_memslot(cpu: Cpu, kvm: Kvm, gfn: Gfn, as_id: int = 0) -> KvmMemorySlot | None:
    """gfn_to_memslot(), under SRCU or slots_lock."""
    return kvm_memslots(cpu, kvm, as_id).search(gfn)


def mark_page_dirty_in_slot(cpu: Cpu, slot: KvmMemorySlot, gfn: Gfn) -> None:
    """mark_page_dirty_in_slot()"""
    bitmap = slot.dirty_bitmap
    if bitmap is not None:
        cpu.point("dirty_bitmap", (slot.as_id, slot.id), "write")
        bitmap[gfn - slot.base_gfn] = 1
