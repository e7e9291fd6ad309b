"""virt/kvm/kvm_main.c: KVM's own accesses to guest memory, through the memslots and user space's mappings.

They fault pages in and break copy-on-write.  The guest's CPUs access the same bytes meanwhile.
"""

from __future__ import annotations

from emulator.kvm.structs import Kvm, KvmMemorySlot
from emulator.machine.runtime import Cpu
from native import ffi, lib
from native.types import Gfn, Hva, WordIndex


def kvm_is_visible_memslot(slot: KvmMemorySlot | None) -> bool:
    """kvm_is_visible_memslot()"""
    return slot is not None and not slot.invalid


def _fault_in(cpu: Cpu, kvm: Kvm, hva: Hva, *, write: bool) -> bool:
    """Make the page present, and writable if `write`, as a fault of the kernel on user memory does.

    Return False if the host does not permit it, or has no frame.
    """
    cpu.point("mm", (kvm.id, hva), "read")
    rc = lib.mm_fault(cpu.m, cpu.id, kvm.id, hva, write, cpu.page)
    if rc == lib.MACHINE_AGAIN and cpu.page.cow:
        return kvm.mm is not None and kvm.mm.wp_page_copy(cpu, hva)
    return not rc


def kvm_read_guest_word(cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot, gfn: Gfn, index: WordIndex) -> int | None:
    """get_user() (arch/x86/include/asm/uaccess.h): read the 64-bit word `index` of a page, faulting it in;
    None: the host has none.

    No spinning lock may be held, because faults sleep.
    """
    value = ffi.new("uint64_t *")
    hva = slot.gfn_to_hva(gfn)
    while True:
        cpu.point("guest-memory", (kvm.id, gfn), "read")
        if not lib.mm_read_word(cpu.m, cpu.id, kvm.id, hva, index, value):
            return int(value[0])
        if not _fault_in(cpu, kvm, hva, write=False):
            return None


def kvm_read_guest_word_atomic(
    cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot, gfn: Gfn, index: WordIndex
) -> int | None:
    """kvm_vcpu_read_guest_atomic(): read the 64-bit word `index` of a page; None: it is not present.

    Any lock may be held.
    """
    value = ffi.new("uint64_t *")
    cpu.point("guest-memory", (kvm.id, gfn), "read")
    rc = lib.mm_read_word(cpu.m, cpu.id, kvm.id, slot.gfn_to_hva(gfn), index, value)
    return None if rc else int(value[0])


def kvm_write_guest_word(
    cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot, gfn: Gfn, index: WordIndex, value: int
) -> bool:
    """kvm_vcpu_write_guest(): store one word; return False if the host does not permit it."""
    hva = slot.gfn_to_hva(gfn)
    while True:
        cpu.point("guest-memory", (kvm.id, gfn), "write")
        if not lib.mm_write_word(cpu.m, cpu.id, kvm.id, hva, index, value):
            return True
        if not _fault_in(cpu, kvm, hva, write=True):
            return False


def kvm_cmpxchg_guest_word(
    cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot, gfn: Gfn, index: WordIndex, old: int, new: int
) -> bool | None:
    """__try_cmpxchg_user(): replace `old` by `new`; return whether it was `old`, None if the host forbids
    it."""
    expected = ffi.new("uint64_t *")
    hva = slot.gfn_to_hva(gfn)
    while True:
        expected[0] = old
        cpu.point("guest-memory", (kvm.id, gfn), "write")
        rc = lib.mm_cmpxchg_word(cpu.m, cpu.id, kvm.id, hva, index, expected, new)
        if rc in (0, 1):
            return rc == 0
        if not _fault_in(cpu, kvm, hva, write=True):
            return None


# --- entries of 4 or 8 bytes --------------------------------------------------------------------------------


def _in_word(index: int, nbytes: int) -> tuple[WordIndex, int, int]:
    """Return the word that entry `index` is in, its shift in the word, and its mask."""
    word, at = divmod(index * nbytes, 8)
    return WordIndex(word), at * 8, (1 << nbytes * 8) - 1


def kvm_read_guest_entry(
    cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot, gfn: Gfn, index: int, nbytes: int
) -> int | None:
    """Read an entry of `nbytes` as kvm_read_guest_word does."""
    word, shift, mask = _in_word(index, nbytes)
    value = kvm_read_guest_word(cpu, kvm, slot, gfn, word)
    return None if value is None else value >> shift & mask


def kvm_read_guest_entry_atomic(
    cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot, gfn: Gfn, index: int, nbytes: int
) -> int | None:
    """Read an entry of `nbytes` as kvm_read_guest_word_atomic does."""
    word, shift, mask = _in_word(index, nbytes)
    value = kvm_read_guest_word_atomic(cpu, kvm, slot, gfn, word)
    return None if value is None else value >> shift & mask


def kvm_cmpxchg_guest_entry(
    cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot, gfn: Gfn, index: int, nbytes: int, old: int, new: int
) -> bool | None:
    """Replace an entry of `nbytes` as kvm_cmpxchg_guest_word does.

    A word of which the other half changes in between is tried again, because a compare-and-swap of 4 bytes
    would succeed then.
    """
    if nbytes == 8:
        return kvm_cmpxchg_guest_word(cpu, kvm, slot, gfn, WordIndex(index), old, new)
    word, shift, mask = _in_word(index, nbytes)
    while True:
        value = kvm_read_guest_word(cpu, kvm, slot, gfn, word)
        if value is None:
            return None
        if value >> shift & mask != old:
            return False
        other = value & ~(mask << shift)
        swapped = kvm_cmpxchg_guest_word(cpu, kvm, slot, gfn, word, value, other | new << shift)
        if swapped is not False:
            return swapped
