"""Wrap a tree's TDP MMU under the names of the model's functions, for their callers: the model of mmu.c.

The callers hold mmu_lock as KVM's do.  core.py answers when tdp_mmu.c calls the rest of KVM.
"""

from __future__ import annotations

from typing import Any, Final

from emulator.kernel_tree.on_machine.core import Tree, address
from emulator.kvm.decisions import Decisions
from emulator.kvm.mmu.fault import RET_PF_FIXED, RET_PF_INVALID, RET_PF_RETRY, RET_PF_SPURIOUS, KvmPageFault
from emulator.kvm.mmu.page_fault import page_fault_can_be_fast
from emulator.kvm.mmu.spte import root_to_sp
from emulator.kvm.mmu.structs import KvmMmuPage, KvmMmuPageRole
from emulator.kvm.structs import Kvm, KvmMemorySlot, KvmParams, Vcpu
from emulator.kvm.virt.slots import mark_page_dirty_in_slot
from emulator.kvm.x86_ops import KvmX86Ops
from emulator.machine.runtime import Cpu, Machine, MachineError
from native import lib
from native.types import FlushReason, Gfn, Hfn, Level, VmId

_HFN_MASK: Final = (1 << 24) - 1
_MOST_ROOTS: Final = 256
_RETURNS: Final = frozenset({RET_PF_RETRY, RET_PF_FIXED, RET_PF_SPURIOUS})


class _Count:
    """refcount_t of a root, in the tree's memory."""

    __slots__ = ("_count",)

    def __init__(self, count: Any) -> None:
        self._count = count

    @property
    def value(self) -> int:
        return int(self._count[0])


class TreeRoot(KvmMmuPage):
    """A root of the tree's.  Its role and its references are read from the tree's memory."""

    __slots__ = ("_count", "_invalid", "_invalid_role", "_role", "_scheduled", "_word", "hpa")

    def __init__(self, tree: Tree, kvm: Kvm, hpa: int, role: KvmMmuPageRole) -> None:
        self.hpa = hpa
        self.hfn = Hfn(hpa >> 12 & _HFN_MASK)
        self.tdp_mmu_page = True
        self.mmu_valid_gen = 0
        self.parent_spte = lib.make_nonleaf_spte(kvm.machine.m, self.hfn)
        self.policy_data = None
        self._role = role
        self._word = tree.lib.tree_root_role(hpa)
        self._count = _Count(tree.lib.tree_root_count(hpa))
        self._scheduled = tree.lib.tree_root_scheduled(hpa)
        self._invalid = tree.invalid
        self._invalid_role = KvmMmuPageRole(
            level=role.level, smm=role.smm, guest_mode=role.guest_mode, invalid=True
        )
        self.has_tdp_ref = True

    @property
    def role(self) -> KvmMmuPageRole:  # type: ignore[override]
        return self._invalid_role if self._word[0] & self._invalid else self._role

    @property
    def tdp_mmu_root_count(self) -> _Count:  # type: ignore[override]
        return self._count

    @property
    def tdp_mmu_scheduled_root_to_zap(self) -> bool:  # type: ignore[override]
        return bool(self._scheduled) and bool(self._scheduled[0])


class TreeKvm(Kvm):
    """A VM for which the tree's code is the TDP MMU.  known: its roots by their addresses."""

    __slots__ = ("_vcpus", "known", "tree")

    # Set before the first VM is made; one process has one tree.
    loaded: Tree | None = None

    def __init__(
        self,
        machine: Machine,
        vm: VmId,
        gfns: int,
        policy: Decisions,
        x86_ops: KvmX86Ops,
        params: KvmParams,
    ) -> None:
        assert self.loaded is not None
        self.tree = self.loaded
        self.known: dict[int, TreeRoot] = {}
        super().__init__(machine, vm, gfns, policy, x86_ops, params)
        if self.tree.machine is not machine:
            self.tree.attach(machine)
        cpu = machine.cpus[machine.pcpus]
        self.tree.run(cpu, self, self.tree.lib.tree_vm_create, vm, int(params.eptad))

    @property
    def vcpus(self) -> tuple[Vcpu, ...]:
        return self._vcpus

    @vcpus.setter
    def vcpus(self, vcpus: tuple[Vcpu, ...]) -> None:
        """Tell the tree's code at once: other threads of the VM do not run yet, or run no more."""
        told = getattr(self, "_vcpus", ())
        self._vcpus = vcpus
        if vcpus != told:
            self.tree.set_vcpus(self.id, [vcpu.id for vcpu in vcpus])

    def _listed(self) -> list[int]:
        addresses = self.tree.ffi.new("unsigned long long[]", _MOST_ROOTS)
        n = self.tree.lib.tree_roots(self.id, addresses, _MOST_ROOTS)
        return list(addresses[0:n])

    @property
    def tdp_mmu_roots(self) -> tuple[KvmMmuPage, ...]:
        """Return the roots on the tree's list, under mmu_lock or while no other thread runs."""
        return tuple(self.known[address] for address in self._listed() if address in self.known)

    @tdp_mmu_roots.setter
    def tdp_mmu_roots(self, roots: tuple[KvmMmuPage, ...]) -> None:
        assert not roots

    def forget_freed_roots(self) -> None:
        """Forget the roots that the tree has taken off its list, under mmu_lock held for write.

        A root that is known here has been on the list, so it was freed if the list lacks it now.  It does not
        come back under the same address, because an address names one life of a frame.
        """
        known = list(self.known)
        for known_root in set(known).difference(self._listed()):
            self.known.pop(known_root, None)


