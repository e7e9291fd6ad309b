"""arch/x86/kvm/mmu/spte.c, mmu.c: MMIO SPTEs, by which the shadow MMU remembers that a gfn is in no memslot.

Such an SPTE is not present, and its access faults with PFERR_RSVD, so that KVM emulates the access without a
walk of the guest's tables.  It holds the generation of the memslots; after an update of these it counts no
more.  (The access rights that the kernel keeps in it serve its cache of one MMIO address per vCPU, which is
not modelled.  With EPT each access to such a gfn is looked up anew.)
"""

from __future__ import annotations

from typing import Final

from emulator.kvm.kvm_host import KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS
from emulator.kvm.mmu.fault import RET_PF_EMULATE, RET_PF_INVALID, RET_PF_RETRY
from emulator.kvm.mmu.lockless import for_each_shadow_entry_lockless, walk_shadow_page_lockless
from emulator.kvm.mmu.shadow_spte import (
    SHADOW_NONPRESENT_VALUE,
    is_mmio_spte,
    mmu_spte_clear_no_track,
    mmu_spte_set,
    spte_of,
)
from emulator.kvm.mmu.shadow_structs import Sptep
from emulator.kvm.structs import Kvm, Vcpu, tdp_enabled
from emulator.kvm.virt.slots import kvm_memslots
from emulator.machine.runtime import Cpu
from native import lib
from native.types import Gfn

# Bits 50:36 and 59:57 of the SPTE; the kernel has them elsewhere.
MMIO_SPTE_GEN_LOW_BITS: Final = 15
MMIO_SPTE_GEN_HIGH_BITS: Final = 3
MMIO_SPTE_GEN_MASK: Final = (1 << MMIO_SPTE_GEN_LOW_BITS + MMIO_SPTE_GEN_HIGH_BITS) - 1
_LOW_SHIFT: Final[int] = lib.SPTE_CUSTODY_SHIFT
_LOW_MASK: Final = (1 << MMIO_SPTE_GEN_LOW_BITS) - 1
_HIGH_SHIFT: Final[int] = lib.SPTE_HOST_WRITABLE_BIT
_HIGH_MASK: Final = (1 << MMIO_SPTE_GEN_HIGH_BITS) - 1
# A bit that the kernel has not: a sync has given the SPTE its generation (sync_mmio_spte).
_RENEWED: Final = 1 << 60
_GFN_SHIFT: Final[int] = lib.SPTE_HFN_SHIFT
_GFN_MASK: Final = (1 << _LOW_SHIFT - _GFN_SHIFT) - 1


def make_mmio_spte(cpu: Cpu, kvm: Kvm, as_id: int, gfn: Gfn) -> int:
    """make_mmio_spte(): return the SPTE of the gfn for the present generation of the memslots."""
    gen = kvm_memslots(cpu, kvm, as_id).generation & MMIO_SPTE_GEN_MASK
    high = gen >> MMIO_SPTE_GEN_LOW_BITS
    return 1 << lib.SPTE_MMIO_BIT | gfn << _GFN_SHIFT | (gen & _LOW_MASK) << _LOW_SHIFT | high << _HIGH_SHIFT


def get_mmio_spte_generation(spte: int) -> int:
    """get_mmio_spte_generation()"""
    high = spte >> _HIGH_SHIFT & _HIGH_MASK
    return (spte >> _LOW_SHIFT & _LOW_MASK) | high << MMIO_SPTE_GEN_LOW_BITS


def get_mmio_spte_gfn(spte: int) -> int:
    """get_mmio_spte_gfn()"""
    return spte >> _GFN_SHIFT & _GFN_MASK


def is_renewed_mmio_spte(spte: int) -> bool:
    """Return whether the SPTE has its generation from a sync, which has looked for no memslot."""
    return bool(spte & _RENEWED)


def check_mmio_spte(cpu: Cpu, vcpu: Vcpu, spte: int) -> bool:
    """check_mmio_spte(): return whether the memslots are those for which the SPTE was made.

    While they are being replaced, none counts.
    """
    gen = kvm_memslots(cpu, vcpu.kvm, int(vcpu.arch.smm)).generation
    if gen & KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS:
        return False
    return gen & MMIO_SPTE_GEN_MASK == get_mmio_spte_generation(spte)


def mark_mmio_spte(cpu: Cpu, kvm: Kvm, sptep: Sptep, gfn: Gfn) -> None:
    """mark_mmio_spte(): make an MMIO SPTE, but none with EPT, where each access is looked up anew."""
    if not tdp_enabled(kvm):
        mmu_spte_set(cpu, kvm, sptep, gfn, make_mmio_spte(cpu, kvm, sptep.sp.role.smm, gfn))


def sync_mmio_spte(cpu: Cpu, kvm: Kvm, sptep: Sptep, gfn: Gfn) -> bool:
    """sync_mmio_spte(): make an MMIO SPTE agree with the guest's entry; return whether it is one.

    As in Linux 7.3, an SPTE of an old generation counts again afterwards, although a memslot may have come to
    its gfn since.  Such an SPTE is marked.
    """
    spte = spte_of(cpu, sptep)
    if not is_mmio_spte(spte):
        return False
    if gfn != get_mmio_spte_gfn(spte):
        mmu_spte_clear_no_track(cpu, kvm, sptep)
        return True
    new_spte = make_mmio_spte(cpu, kvm, sptep.sp.role.smm, gfn)
    if is_renewed_mmio_spte(spte) or get_mmio_spte_generation(spte) != get_mmio_spte_generation(new_spte):
        new_spte |= _RENEWED
    mmu_spte_set(cpu, kvm, sptep, gfn, new_spte)
    return True


def handle_mmio_page_fault(cpu: Cpu, vcpu: Vcpu, addr: int) -> int:
    """handle_mmio_page_fault(): return RET_PF_EMULATE if the last SPTE for the address is an MMIO SPTE that
    counts.

    RET_PF_INVALID: it is of an older generation, so that the fault looks for a memslot.  RET_PF_RETRY: it has
    been zapped since.
    """
    last = SHADOW_NONPRESENT_VALUE
    with walk_shadow_page_lockless(cpu, vcpu):
        for entry in for_each_shadow_entry_lockless(cpu, vcpu, addr):
            last = entry.spte
    if not is_mmio_spte(last):
        return RET_PF_RETRY
    return RET_PF_EMULATE if check_mmio_spte(cpu, vcpu, last) else RET_PF_INVALID
