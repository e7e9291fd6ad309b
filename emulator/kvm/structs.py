"""KVM's structures: struct kvm, kvm_vcpu, kvm_memory_slot.  Those of its MMU are in mmu/structs.py.

State that actors share at the grain of single steps (mode, requests, mmu_lock, SPTEs, the invalidation
sequence) lives in the native core under the numbers `Kvm.id` and `Vcpu.id`; the fields here are read and
written under the lock that the kernel has for them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from emulator.kvm.kvm_host import (
    EFER_LMA,
    EFER_LME,
    EFER_NX,
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEMSLOT_INVALID,
    LAPIC_MODE_DISABLED,
    PG_LEVEL_512G,
    X86_CR0_PE,
    X86_CR0_PG,
    X86_CR0_WP,
    X86_CR4_PAE,
    X86_CR4_PGE,
)
from emulator.kvm.mmu.shadow_structs import KvmShadowArch, SlotArch
from emulator.kvm.mmu.structs import KvmMmu, KvmMmuPage, KvmMmuPageRole
from emulator.machine.locks import MmuLock, Mutex, SpinLock
from emulator.machine.runtime import Cpu, Machine
from native import ffi, lib
from native.types import CpuId, FlushReason, Gfn, Hfn, Hva, Level, VcpuId, VmId, Vpid

if TYPE_CHECKING:
    from emulator.kvm.decisions import Decisions
    from emulator.kvm.notifications import Heard
    from emulator.kvm.vmx.vmcs import LoadedVmcs
    from emulator.kvm.vmx.vmcs12 import NestedVmx
    from emulator.kvm.x86_ops import KvmX86Ops


@dataclass(frozen=True, slots=True)
class KvmParams:
    """Module parameters and sizes that are no decision points.

    fault_around: pages that one fault maps at most; real KVM maps one (0 or 1).
    chunk: SPTEs per native call.
    prefetch: SPTEs of an aligned group, of which a fault of the shadow MMU maps those that need no wait:
    PTE_PREFETCH_NUM; 0: the fault's own alone.
    single: a native call changes at most one SPTE, so that each explored step changes one.
    resched_chunks: chunks after which need_resched() is true for an iterator; 0: never.
    eager_page_split: the module parameter of that name.
    hyperv: the host is a guest of Hyper-V (kvm_onhyperv.py).
    ept, vpid: kvm_intel.ept and kvm_intel.vpid.  Without EPT KVM shadows the guests' page tables; without
    VPIDs VM entry and exit flush.
    flexpriority: kvm_intel.flexpriority, and vCPUs with an in-kernel local APIC.  Off by default, because
    only the guests of litmus tests access their APICs.
    mmu_pages: shadow pages that a VM may have (KVM_SET_NR_MMU_PAGES).
    eptad: kvm_intel.eptad; without A/D bits in EPT, aging takes an SPTE's permissions to see the next access.
    tdp_level: the host's levels, 4 or 5; a vCPU with a MAXPHYADDR of 48 or less in its CPUID uses 4.
    slice_accesses: guest accesses until the preemption timer ends a slice.
    exits_per_tick: exits after which KVM checks need_resched() even without an attention bit; stands for the
    timer tick.
    host_takes_time: the host's work between two flushes takes longer than an exit and an entry
    (host_work.py); for machines with freely running vCPUs.
    """

    fault_around: int = 16
    prefetch: int = 8
    chunk: int = 32
    single: bool = False
    resched_chunks: int = 16
    eager_page_split: bool = True
    ept: bool = True
    vpid: bool = True
    hyperv: bool = False
    flexpriority: bool = False
    mmu_pages: int = 1 << 16
    eptad: bool = True
    tdp_level: Level = PG_LEVEL_512G
    slice_accesses: int = 100_000
    exits_per_tick: int = 64
    host_takes_time: bool = False


class KvmMemorySlot:
    """struct kvm_memory_slot: immutable apart from the dirty bitmap.

    It maps the npages guest-physical pages from base_gfn on, and not end_gfn, to the host's virtual pages
    from userspace_addr on.  `id`: its number in the address space as_id (1: SMM's).  `flags`: KVM_MEM_*, with
    log_dirty_pages and `invalid` (KVM_MEMSLOT_INVALID: it is being deleted or moved) as properties.  `arch`:
    the rmaps of the shadow MMU, and its counts.

    dirty_bitmap has a byte per page, which one store marks.  Reaping clears only bytes that it read as set,
    so each mark is reported now or stays for the next time.
    """

    __slots__ = ("arch", "as_id", "base_gfn", "dirty_bitmap", "flags", "id", "npages", "userspace_addr")

    def __init__(
        self,
        slot_id: int,
        as_id: int,
        base_gfn: Gfn,
        npages: int,
        userspace_addr: Hva,
        flags: int = 0,
        dirty_bitmap: bytearray | None = None,
        arch: SlotArch | None = None,
    ) -> None:
        self.id = slot_id
        self.as_id = as_id
        self.base_gfn = base_gfn
        self.npages = npages
        self.userspace_addr = userspace_addr  # in pages, as all host virtual addresses here
        self.flags = flags
        self.dirty_bitmap = dirty_bitmap
        self.arch = arch or SlotArch()

    def __repr__(self) -> str:
        return f"<slot {self.id} gfn {self.base_gfn:#x}+{self.npages:#x} flags {self.flags:#x}>"

    @property
    def end_gfn(self) -> Gfn:
        return self.base_gfn + self.npages

    @property
    def invalid(self) -> bool:
        return bool(self.flags & KVM_MEMSLOT_INVALID)

    @property
    def log_dirty_pages(self) -> bool:
        return bool(self.flags & KVM_MEM_LOG_DIRTY_PAGES)

    def dirty_track_enabled(self) -> bool:
        """kvm_slot_dirty_track_enabled()"""
        return bool(self.flags & KVM_MEM_LOG_DIRTY_PAGES)

    def gfn_to_hva(self, gfn: Gfn) -> Hva:
        """__gfn_to_hva_memslot()"""
        return self.userspace_addr + (gfn - self.base_gfn)

    def hva_to_gfn(self, hva: Hva) -> Gfn:
        """hva_to_gfn_memslot()"""
        return self.base_gfn + (hva - self.userspace_addr)


class KvmMemslots:
    """struct kvm_memslots: one address space's slots; never changed once active.

    generation: unique among both address spaces.  It has KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS set until no
    reader uses the slots that these replaced, and is advanced then.
    """

    __slots__ = ("_bases", "by_id", "generation", "slots")

    def __init__(self, generation: int = 0, slots: tuple[KvmMemorySlot, ...] = ()) -> None:
        self.generation = generation
        self.slots = tuple(sorted(slots, key=lambda slot: slot.base_gfn))
        self.by_id = {slot.id: slot for slot in self.slots}
        self._bases = [slot.base_gfn for slot in self.slots]

    def search(self, gfn: Gfn) -> KvmMemorySlot | None:
        """search_memslots()"""
        i = bisect_right(self._bases, gfn) - 1
        if i >= 0:
            slot = self.slots[i]
            if gfn < slot.base_gfn + slot.npages:
                return slot
        return None


class Mm(Protocol):
    """struct mm_struct: the host's memory management, which KVM's faults need (emulator.host.memory)."""

    def wp_page_copy(self, cpu: Cpu, page: Hva) -> bool:
        """Copy a page that is shared for its first write; return False if there is no frame for the copy.

        Invokes the VM's mmu_notifiers, so the caller's fault has to start over.
        """


class Kvm:
    """struct kvm.

    `id`: the number of the VM on its `machine`.  `vcpus`: all vCPUs of the VM, loaded or not.  `gfns`: the
    pages of guest-physical memory.  `memslots`: those of the two address spaces, of which the second is
    SMM's.  `tdp_mmu_roots`: the linked roots, invalid ones among them.  `shadow`: the shadow MMU's part.
    mn_active_invalidate_count: the mmu_notifier's invalidations in progress.  mn_memslots_update: the update
    of the memslots that waits for their end.  mn_flush_at_end: an invalidation's end flushes (decision
    notifier_flush=at-range-end).  dirty_log_manual: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.  `params`: module
    parameters.

    Lock order: slots_lock, slots_arch_lock, mn_invalidate_lock; mmu_lock, tdp_mmu_pages_lock.
    `tdp_mmu_zap_works`: roots that wait for the worker that zaps them (decision root_put=async).
    `policy_data`: the policy's state of the VM.  `heard`: the policy's functions that hear of moments.
    hv_root_tdp, under hv_root_tdp_lock: on Hyper-V the root that all vCPUs have in common, if they have one.
    `x86_ops`: the vendor's operations.  `mm`: the host's memory management, without which no page may be
    copied on write.  `at_host_work`: CPUs that wait in emulator.kvm.host_work.
    """

    __slots__ = (
        "at_host_work",
        "dirty_log_manual",
        "gfns",
        "heard",
        "hv_root_tdp",
        "hv_root_tdp_lock",
        "id",
        "machine",
        "memslots",
        "mm",
        "mmu_lock",
        "mn_active_invalidate_count",
        "mn_flush_at_end",
        "mn_invalidate_lock",
        "mn_memslots_update",
        "params",
        "policy",
        "policy_data",
        "shadow",
        "slots_arch_lock",
        "slots_lock",
        "tdp_mmu_pages_lock",
        "tdp_mmu_roots",
        "tdp_mmu_zap_works",
        "vcpus",
        "x86_ops",
    )

    def __init__(
        self,
        machine: Machine,
        vm: VmId,
        gfns: int,
        policy: Decisions,
        x86_ops: KvmX86Ops,
        params: KvmParams,
    ) -> None:
        self.machine = machine
        self.id = vm
        self.gfns = gfns
        self.policy = policy
        self.heard: Heard = policy.heard()
        self.policy_data = policy.new_data("vm", vm, machine.pcpus)
        self.x86_ops = x86_ops
        self.mm: Mm | None = None
        self.params = params
        self.mmu_lock = MmuLock(vm)
        self.slots_lock = Mutex("slots_lock")
        self.slots_arch_lock = Mutex("slots_arch_lock")
        self.vcpus: tuple[Vcpu, ...] = ()
        # One per address space; KVM_X86 has two (SMM is the second).  Replaced whole, read under SRCU.
        self.memslots: list[KvmMemslots] = [KvmMemslots(0), KvmMemslots(1)]
        self.mn_invalidate_lock = SpinLock("mn_invalidate_lock")
        self.mn_active_invalidate_count = 0
        # The function that installs the next memslots once that count is 0, and the CPU that waits for it.
        self.mn_memslots_update: tuple[Callable[[], None], CpuId] | None = None
        self.mn_flush_at_end = False  # only with notifier_flush=at-range-end; under mmu_lock
        # Replaced whole under tdp_mmu_pages_lock, read under RCU or mmu_lock.
        self.tdp_mmu_roots: tuple[KvmMmuPage, ...] = ()
        self.tdp_mmu_pages_lock = SpinLock("tdp_mmu_pages_lock")
        self.dirty_log_manual = 0
        self.tdp_mmu_zap_works: deque[KvmMmuPage] = deque()
        self.at_host_work: list[CpuId] = []
        self.shadow = KvmShadowArch(params.mmu_pages)
        self.hv_root_tdp: Hfn | None = None  # None: INVALID_PAGE
        self.hv_root_tdp_lock = SpinLock("hv_root_tdp_lock")

    def __repr__(self) -> str:
        return f"<VM {self.id}>"


def tdp_enabled(kvm: Kvm) -> bool:
    """tdp_enabled: return whether processors translate guest-physical addresses, with EPT."""
    return kvm.params.ept


def tdp_mmu_enabled(kvm: Kvm) -> bool:
    """tdp_mmu_enabled: return whether the TDP MMU builds the EPT; without EPT there is none."""
    return tdp_enabled(kvm)


def kvm_memslots_have_rmaps(kvm: Kvm) -> bool:
    """kvm_memslots_have_rmaps(), kvm_shadow_root_allocated(): return whether there may be shadow pages.

    With EPT the first root that shadows an EPT of L1's is made before the first shadow page below it.
    """
    return not tdp_mmu_enabled(kvm) or kvm.shadow.shadow_root_allocated


class VcpuArch:
    """The registers of struct kvm_vcpu_arch that decide about roots and flushes, as a 64-bit OS sets them.

    cr0, cr3, cr4, efer: the control registers and EFER.  guest_mode: it runs a nested guest (HF_GUEST_MASK).
    smm: it is in SMM (HF_SMM_MASK); smi_pending: an SMI waits; leaving_smm: RSM changes registers with
    which the guest does not run; init_latched: an INIT waits until SMM is left.
    `smram`: the registers that enter_smm() saved.  pdptrs: the PDPTEs of a guest in PAE mode, as they were
    when it loaded CR3 last.  apic_mode: LAPIC_MODE_*, the mode that IA32_APIC_BASE has set.
    """

    __slots__ = (
        "apic_mode",
        "cr0",
        "cr3",
        "cr4",
        "efer",
        "guest_mode",
        "init_latched",
        "leaving_smm",
        "pdptrs",
        "smi_pending",
        "smm",
        "smram",
    )

    def __init__(self) -> None:
        self.cr0 = X86_CR0_PE | X86_CR0_WP | X86_CR0_PG
        self.cr3 = 0
        self.cr4 = X86_CR4_PAE | X86_CR4_PGE
        self.efer = EFER_LME | EFER_LMA | EFER_NX
        self.pdptrs: tuple[int, int, int, int] = (0, 0, 0, 0)
        self.smm = False  # hflags & HF_SMM_MASK
        self.guest_mode = False  # hflags & HF_GUEST_MASK: it runs a nested guest
        self.leaving_smm = False  # in RSM: registers change that the guest does not run with
        self.smi_pending = False
        self.init_latched = False  # KVM_APIC_INIT in pending_events, while in SMM
        self.smram: tuple[int, int, int, int] = (0, 0, 0, 0)  # CR0, CR3, CR4, EFER
        self.apic_mode = LAPIC_MODE_DISABLED


class Vcpu:
    """struct kvm_vcpu with vcpu->arch and struct vcpu_vmx.

    Apart from the fields in the core (mode, requests, cpu), only the thread of the pCPU on which the vCPU is
    loaded touches it; user space may set `immediate_exit` (kvm_run->immediate_exit) from any thread.

    `id`: its number in the VM `kvm`.  `vpid`: its VPID.  `loaded`: it is loaded on a pCPU.
    loaded_vmcs is vmcs01, or nested.vmcs02 while it runs a nested guest.
    mmu is root_mmu, or guest_mmu, which shadows the EPT that L1 has for a nested guest.  maxphyaddr:
    MAXPHYADDR of the guest's CPUID, which decides between 4 and 5 levels.
    flush_current_reason: the reason of the vCPU's last KVM_REQ_TLB_FLUSH_CURRENT, for the accounts;
    flush_reasons: a bit for each reason of the KVM_REQ_TLB_FLUSH that it services, flush_reason: the first.
    policy_data: the policy's state of the vCPU.  srcu_idx: the SRCU section that it is in, -1 if none.
    hv_root_tdp: on Hyper-V the root in its EPT_POINTER.  `exit`: the last VM exit.
    """

    __slots__ = (
        "arch",
        "exit",
        "flush_current_reason",
        "flush_reason",
        "flush_reasons",
        "guest_mmu",
        "hv_root_tdp",
        "id",
        "immediate_exit",
        "kvm",
        "loaded",
        "loaded_vmcs",
        "maxphyaddr",
        "mmu",
        "nested",
        "policy_data",
        "root_mmu",
        "srcu_idx",
        "vmcs01",
        "vpid",
    )

    def __init__(self, kvm: Kvm, number: VcpuId, vpid: Vpid, vmcs01: LoadedVmcs, nested: NestedVmx) -> None:
        self.kvm = kvm
        self.id = number
        self.vpid = vpid
        self.vmcs01 = vmcs01
        self.loaded_vmcs = vmcs01
        self.nested = nested
        self.arch = VcpuArch()
        self.maxphyaddr = 52
        self.root_mmu = KvmMmu(KvmMmuPageRole(level=kvm.params.tdp_level))
        self.guest_mmu = KvmMmu(KvmMmuPageRole(level=kvm.params.tdp_level))
        self.mmu = self.root_mmu
        self.policy_data = kvm.policy.new_data("vcpu", number, kvm.machine.pcpus)
        self.srcu_idx = -1
        self.loaded = False  # between vcpu_load or kvm_sched_in and vcpu_put or kvm_sched_out
        self.immediate_exit = False
        self.flush_current_reason: FlushReason = lib.REASON_GUEST
        self.flush_reasons = 0
        self.flush_reason: FlushReason = lib.REASON_OTHER
        self.hv_root_tdp: Hfn | None = None
        self.exit = ffi.new("struct vcpu_exit *")

    def __repr__(self) -> str:
        return f"<vCPU {self.id} of VM {self.kvm.id}>"


def is_paging(vcpu: Vcpu) -> bool:
    """is_paging()"""
    return bool(vcpu.arch.cr0 & X86_CR0_PG)


def is_long_mode(vcpu: Vcpu) -> bool:
    """is_long_mode()"""
    return bool(vcpu.arch.efer & EFER_LMA)


def is_pae_paging(vcpu: Vcpu) -> bool:
    """is_pae_paging(): return whether the guest is in 32-bit mode with CR4.PAE set, and has PDPTEs."""
    return not is_long_mode(vcpu) and bool(vcpu.arch.cr4 & X86_CR4_PAE) and is_paging(vcpu)
