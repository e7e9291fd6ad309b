"""include/linux/kvm_host.h and asm/kvm_host.h: request numbers, flags, and the states of a vCPU's run.

Request: bit number in the low byte, flags above it (Documentation/virt/kvm/vcpu-requests.rst).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from native import lib
from native.types import Level

OUTSIDE_GUEST_MODE: Final[int] = lib.OUTSIDE_GUEST_MODE
IN_GUEST_MODE: Final[int] = lib.IN_GUEST_MODE
EXITING_GUEST_MODE: Final[int] = lib.EXITING_GUEST_MODE
READING_SHADOW_PAGE_TABLES: Final[int] = lib.READING_SHADOW_PAGE_TABLES
VCPU_MODES: Final[Mapping[int, str]] = {
    OUTSIDE_GUEST_MODE: "OUTSIDE_GUEST_MODE",
    IN_GUEST_MODE: "IN_GUEST_MODE",
    EXITING_GUEST_MODE: "EXITING_GUEST_MODE",
    READING_SHADOW_PAGE_TABLES: "READING_SHADOW_PAGE_TABLES",
}

KVM_REQUEST_MASK: Final = 0xFF
KVM_REQUEST_NO_WAKEUP: Final = 1 << 8
KVM_REQUEST_WAIT: Final = 1 << 9
KVM_REQUEST_NO_ACTION: Final = 1 << 10
KVM_REQUEST_ARCH_BASE: Final = 8
_WAIT_NO_WAKEUP: Final = KVM_REQUEST_WAIT | KVM_REQUEST_NO_WAKEUP

KVM_REQ_TLB_FLUSH: Final = 0 | _WAIT_NO_WAKEUP
KVM_REQ_VM_DEAD: Final = 1 | _WAIT_NO_WAKEUP
KVM_REQ_OUTSIDE_GUEST_MODE: Final = KVM_REQUEST_NO_ACTION | _WAIT_NO_WAKEUP
KVM_REQ_MMU_SYNC: Final = KVM_REQUEST_ARCH_BASE + 3
KVM_REQ_LOAD_MMU_PGD: Final = KVM_REQUEST_ARCH_BASE + 5
KVM_REQ_EVENT: Final = KVM_REQUEST_ARCH_BASE + 6
KVM_REQ_SMI: Final = KVM_REQUEST_ARCH_BASE + 12
KVM_REQ_APIC_PAGE_RELOAD: Final = (KVM_REQUEST_ARCH_BASE + 17) | _WAIT_NO_WAKEUP
KVM_REQ_TLB_FLUSH_CURRENT: Final = KVM_REQUEST_ARCH_BASE + 26
KVM_REQ_TLB_FLUSH_GUEST: Final = (KVM_REQUEST_ARCH_BASE + 27) | _WAIT_NO_WAKEUP
KVM_REQ_MMU_FREE_OBSOLETE_ROOTS: Final = (KVM_REQUEST_ARCH_BASE + 31) | _WAIT_NO_WAKEUP

# Flags of a memory slot.
KVM_MEM_LOG_DIRTY_PAGES: Final = 1 << 0
KVM_MEMSLOT_INVALID: Final = 1 << 16
# In the generation of memslots that are being replaced.
KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS: Final = 1 << 63
KVM_MAX_NR_ADDRESS_SPACES: Final = 2

# KVM's private memslot for the APIC-access page; its id is the first above those of user space's slots.
APIC_ACCESS_PAGE_PRIVATE_MEMSLOT: Final = 32764

# Modes of a local APIC (lapic.h).
LAPIC_MODE_DISABLED: Final = "disabled"
LAPIC_MODE_XAPIC: Final = "xapic"
LAPIC_MODE_X2APIC: Final = "x2apic"

# KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2
KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE: Final = 1 << 0
KVM_DIRTY_LOG_INITIALLY_SET: Final = 1 << 1

KVM_MMU_NUM_PREV_ROOTS: Final = 3

# Control registers (SDM vol. 3A, 2.5).
X86_CR0_PE: Final[int] = 1 << lib.X86_CR0_PE_BIT
X86_CR0_WP: Final[int] = 1 << lib.X86_CR0_WP_BIT
X86_CR0_PG: Final[int] = 1 << lib.X86_CR0_PG_BIT
INVPCID_TYPE_INDIV_ADDR: Final = 0
INVPCID_TYPE_SINGLE_CTXT: Final = 1
X86_CR3_PCID_MASK: Final = 0xFFF
X86_CR3_PCID_NOFLUSH: Final = 1 << 63
X86_CR4_PSE: Final = 1 << 4
X86_CR4_PAE: Final[int] = 1 << lib.X86_CR4_PAE_BIT
X86_CR4_PGE: Final[int] = 1 << lib.X86_CR4_PGE_BIT
X86_CR4_LA57: Final = 1 << 12
X86_CR4_PCIDE: Final[int] = 1 << lib.X86_CR4_PCIDE_BIT
X86_CR4_SMEP: Final = 1 << 20
X86_CR4_SMAP: Final = 1 << 21
X86_CR4_PKE: Final = 1 << 22
EFER_LME: Final = 1 << 8
EFER_LMA: Final = 1 << 10
EFER_NX: Final = 1 << 11
# The bits that are part of a role (mmu.h: KVM_MMU_CR0_ROLE_BITS, KVM_MMU_CR4_ROLE_BITS).
KVM_MMU_CR0_ROLE_BITS: Final = X86_CR0_PG | X86_CR0_WP
KVM_MMU_CR4_ROLE_BITS: Final = (
    X86_CR4_PSE | X86_CR4_PAE | X86_CR4_LA57 | X86_CR4_SMEP | X86_CR4_SMAP | X86_CR4_PKE
)
KVM_MMU_EFER_ROLE_BITS: Final = EFER_LME | EFER_NX
# The bits of which a change reads the PDPTEs anew in PAE mode (regs.h); CR0.CD and CR0.NW are not modelled.
X86_CR0_PDPTR_BITS: Final = X86_CR0_PG
X86_CR4_PDPTR_BITS: Final = X86_CR4_PGE | X86_CR4_PSE | X86_CR4_PAE | X86_CR4_SMEP

PG_LEVEL_4K: Final[Level] = lib.PG_LEVEL_4K
PG_LEVEL_2M: Final[Level] = lib.PG_LEVEL_2M
PG_LEVEL_1G: Final[Level] = lib.PG_LEVEL_1G
PG_LEVEL_512G: Final[Level] = lib.PG_LEVEL_512G
PG_LEVEL_256T: Final = Level(5)
# A table page has 512 entries (spte.h).
SPTE_LEVEL_BITS: Final = 9
SPTE_ENT_PER_PAGE: Final = 1 << SPTE_LEVEL_BITS
KVM_MAX_HUGEPAGE_LEVEL: Final = PG_LEVEL_2M  # the arena has blocks of 2M, none of 1G


def kvm_pages_per_hpage(level: Level) -> int:
    """KVM_PAGES_PER_HPAGE()"""
    return 1 << (SPTE_LEVEL_BITS * (level - 1))


@dataclass(frozen=True, slots=True)
class RunState:
    """A reason for which `vcpu_run` yields instead of going on by itself."""

    name: str

    def __repr__(self) -> str:
        return self.name


# Not started: send it the Cpu that it starts on.
READY: Final = RunState("READY")
# Between servicing requests and disabling interrupts: may be moved, resumes where it was.  Holds SRCU.
PREEMPTIBLE: Final = RunState("PREEMPTIBLE")
# After an exit, before the next entry (xfer_to_guest_mode_handle_work): holds nothing.
RESCHED: Final = RunState("RESCHED")
# HLT: not runnable until it is woken (kvm_vcpu_block).  Holds nothing.
HALTED: Final = RunState("HALTED")


@dataclass(frozen=True, slots=True)
class ExitToUser:
    """KVM_RUN returned to user space; the vCPU is not loaded.  Resuming it calls KVM_RUN again.

    mmio: `gpa` belongs to no memslot; resuming means that user space has emulated the access.
    io: the guest executed OUT; resuming means that user space has emulated it.
    fault: KVM_EXIT_MEMORY_FAULT, the host does not permit the access at present; resuming retries.
    no-memory: neither a frame nor a table page is left; resuming retries.
    intr: immediate_exit was set.
    shutdown: triple fault, or the VM is dead; do not resume.
    """

    reason: str
    gpa: int = 0
    write: bool = False


RunYield = RunState | ExitToUser