# Attributes that are read from the tree's memory.
IN_THE_TREE: Final[dict[type, frozenset[str]]] = {
    TreeRoot: frozenset({"role", "tdp_mmu_root_count", "tdp_mmu_scheduled_root_to_zap"}),
    TreeKvm: frozenset({"tdp_mmu_roots", "vcpus"}),
}


def _of(kvm: Kvm) -> tuple[TreeKvm, Tree, Any]:
    assert isinstance(kvm, TreeKvm)
    return kvm, kvm.tree, kvm.tree.lib


# --- roots --------------------------------------------------------------------------------------------------


def kvm_tdp_mmu_alloc_root(cpu: Cpu, kvm: Kvm, role: KvmMmuPageRole) -> KvmMmuPage:
    vm, tree, code = _of(kvm)
    hpa = tree.run(cpu, kvm, code.tree_alloc_root, role.level, role.smm, int(role.guest_mode))
    root = vm.known.get(hpa)
    if root is None:
        made = TreeRoot(tree, kvm, hpa, role)
        root = vm.known.setdefault(hpa, made)
        cpu.stat(kvm.id, lib.STAT_ROOTS_ALLOCATED, root is made)
    return root


def kvm_tdp_mmu_put_root(cpu: Cpu, kvm: Kvm, root: KvmMmuPage) -> None:
    _, tree, code = _of(kvm)
    assert isinstance(root, TreeRoot)
    tree.run(cpu, kvm, code.tree_put_root, root.hpa)


def kvm_tdp_mmu_invalidate_roots(cpu: Cpu, kvm: Kvm) -> None:
    vm, tree, code = _of(kvm)
    vm.forget_freed_roots()
    valid = [root for root in vm.tdp_mmu_roots if not root.role.invalid]
    tree.run(cpu, kvm, code.tree_invalidate_roots)
    for root in valid:
        if root.role.invalid:
            cpu.event(lib.EVENT_ROOT_INVALID, root.hfn, 0, kvm.id)


def kvm_tdp_mmu_zap_invalidated_roots(cpu: Cpu, kvm: Kvm, shared: bool) -> None:
    _, tree, code = _of(kvm)
    tree.run(cpu, kvm, code.tree_zap_invalidated_roots, int(shared))


def kvm_tdp_mmu_zap_all(cpu: Cpu, kvm: Kvm) -> None:
    _, tree, code = _of(kvm)
    tree.run(cpu, kvm, code.tree_zap_all)


def kvm_mmu_uninit_tdp_mmu(cpu: Cpu, kvm: Kvm) -> None:
    vm, tree, code = _of(kvm)
    tree.run(cpu, kvm, code.tree_uninit)
    if vm.tdp_mmu_roots:
        raise AssertionError(f"{kvm!r} ends with roots {vm.tdp_mmu_roots}")


# --- faults -------------------------------------------------------------------------------------------------


def kvm_tdp_mmu_map(cpu: Cpu, vcpu: Vcpu, fault: KvmPageFault) -> int:
    kvm, (_, tree, code) = vcpu.kvm, _of(vcpu.kvm)
    root = root_to_sp(vcpu.mmu.root)
    assert isinstance(root, TreeRoot)
    assert fault.slot is not None
    pfn = fault.pfn
    r = tree.run(
        cpu,
        kvm,
        code.tree_map,
        root.hpa,
        fault.gfn,
        pfn.custody << 24 | pfn.pfn,
        int(fault.write),
        int(fault.exec),
        fault.goal_level,
        fault.max_level,
        int(pfn.host_writable),
        0,
        slot=fault.slot,
        reason=lib.REASON_REMOTE_REPLACE,
    )
    cpu.stat(kvm.id, lib.STAT_FROZEN_RETRIES, tree.threads[cpu.id].state.frozen)
    if r not in _RETURNS:
        raise MachineError(f"kvm_tdp_mmu_map() returns {r - 100}")
    if r == RET_PF_FIXED and fault.around_n and fault.goal_level == 1:
        _map_around(cpu, kvm, root, fault, fault.slot)
    return r


def _map_around(cpu: Cpu, kvm: Kvm, root: TreeRoot, fault: KvmPageFault, slot: KvmMemorySlot) -> None:
    """Map the neighbours that faultin looked up, unless one of them is being invalidated.

    The kernel does not map neighbours.  Here the tree maps each as it maps a page for KVM_PRE_FAULT_MEMORY.
    """
    _, tree, code = _of(kvm)
    end = fault.around_gfn + fault.around_n
    cpu.point("mmu_invalidate_seq", kvm.id, "read")
    if kvm.policy.fault_retry(cpu, kvm, fault.gfn) == "invalidate-seq" and lib.mmu_invalidate_retry_range(
        cpu.m, kvm.id, fault.mmu_seq, fault.around_gfn, end
    ):
        return
    arrays = [tree.ffi.cast("unsigned int *", address(one)) for one in (cpu.hfns, cpu.tags, cpu.writable)]
    tree.run(cpu, kvm, code.tree_map_around, root.hpa, fault.around_gfn, fault.around_n, *arrays, slot=slot)


