"""A vCPU with a hypervisor as guest, which has an EPT for its own; see nested_ept.toml for its steps."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Final

from emulator.kvm.mmu.mmu import kvm_zap_gfn_range
from native import lib
from native.types import Gfn

from .nested import APIC_PAGES, L2_PAGES, OS_PAGES, SLOTS, NestedBench, guest_op, vmx

FIXTURE: Final = Path(__file__).with_name("nested_ept.toml")
# The page behind L2's linear page HOME, and one that it never uses (as 0 to 63).
HOME_GFN: Final = 0x11
UNUSED: Final = 300
# L1 resumes its guest after an exit for a page; in the recording that exit ends the round trip.
RESUMED: Final = Counter(["guest_mmu:same", "root_mmu:same", "L1:LOAD_MMU_PGD", "L2:LOAD_MMU_PGD"])


class NestedEptBench(NestedBench):
    """A VM of one vCPU or two, each with an L1 after VMXON that has its EPT in memory, and a nested guest.

    In the recordings user space writes the EPT, so that L1 has none of its pages mapped before its first
    store.  Here L1 writes it, and its pages are zapped.
    """

    def _boot_l1(self) -> None:
        super()._boot_l1()
        first, tables = SLOTS[1][0], self.l1.nested_os
        pages = [HOME_GFN, *APIC_PAGES, *range(tables, tables + OS_PAGES), *range(first, first + L2_PAGES)]
        self.execute(*(_map(page, page) for page in pages), _map(first + UNUSED, first + 100))
        self.step("forget")

    def besides(self, do: str) -> Counter[str]:
        if do == "touch-resumed":
            return RESUMED
        if do.startswith("delete"):
            # The vCPU enters after both requests; the recorded one entered between them.
            mode = "L2" if self.vcpu.arch.guest_mode else "L1"
            return Counter({f"{mode}:TLB_FLUSH": 1})
        return Counter()

    def _touch_resumed(self) -> None:
        self._touch()

    def _forget(self) -> None:
        """Zap the pages of L1's OS: L1 has none of its EPT's pages mapped, as before its first store."""
        first = self.l1.nested_os + OS_PAGES
        kvm_zap_gfn_range(self.rig.host, self.kvm, Gfn(first), Gfn(first + OS_PAGES))

    def _setup(self, vpid: str, *words: str) -> None:
        super()._setup(vpid, *(word for word in words if word == "apic"))
        self.execute(vmx("VMWRITE_EPTP", 0 if "no-ept" in words else 1))

    def _ept_map(self, page: str, to: str) -> None:
        first = SLOTS[1][0]
        self.execute(_map(first + int(page), first + int(to)))

    def _ept_protect(self, page: str) -> None:
        self.execute(guest_op("EPT12_PROTECT", SLOTS[1][0] + int(page), 0, 1 << 8))

    def _ept_unmap(self, page: str) -> None:
        self.execute(guest_op("EPT12_UNMAP", SLOTS[1][0] + int(page), 0, 1 << 8))

    def _ept_table(self) -> None:
        """Unlink the table, and link another one; L2 does not run in between."""
        first = SLOTS[1][0]
        again = (_map(page, page) for page in (*range(first, first + L2_PAGES), first + UNUSED))
        self.execute(guest_op("EPT12_UNMAP", first, 0, 1 << 8 | lib.GUEST_OP_HUGE), *again)

    def _invept(self, kind: str, number: str) -> None:
        self.execute(vmx("INVEPT", int(number), int(kind)))

    def _vmptrld(self, number: str) -> None:
        self.execute(vmx("VMPTRLD", int(number)))

    def _vmclear(self, number: str) -> None:
        self.execute(vmx("VMCLEAR", int(number)))

    def _vmxoff(self) -> None:
        self.execute(vmx("VMXOFF"))


def _map(page: int, gfn: int) -> dict[str, int]:
    return guest_op("EPT12_MAP", page, gfn, 1 << 8)
