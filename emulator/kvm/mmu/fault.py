"""arch/x86/kvm/mmu/mmu_internal.h: a page fault of a guest, and the results of handling one."""

from __future__ import annotations

from typing import Final

from emulator.kvm.kvm_host import KVM_MAX_HUGEPAGE_LEVEL, PG_LEVEL_4K
from emulator.kvm.mmu.spte import PfnAndRights, is_writable_pte
from emulator.kvm.structs import KvmMemorySlot
from native import lib
from native.types import NO_FRAME, Custody, Gfn, Hfn, HostWritable, InvalidateSeq

# enum { RET_PF_... } of mmu_internal.h
RET_PF_CONTINUE: Final = 0
RET_PF_RETRY: Final = 1
RET_PF_EMULATE: Final = 2
RET_PF_INVALID: Final = 3
RET_PF_FIXED: Final = 4
RET_PF_SPURIOUS: Final = 5
RET_PF_WRITE_PROTECTED: Final = 6
# RET_PF_RETRY in the kernel: the fault is the guest's own, and has been injected.
RET_PF_INJECTED: Final = 7
# The frame of a gfn that is in no memslot.
KVM_PFN_NOSLOT: Final = NO_FRAME
# Errors that KVM_RUN returns to user space.
EFAULT: Final = -14
ENOMEM: Final = -12

_NO_FRAME: Final = Hfn(0)


class KvmPageFault:
    """struct kvm_page_fault.

    addr: the address that the CPU could not translate, guest-physical with EPT and linear without.  gfn and
    slot: unless the MMU is direct, known only after the walk of the guest's tables.  is_tdp: the TDP MMU
    handles it.  error_code: that of the CPU's page fault; with EPT, ept_error_code() if guest_mmu handles it,
    else 0.  max_level: the largest page that the guest's tables permit.  write_protected: the gfn may not be
    mapped writable, because KVM must see the stores to it.  around_gfn, around_n: the neighbours that faultin
    looked up, in the arrays of the Cpu (fault-around).
    """

    __slots__ = (
        "addr",
        "around_gfn",
        "around_n",
        "error_code",
        "exec",
        "gfn",
        "goal_level",
        "is_tdp",
        "max_level",
        "mmu_seq",
        "pfn",
        "present",
        "rsvd",
        "slot",
        "write",
        "write_protected",
    )

    def __init__(
        self, addr: int, access: int, present: bool, error_code: int = 0, *, is_tdp: bool = True
    ) -> None:
        self.addr = addr
        self.gfn = Gfn(addr >> 12)
        self.error_code = error_code
        self.is_tdp = is_tdp
        self.max_level = KVM_MAX_HUGEPAGE_LEVEL
        self.write = access == lib.ACCESS_WRITE
        self.exec = access == lib.ACCESS_EXECUTE
        self.present = present
        self.rsvd = bool(error_code & lib.PFERR_RSVD)
        self.slot: KvmMemorySlot | None = None
        self.mmu_seq = InvalidateSeq(0)
        self.write_protected = False
        self.pfn = PfnAndRights(_NO_FRAME, Custody(0), host_writable=HostWritable(False))
        self.goal_level = PG_LEVEL_4K
        self.around_gfn = Gfn(0)
        self.around_n = 0


def spte_permission_fault(fault: KvmPageFault, spte: int) -> bool:
    """spte_permission_fault(), before 7.3 is_access_allowed(): return whether the SPTE forbids the access."""
    if fault.write:
        return not is_writable_pte(spte)
    if fault.exec:
        return not spte & lib.SPTE_EXECUTABLE
    return not spte & lib.SPTE_READABLE


def fault_around_range(fault: KvmPageFault, pages: int) -> tuple[Gfn, int]:
    """Return first gfn and length of the aligned window of `pages` around the fault, cut to its slot.

    `pages` is a power of two, so the window lies within one table.
    """
    slot = fault.slot
    assert slot is not None
    start = fault.gfn & -pages
    end = min(start + pages, slot.end_gfn)
    start = max(start, slot.base_gfn)
    return start, end - start