def fast_page_fault(cpu: Cpu, vcpu: Vcpu, fault: KvmPageFault) -> int:
    """fast_page_fault(): fix the fault without mmu_lock; the tree's code walks, and interprets the SPTE."""
    kvm, (_, tree, code) = vcpu.kvm, _of(vcpu.kvm)
    root, slot = root_to_sp(vcpu.mmu.root), fault.slot
    if not page_fault_can_be_fast(kvm, fault) or slot is None or root is None:
        return RET_PF_INVALID
    assert isinstance(root, TreeRoot)
    r = tree.run(
        cpu, kvm, code.tree_fast_fault, root.hpa, fault.gfn, int(fault.write), int(fault.exec), slot=slot
    )
    if r == code.FAST_MADE_WRITABLE and slot.dirty_track_enabled():
        mark_page_dirty_in_slot(cpu, slot, fault.gfn)
    if r not in (code.FAST_FIXED, code.FAST_MADE_WRITABLE, code.FAST_SPURIOUS):
        return RET_PF_INVALID
    cpu.stat(kvm.id, lib.STAT_PF_FAST)
    return RET_PF_SPURIOUS if r == code.FAST_SPURIOUS else RET_PF_FIXED


# --- zaps ---------------------------------------------------------------------------------------------------


def kvm_tdp_mmu_zap_leafs(cpu: Cpu, kvm: Kvm, start: Gfn, end: Gfn, flush: bool, reason: FlushReason) -> bool:
    _, tree, code = _of(kvm)
    pending = tree.run(cpu, kvm, code.tree_zap_leafs, start, end, int(flush), reason=reason)
    cpu.stat(kvm.id, lib.STAT_ZAPS)
    return bool(pending)


def kvm_tdp_mmu_unmap_gfn_range(
    cpu: Cpu,
    kvm: Kvm,
    slot: KvmMemorySlot,
    start: Gfn,
    end: Gfn,
    flush: bool,
    reason: FlushReason,
    may_block: bool = True,
) -> bool:
    _, tree, code = _of(kvm)
    pending = tree.run(
        cpu, kvm, code.tree_unmap, start, end, int(may_block), int(flush), slot=slot, reason=reason
    )
    cpu.stat(kvm.id, lib.STAT_ZAPS)
    return bool(pending)


def kvm_tdp_mmu_age_gfn_range(cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot, start: Gfn, end: Gfn) -> bool:
    _, tree, code = _of(kvm)
    return bool(tree.run(cpu, kvm, code.tree_age, start, end, slot=slot))


# --- requests -----------------------------------------------------------------------------------------------


def kvm_make_all_cpus_request(cpu: Cpu, kvm: Kvm, req: int) -> bool:
    _, tree, code = _of(kvm)
    cpu.stat(kvm.id, lib.STAT_MAKE_ALL_CPUS_REQUEST)
    return bool(tree.run(cpu, kvm, code.tree_make_all_cpus_request, req))


def kvm_flush_remote_tlbs(cpu: Cpu, kvm: Kvm, reason: FlushReason) -> None:
    _, tree, code = _of(kvm)
    tree.run(cpu, kvm, code.tree_flush_remote_tlbs, reason=reason)


# --- dirty logging ------------------------------------------------------------------------------------------


def kvm_tdp_mmu_wrprot_slot(cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot, min_level: Level) -> bool:
    _, tree, code = _of(kvm)
    return bool(tree.run(cpu, kvm, code.tree_wrprot_slot, min_level, slot=slot))


def kvm_tdp_mmu_write_protect_gfn(
    cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot, gfn: Gfn, min_level: Level
) -> bool:
    _, tree, code = _of(kvm)
    return bool(tree.run(cpu, kvm, code.tree_write_protect_gfn, gfn, min_level, slot=slot))


def kvm_tdp_mmu_clear_dirty_pt_masked(cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot, gfn: Gfn, mask: int) -> int:
    _, tree, code = _of(kvm)
    return tree.run(cpu, kvm, code.tree_clear_dirty, gfn, mask, slot=slot)


def kvm_tdp_mmu_try_split_huge_pages(
    cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot, start: Gfn, end: Gfn, target_level: Level, shared: bool
) -> None:
    _, tree, code = _of(kvm)
    tree.run(cpu, kvm, code.tree_split, start, end, target_level, int(shared), slot=slot)


def kvm_tdp_mmu_recover_huge_pages(cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot) -> None:
    _, tree, code = _of(kvm)
    tree.run(cpu, kvm, code.tree_recover, slot=slot, reason=lib.REASON_REMOTE_RECOVER)
