"""The page tables of the recorded guests: 2 MiB pages that map each address to itself.

All vCPUs of a VM use the same ones, so that without EPT they share KVM's shadow pages and their root.
"""

from __future__ import annotations

from emulator.kvm.structs import Kvm
from emulator.kvm.virt.guest_memory import kvm_write_guest_word
from emulator.kvm.virt.slots import gfn_to_memslot
from emulator.machine.runtime import Cpu
from native.types import Gfn, WordIndex

# The PML4 table of the first address space; two more follow, for guests that write another CR3.
FIRST = 2
SPACES = (FIRST, 0x50, 0x58)
GIGABYTES = 2
ENTRIES = 512

_PRESENT, _WRITABLE, _USER, _PAGE_SIZE = 1 << 0, 1 << 1, 1 << 2, 1 << 7
_TABLE = _PRESENT | _WRITABLE | _USER


# The page directories of a guest with 32-bit paging, of which each entry maps 4 MiB.  Those of the other
# address spaces follow on the guest's code (program.py), with which a fault maps them: writable, until they
# are in use.
SPACES_32 = (0x14, 0x11, 0x12)


def write_tables_32(cpu: Cpu, kvm: Kvm) -> None:
    """Write the page directories of all address spaces of a guest with 32-bit paging."""
    for directory in SPACES_32:
        for word in range(ENTRIES):
            first, second = ((2 * word + i) * 2 * ENTRIES << 12 | _TABLE | _PAGE_SIZE for i in range(2))
            _write(cpu, kvm, directory, word, first | second << 32)


def write_tables(cpu: Cpu, kvm: Kvm) -> None:
    """Write the tables of all address spaces, with accessed and dirty flags clear."""
    for pml4 in SPACES:
        _write(cpu, kvm, pml4, 0, (pml4 + 1) << 12 | _TABLE)
        for gigabyte in range(GIGABYTES):
            directory = pml4 + 2 + gigabyte
            _write(cpu, kvm, pml4 + 1, gigabyte, directory << 12 | _TABLE)
            for index in range(ENTRIES):
                page = (gigabyte * ENTRIES + index) * ENTRIES
                _write(cpu, kvm, directory, index, page << 12 | _TABLE | _PAGE_SIZE)


def entry_of(gfn: int, level: int) -> tuple[int, int]:
    """Return the first address space's table of that level, and the index in it, for a gfn."""
    gigabyte, index = divmod(gfn // ENTRIES, ENTRIES)
    return {4: (FIRST, 0), 3: (FIRST + 1, gigabyte), 2: (FIRST + 2 + gigabyte, index)}[level]


def _write(cpu: Cpu, kvm: Kvm, table: int, index: int, entry: int) -> None:
    slot = gfn_to_memslot(cpu, kvm, Gfn(table))
    assert slot is not None
    assert kvm_write_guest_word(cpu, kvm, slot, Gfn(table), WordIndex(index), entry)
