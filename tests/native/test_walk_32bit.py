"""Two-dimensional walks of 32-bit tables: two levels of 4-byte entries, and PAE paging."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from native import ffi, lib
from native.types import AccessKind, Gva, Hfn, VcpuId, VmId, WordIndex
from tests.native.hypervisor import READ, WRITE, Hypervisor
from tests.support import CPU0

P, W, U, A, D, PS = 1, 2, 4, 0x20, 0x40, 0x80
TOP, DIRECTORY, LAST, PAGE, OTHER = 1, 2, 3, 5, 6
LINEAR = 0xC030_1000  # the fourth GiB; of 4 MiB the second half


class Guest:
    """A guest whose tables the test writes."""

    def __init__(self, machine: Hypervisor) -> None:
        self.machine = machine
        self.vm: VmId = machine.vm()
        self.vcpu: VcpuId = machine.vcpu(self.vm, 1, paging=1, pcid=0)
        machine.process(self.vcpu, [READ << 62 | LINEAR], [])
        self.cr3(TOP)

    def cr3(self, gfn: int) -> None:
        lib.guest_share_tables(self.machine.m, self.vcpu, gfn)

    def frame(self, gfn: int) -> Hfn:
        if not self.machine.leaf(CPU0, self.vm, gfn, create=True)[2]:
            self.machine.map(CPU0, self.vm, gfn)
        return Hfn(self.machine.leaf(CPU0, self.vm, gfn, create=False)[2] >> 12 & 0xFFFFFF)

    def word(self, gfn: int, index: int) -> int:
        return int(lib.frame_read(self.machine.m, self.frame(gfn), WordIndex(index)))

    def write(self, gfn: int, index: int, entry: int) -> None:
        lib.frame_write(self.machine.m, self.frame(gfn), WordIndex(index), entry)

    def write32(self, gfn: int, index: int, entry: int) -> None:
        shift = index % 2 * 32
        word = self.word(gfn, index // 2) & ~(0xFFFFFFFF << shift)
        self.write(gfn, index // 2, word | entry << shift)

    def read32(self, gfn: int, index: int) -> int:
        return self.word(gfn, index // 2) >> index % 2 * 32 & 0xFFFFFFFF

    def store(self, linear: int) -> None:
        self.machine.access(CPU0, self.vcpu, linear, WRITE)

    def faults(self, linear: int) -> bool:
        """Return whether the guest gets a page fault, which its OS cannot handle."""
        self.machine.enter(CPU0, self.vcpu)
        reason = lib.guest_access(
            self.machine.m, CPU0, self.vcpu, Gva(linear), AccessKind(READ), self.machine.exit
        )
        return reason == lib.EXIT_TRIPLE_FAULT

    def stored(self, gfn: int, linear: int) -> bool:
        """Return whether the frame of the gfn holds something else than poison there."""
        return self.word(gfn, (linear & 0xFFF) // 8) != 0


@pytest.fixture
def guest() -> Iterator[Guest]:
    with Hypervisor() as machine:
        guest = Guest(machine)
        for gfn in (TOP, DIRECTORY, LAST, PAGE, OTHER):
            for index in range(512):
                guest.write(gfn, index, 0)
        yield guest
        assert machine.violations() == {}


def test_two_levels_of_4_byte_entries(guest: Guest) -> None:
    lib.vcpu_set_tables(guest.machine.m, guest.vcpu, lib.GUEST_TABLES_32)
    last = LINEAR >> 12 & 1023
    # Without CR4.PSE bit 7 means nothing.
    guest.write32(TOP, LINEAR >> 22, LAST << 12 | P | W | U | PS)
    guest.write32(LAST, last, PAGE << 12 | P | W | U)
    guest.write32(LAST, last + 1, OTHER << 12 | P | W | U)
    guest.store(LINEAR + 8)
    assert guest.stored(PAGE, LINEAR + 8)
    assert guest.read32(TOP, LINEAR >> 22) & (A | D) == A
    assert guest.read32(LAST, last) == PAGE << 12 | P | W | U | A | D
    assert guest.read32(LAST, last + 1) == OTHER << 12 | P | W | U
    guest.store(LINEAR + 0x1010)
    assert guest.stored(OTHER, LINEAR + 0x1010)
    # The first half of the 4 MiB has entries of its own, which are not present.
    assert guest.faults(LINEAR - (1 << 21))


def test_a_page_of_4_mebibytes(guest: Guest) -> None:
    lib.vcpu_set_tables(guest.machine.m, guest.vcpu, lib.GUEST_TABLES_32_PSE)
    guest.write32(TOP, 3, P | W | U | PS)
    for gfn in (PAGE, OTHER, 512 + PAGE):
        guest.store(3 << 22 | gfn << 12)
        assert guest.stored(gfn, 0)
    assert guest.read32(TOP, 3) == P | W | U | PS | A | D


def test_pae_paging_begins_with_registers(guest: Guest) -> None:
    lib.vcpu_set_tables(guest.machine.m, guest.vcpu, lib.GUEST_TABLES_PAE)
    lib.vcpu_set_pdptrs(guest.machine.m, guest.vcpu, ffi.new("uint64_t[]", [0, 0, 0, DIRECTORY << 12 | P]))
    guest.write(DIRECTORY, LINEAR >> 21 & 511, LAST << 12 | P | W | U)
    guest.write(LAST, LINEAR >> 12 & 511, PAGE << 12 | P | W | U)
    guest.store(LINEAR)
    assert guest.stored(PAGE, LINEAR)
    assert guest.word(LAST, LINEAR >> 12 & 511) == PAGE << 12 | P | W | U | A | D
    assert guest.faults(LINEAR - (1 << 30))


def test_mov_to_cr3_loads_the_pdptes(guest: Guest) -> None:
    """They are read from memory then, and at no other time; and the old translations are gone."""
    lib.vcpu_set_tables(guest.machine.m, guest.vcpu, lib.GUEST_TABLES_PAE)
    guest.write(DIRECTORY, LINEAR >> 21 & 511, LAST << 12 | P | W | U)
    guest.write(LAST, LINEAR >> 12 & 511, PAGE << 12 | P | W | U)
    # The PDPT is 32 bytes at any place of a page.
    guest.write(TOP, 4 + 3, DIRECTORY << 12 | P)
    assert guest.faults(LINEAR)
    for present in (True, False):
        assert lib.guest_execute(guest.machine.m, guest.vcpu, lib.GUEST_INSN_MOV_CR3, TOP << 12 | 32) == 0
        guest.machine.enter(CPU0, guest.vcpu)
        reason = lib.guest_run(guest.machine.m, CPU0, guest.vcpu, 1, guest.machine.exit)
        assert reason == (lib.EXIT_PREEMPTION_TIMER if present else lib.EXIT_TRIPLE_FAULT)
        assert lib.guest_executed(guest.machine.m, guest.vcpu)
        guest.write(TOP, 4 + 3, 0)
        if present:
            guest.store(LINEAR)
