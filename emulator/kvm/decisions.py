"""The decision points: KVM's questions to a policy, and the answers that it understands.

KVM knows no policy, only this protocol.  A method is called at the moment of its decision, with the objects
that the kernel's code has at hand there, and its docstring tells that moment.  Each `Literal` lists the
answers; the first is Linux 7.3's.  emulator.policy describes and implements them.  With `done`, a policy says
that it has acted itself: KVM neither flushes nor accounts for a flush there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

from emulator.kvm.mmu.structs import KvmMmuPage
from emulator.kvm.structs import Kvm, KvmMemorySlot, Vcpu
from emulator.machine.runtime import Cpu
from native.types import Gfn

if TYPE_CHECKING:
    from emulator.kvm.notifications import Heard

RemoteFlush = Literal["all-contexts", "current-context", "done"]
RemoteKick = Literal["mode-not-outside", "all-pcpus", "done"]
KickWait = Literal["wait", "no-wait"]
RootLoad = Literal["flush-current", "none", "done"]
CachedRoot = Literal["none", "flush-current"]
RootAlloc = Literal["none", "done"]
RootLock = Literal["read", "write"]
RootPut = Literal["sync-no-flush", "flush", "async", "inline"]
InvalidRootZap = Literal["no-flush", "flush"]
Migration = Literal["all-contexts", "none", "done"]
MigrationVpid = Literal["with-ept", "invvpid", "none"]
SlotDelete = Literal["zap-all-roots", "zap-slot-leafs"]
ZapScope = Literal["leafs", "leafs-and-tables"]
Zap = Literal["rcu-proxy", "flush-per-table", "done"]
ZapRoot = Literal["4k-2m-1g-root", "1g-root", "root"]
ZapYield = Literal["flush-then-unlock", "unlock-then-flush", "no-flush"]
MapReplace = Literal["flush", "none"]
EagerSplit = Literal["split", "none"]
SplitAlloc = Literal["unlocked", "locked"]
FaultSplit = Literal["split", "zap"]
InvalidRoots = Literal["skip", "include"]
FrozenZap = Literal["flush-first", "tables-first"]
MappedFault = Literal["spurious", "remake"]
HugeRecovery = Literal["in-place", "zap-each"]
WriteProtect = Literal["flush", "if-changed", "none"]
NotifierFlush = Literal["before-return", "at-range-end", "none"]
AgeLock = Literal["rcu", "mmu-lock"]
AgeFlush = Literal["none", "if-young"]
ZappedPfn = Literal["none", "set-dirty-accessed"]
FaultRetry = Literal["invalidate-seq", "none"]
EntryOrder = Literal["mode-then-requests", "requests-then-mode"]
RoleChange = Literal["reset-context", "unload-all", "keep-roots", "keep-roots-synced", "no-guest-flush"]
PagingOff = Literal["flush", "unload"]
SmepOn = Literal["current", "guest", "none"]
SregsFlush = Literal["guest", "none"]
PcideOn = Literal["free", "keep"]
NoflushRoot = Literal["none", "sync"]
CommitZap = Literal["flush-then-free", "batch", "none"]
SpteReplace = Literal["flush", "none"]
TableProtect = Literal["mmu-writable", "if-changed", "none"]
SpteUpdate = Literal["mmu-writable", "accessed-dirty"]

NestedTransition = Literal["tag-aware", "apic-access-flush", "always", "none"]
NestedInvept = Literal["free-roots", "free-roots-and-flush", "none"]
NestedInvvpid = Literal["pcpu-of-vmcs02", "current-pcpu", "none"]
Vpid02Reuse = Literal["flush", "none"]

HvRemoteFlush = Literal["tracked-roots", "requests"]
HvLocalFlush = Literal["invept", "hypercall"]


class Decisions(Protocol):
    """A policy, as KVM sees it."""

    def may_answer(self, point: Literal["root_put"], *alternatives: RootPut) -> bool:
        """Return whether the policy can ever answer `point` with one of `alternatives`."""

    def heard(self) -> Heard:
        """Return the functions that hear the moments (emulator.kvm.notifications).  A VM asks when it is
        created."""

    def new_data(self, scope: Literal["vm", "vcpu", "root"], number: int, pcpus: int) -> object:
        """Make the policy's state of a new VM, vCPU or root.  KVM keeps it with the object, and never looks
        into it."""

    def remote_flush(self, cpu: Cpu, vcpu: Vcpu) -> RemoteFlush:
        """`vcpu` services KVM_REQ_TLB_FLUSH on `cpu`.  vcpu.flush_reasons has a bit for each reason of the
        request, and vcpu.flush_reason is the first one.  `done`: the policy has flushed."""

    def remote_kick(self, cpu: Cpu, kvm: Kvm) -> RemoteKick:
        """All vCPUs of `kvm` have a new request, and pCPUs are about to be interrupted; cpu.kick_mask has
        those of mode-not-outside.  `done`: the policy has changed that mask."""

    def kick_wait(self, cpu: Cpu, kvm: Kvm) -> KickWait:
        """A flusher has interrupted pCPUs for `kvm`, and may wait until they have left guest mode."""

    def root_load(self, cpu: Cpu, vcpu: Vcpu, root: KvmMmuPage) -> RootLoad:
        """`root` became current through kvm_mmu_load.  `done`: the policy has flushed, or has accounted for
        what it elided."""

    def cached_root(self, cpu: Cpu, vcpu: Vcpu, root: KvmMmuPage) -> CachedRoot:
        """`root` became current again without kvm_mmu_load."""

    def root_alloc(self, cpu: Cpu, kvm: Kvm, root: KvmMmuPage) -> RootAlloc:
        """`root` has been made, or a shadow page has become a root for an EPT of L1's; no vCPU can find it
        yet.  `done`: the policy has flushed."""

    def root_lock(self, cpu: Cpu, kvm: Kvm) -> RootLock:
        """A vCPU is about to find or make a root, or to drop its references on roots."""

    def root_put(self, cpu: Cpu, kvm: Kvm, root: KvmMmuPage) -> RootPut:
        """`root` loses its last reference; also when it is made, because the answer decides whether the TDP
        MMU keeps a reference of its own."""

    def invalid_root_zap(self, cpu: Cpu, kvm: Kvm, root: KvmMmuPage) -> InvalidRootZap:
        """SPTEs of `root`, which is invalid, were zapped."""

    def migration(self, cpu: Cpu, vcpu: Vcpu) -> Migration:
        """The VMCS of `vcpu` is loaded on `cpu`, and was loaded on another pCPU before (loaded_vmcs.cpu).
        Precedes migration_vpid.  `done`: the policy has flushed, or has accounted for what it elided."""

    def migration_vpid(self, cpu: Cpu, vcpu: Vcpu) -> MigrationVpid:
        """The VMCS of `vcpu` is loaded on `cpu`, and was loaded on another pCPU before, where the guest may
        have invalidated entries natively."""

    def slot_delete(self, cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot) -> SlotDelete:
        """`slot` is being deleted or moved."""

    def zap_scope(self, cpu: Cpu, kvm: Kvm) -> ZapScope:
        """A range of gfns is about to be zapped."""

    def zap(self, cpu: Cpu, kvm: Kvm) -> Zap:
        """A table page has lost its link and all its entries; also before a zap, because with another answer
        than rcu-proxy a zap under mmu_lock for read freezes SPTEs.  `done`: the policy gives the page to RCU
        (moments table_removed, walk_ends)."""

    def zap_root(self, cpu: Cpu, kvm: Kvm, root: KvmMmuPage) -> ZapRoot:
        """`root`, which no vCPU uses any more, is about to be zapped."""

    def zap_yield(self, cpu: Cpu, kvm: Kvm) -> ZapYield:
        """A walk that may owe a flush drops its locks."""

    def map_replace(self, cpu: Cpu, kvm: Kvm, gfn: Gfn) -> MapReplace:
        """A huge leaf replaced the table that mapped `gfn`."""

    def eager_split(self, cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot) -> EagerSplit:
        """Pages of `slot` are about to be write-protected for dirty logging; eager_page_split is on."""

    def split_alloc(self, cpu: Cpu, kvm: Kvm) -> SplitAlloc:
        """A walk that splits huge pages eagerly needs a table page."""

    def fault_split(self, cpu: Cpu, kvm: Kvm, gfn: Gfn) -> FaultSplit:
        """A fault on `gfn` needs a 4K mapping where a huge leaf is."""

    def invalid_roots(self, cpu: Cpu, kvm: Kvm) -> InvalidRoots:
        """SPTEs of a range are about to be zapped or write-protected, not for an mmu_notifier."""

    def frozen_zap(self, cpu: Cpu, kvm: Kvm) -> FrozenZap:
        """An SPTE under mmu_lock for read was frozen, to be zapped."""

    def mapped_fault(self, cpu: Cpu, kvm: Kvm, gfn: Gfn) -> MappedFault:
        """A fault on `gfn` finds a leaf that permits the access."""

    def huge_recovery(self, cpu: Cpu, kvm: Kvm) -> HugeRecovery:
        """Dirty logging ended."""

    def write_protect(self, cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot) -> WriteProtect:
        """SPTEs of `slot` were write-protected."""

    def notifier_flush(self, cpu: Cpu, kvm: Kvm, gfn: Gfn) -> NotifierFlush:
        """An mmu_notifier zapped SPTEs from `gfn` on."""

    def age_lock(self, cpu: Cpu, kvm: Kvm, gfn: Gfn) -> AgeLock:
        """An mmu_notifier is about to take the accessed bit from SPTEs from `gfn` on."""

    def age_flush(self, cpu: Cpu, kvm: Kvm, gfn: Gfn) -> AgeFlush:
        """An mmu_notifier took the accessed bit from SPTEs from `gfn` on, for reclaim."""

    def zapped_pfn(self, cpu: Cpu, kvm: Kvm) -> ZappedPfn:
        """SPTEs are about to be zapped, by one step of a walk."""

    def fault_retry(self, cpu: Cpu, kvm: Kvm, gfn: Gfn) -> FaultRetry:
        """A fault on `gfn` asks whether it raced an invalidation."""

    def entry_order(self, cpu: Cpu, vcpu: Vcpu) -> EntryOrder:
        """`vcpu` is about to enter the guest, interrupts off."""

    def role_change(self, cpu: Cpu, vcpu: Vcpu) -> RoleChange:
        """A register or mode of `vcpu` changed on which the role of its roots may depend."""

    def paging_off(self, cpu: Cpu, vcpu: Vcpu) -> PagingOff:
        """`vcpu` cleared CR0.PG."""

    def smep_on(self, cpu: Cpu, vcpu: Vcpu) -> SmepOn:
        """`vcpu` set CR4.SMEP or toggled CR4.PAE."""

    def sregs_flush(self, cpu: Cpu, vcpu: Vcpu) -> SregsFlush:
        """User space changed a register of `vcpu` by KVM_SET_SREGS, for which role_change was asked."""

    def pcide_on(self, cpu: Cpu, vcpu: Vcpu) -> PcideOn:
        """`vcpu` set CR4.PCIDE, on a host without EPT."""

    def noflush_root(self, cpu: Cpu, vcpu: Vcpu) -> NoflushRoot:
        """`vcpu` wrote CR3 with bit 63, on a host without EPT."""

    def commit_zap(self, cpu: Cpu, kvm: Kvm) -> CommitZap:
        """Shadow pages were zapped and are about to be freed."""

    def spte_replace(self, cpu: Cpu, kvm: Kvm, gfn: Gfn) -> SpteReplace:
        """A leaf for `gfn` of the shadow MMU replaced a table or a leaf of another frame."""

    def table_protect(self, cpu: Cpu, kvm: Kvm, gfn: Gfn) -> TableProtect:
        """An SPTE of `gfn`, a guest's page table or a table of L1's EPT, was write-protected."""

    def spte_update(self, cpu: Cpu, kvm: Kvm, gfn: Gfn) -> SpteUpdate:
        """The shadow MMU changes a leaf SPTE for `gfn` that stays one."""

    def nested_transition(self, cpu: Cpu, vcpu: Vcpu) -> NestedTransition:
        """`vcpu` is about to enter L2, or L1 after a VM exit of L2: vcpu.arch.guest_mode tells."""

    def nested_invept(self, cpu: Cpu, vcpu: Vcpu) -> NestedInvept:
        """L1 on `vcpu` executed INVEPT."""

    def nested_invvpid(self, cpu: Cpu, vcpu: Vcpu) -> NestedInvvpid:
        """L1 on `vcpu` executed INVVPID."""

    def vpid02_reuse(self, cpu: Cpu, vcpu: Vcpu) -> Vpid02Reuse:
        """`vcpu` is about to enter L2 with another VPID of L1's than at its last entry with one."""

    def hv_remote_flush(self, cpu: Cpu, kvm: Kvm) -> HvRemoteFlush:
        """SPTEs of `kvm` have changed, a remote flush begins, and KVM is a guest of Hyper-V, with EPT."""

    def hv_local_flush(self, cpu: Cpu, vcpu: Vcpu) -> HvLocalFlush:
        """`vcpu` is about to flush its current root on `cpu`, and KVM is a guest of Hyper-V, with EPT."""
