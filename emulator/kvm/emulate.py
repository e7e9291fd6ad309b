"""arch/x86/kvm/emulate.c and x86.c: a store to a guest's page table, all that KVM emulates here."""

from __future__ import annotations

from typing import Final

from emulator.kvm.mmu.fault import RET_PF_EMULATE, RET_PF_FIXED, RET_PF_RETRY
from emulator.kvm.mmu.guest_walk import paging_gva_to_gpa
from emulator.kvm.mmu.track_write import kvm_mmu_track_write, kvm_mmu_unprotect_gfn
from emulator.kvm.structs import Vcpu
from emulator.kvm.virt.guest_memory import kvm_write_guest_word
from emulator.kvm.virt.slots import gfn_to_memslot, mark_page_dirty_in_slot
from emulator.machine.runtime import Cpu, smp_mb
from native import ffi, lib
from native.types import Gfn, WordIndex

_WORD: Final = 8


def emulate_store(cpu: Cpu, vcpu: Vcpu, linear: int, error_code: int) -> int:
    """x86_emulate_instruction() of a store; return a RET_PF_ value.

    Store to memory first, then zap what shadows the entry (emulator_write_phys).  For an access that
    stores no word (a CPU sets an accessed flag), zap the pages that keep the table read-only, and retry.
    """
    kvm = vcpu.kvm
    value = ffi.new("uint64_t *")
    gpa = linear
    if not vcpu.mmu.root_role.direct:
        found = paging_gva_to_gpa(cpu, vcpu, linear, error_code & ~lib.PFERR_RSVD)
        if found is None:
            return RET_PF_RETRY  # the guest changed its tables: it will fault again
        gpa = found
    gfn, index = Gfn(gpa >> 12), (gpa & 0xFFF) // _WORD
    if not lib.guest_store_value(cpu.m, vcpu.id, value):
        kvm_mmu_unprotect_gfn(cpu, kvm, gfn)
        return RET_PF_RETRY
    slot = gfn_to_memslot(cpu, kvm, gfn, int(vcpu.arch.smm))
    if slot is None:
        return RET_PF_EMULATE
    if not kvm_write_guest_word(cpu, kvm, slot, gfn, WordIndex(index), value[0]):
        return RET_PF_RETRY
    mark_page_dirty_in_slot(cpu, slot, gfn)
    smp_mb(cpu)
    kvm_mmu_track_write(cpu, kvm, gpa & -_WORD, _WORD)
    lib.guest_store_done(cpu.m, vcpu.id)
    return RET_PF_FIXED
