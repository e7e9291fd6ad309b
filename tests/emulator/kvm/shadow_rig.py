"""A guest whose tables KVM shadows, without hardware: tests write its tables, and fault in its place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from emulator.kvm.kvm_host import KVM_REQ_MMU_SYNC, SPTE_ENT_PER_PAGE
from emulator.kvm.mmu.page_fault import kvm_mmu_page_fault
from emulator.kvm.mmu.roots import kvm_mmu_reload
from emulator.kvm.mmu.shadow_map import shadow_walk
from emulator.kvm.mmu.shadow_spte import spte_of
from emulator.kvm.mmu.shadow_structs import ShadowPage, Sptep
from emulator.kvm.mmu.sync import kvm_mmu_sync_roots
from emulator.kvm.structs import Kvm, Vcpu
from emulator.kvm.virt.guest_memory import kvm_read_guest_word, kvm_write_guest_word
from emulator.kvm.virt.kvm_main import kvm_vm_ioctl_create_vcpu
from emulator.kvm.virt.requests import kvm_check_request
from emulator.kvm.virt.slots import gfn_to_memslot
from emulator.machine.runtime import Cpu
from native import lib
from native.types import Gfn, WordIndex
from tests.emulator.kvm.rig import Rig, online

P, W, U, A, D, PS = 1, 2, 4, 0x20, 0x40, 0x80
TABLE = P | W | U | A
PAGE = P | W | U | A | D


class ShadowedGuest:
    """A vCPU on pCPU 0 with a top table in gfn `pml4`; tables are taken from `next_table` upwards."""

    def __init__(self, rig: Rig, kvm: Kvm, pml4: int = 100) -> None:
        self.rig, self.kvm = rig, kvm
        self.cpu: Cpu = rig.machine.cpus[0]
        self.vcpu: Vcpu = kvm_vm_ioctl_create_vcpu(rig.host, kvm)
        self.next_table = pml4 + 1
        self.vcpu.arch.cr3 = pml4 << 12

    def write(self, table: int, index: int, value: int) -> None:
        """Store to a table, as the guest does where KVM lets it: unseen."""
        slot = gfn_to_memslot(self.cpu, self.kvm, Gfn(table))
        assert slot is not None
        assert kvm_write_guest_word(self.cpu, self.kvm, slot, Gfn(table), WordIndex(index), value)

    def entry(self, table: int, index: int) -> int:
        slot = gfn_to_memslot(self.cpu, self.kvm, Gfn(table))
        assert slot is not None
        value = kvm_read_guest_word(self.cpu, self.kvm, slot, Gfn(table), WordIndex(index))
        assert value is not None
        return value

    def map(self, linear: int, gfn: int, flags: int = PAGE, *, level: int = 1) -> int:
        """Write the entries that map a page; return the gfn of the last table."""
        table = self.vcpu.arch.cr3 >> 12
        for at in range(4, level, -1):
            index = self.index(linear, at)
            if not self.entry(table, index) & P:
                self.write(table, index, self.next_table << 12 | TABLE)
                self.next_table += 1
            table = self.entry(table, index) >> 12 & 0xFFFFFF
        self.write(table, self.index(linear, level), gfn << 12 | flags)
        return table

    @staticmethod
    def index(linear: int, level: int) -> int:
        return linear >> 12 + 9 * (level - 1) & SPTE_ENT_PER_PAGE - 1

    def fault(self, linear: int, *, write: bool = False, present: bool = False, user: bool = True) -> int:
        """Take a page fault as the CPU would after a failed walk; return KVM's RET_PF_ value."""
        error = (lib.PFERR_WRITE if write else 0) | (lib.PFERR_USER if user else 0)
        error |= lib.PFERR_PRESENT if present else 0
        access = lib.ACCESS_WRITE if write else lib.ACCESS_READ
        self.enter()
        return kvm_mmu_page_fault(self.cpu, self.vcpu, linear, access, present, error)

    def enter(self) -> None:
        """Serve the MMU as vcpu_enter_guest() does."""
        kvm_mmu_reload(self.cpu, self.vcpu)
        if kvm_check_request(self.cpu, self.vcpu, KVM_REQ_MMU_SYNC):
            kvm_mmu_sync_roots(self.cpu, self.vcpu)

    def leaf(self, linear: int) -> Sptep:
        """Return the last SPTE of a walk for the address."""
        *_, last = shadow_walk(self.cpu, self.vcpu, linear)
        return last

    def spte(self, linear: int) -> int:
        return spte_of(self.cpu, self.leaf(linear))

    def root(self) -> ShadowPage:
        assert self.vcpu.mmu.root is not None
        assert isinstance(self.vcpu.mmu.root.sp, ShadowPage)
        return self.vcpu.mmu.root.sp


@contextmanager
def shadowed_guest(
    rig: Rig, kind: type[ShadowedGuest] = ShadowedGuest, **params: Any
) -> Iterator[ShadowedGuest]:
    kvm = rig.vm(ept=False, **params)
    with online(rig.machine.cpus[0]):
        yield kind(rig, kvm)
