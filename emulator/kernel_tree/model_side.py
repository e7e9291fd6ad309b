"""The model's TDP MMU, driven as its callers in mmu.c drive it, with one thread.

This process compares and does nothing else, so functions of emulator.kvm are replaced in it by others that
note a flush or a yield first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from emulator.kernel_tree.operations import (
    HUGE_RANGES,
    MOST_ROOTS,
    NPAGES,
    WATCHED,
    Operation,
    Point,
    host_writable,
)
from emulator.kernel_tree.replace import replace_function
from emulator.kernel_tree.sides import LEVEL, PFN, Event, Kind, Outcome, State
from emulator.kvm.kvm_host import KVM_MEM_LOG_DIRTY_PAGES, PG_LEVEL_4K
from emulator.kvm.mmu import tdp_dirty, tdp_iter, tdp_mmu, tdp_roots
from emulator.kvm.mmu.fault import RET_PF_FIXED, RET_PF_RETRY, RET_PF_SPURIOUS, KvmPageFault
from emulator.kvm.mmu.hugepage import kvm_mmu_hugepage_adjust
from emulator.kvm.mmu.spte import PfnAndRights, is_access_track_spte, is_last_spte, is_shadow_present_pte
from emulator.kvm.mmu.structs import KvmMmuPage, KvmMmuPageRole, KvmMmuRootInfo
from emulator.kvm.mmu.tdp_map import kvm_tdp_mmu_map, tdp_entry, tdp_mmu_set_spte_atomic
from emulator.kvm.structs import Kvm, KvmMemorySlot, KvmParams, Vcpu
from emulator.kvm.virt import requests, slots
from emulator.kvm.virt.kvm_main import kvm_create_vm, kvm_set_memory_region, kvm_vm_ioctl_create_vcpu
from emulator.machine.locks import MmuLock
from emulator.machine.runtime import Cpu, Machine, rcu_read_lock
from emulator.points import PointKind
from emulator.policy import Policy
from native import ffi, lib
from native.types import Custody, FlushReason, Gfn, Hfn, HostWritable, Hva, Level

_CONFIG: Final = {
    "pcpus": 1,
    "housekeeping": 3,
    "vms": 1,
    "vcpus": 1,
    "root_frames": 24,
    "table_frames": 256,
    "guest_frames": 3 * NPAGES,
    "guest_blocks": HUGE_RANGES + 1,
    "l1_ways": 4,
    "l2_entries": 0,
    "l2_ways": 12,
    "psc_entries": 0,
    "chaos": 0,
    "seed": 1,
}
# SPTEs per native call: all of a range, unless another CPU acts in its middle.
_WHOLE: Final = 1 << 20
_RETURNS: Final = frozenset({RET_PF_RETRY, RET_PF_FIXED, RET_PF_SPURIOUS})
_FLAGS: Final = (
    (lib.SPTE_READABLE, State.R),
    (lib.SPTE_WRITABLE, State.W),
    (lib.SPTE_EXECUTABLE, State.X),
)
_LEAF_FLAGS: Final = (
    (lib.SPTE_ACCESSED, State.A),
    (lib.SPTE_DIRTY, State.D),
    (1 << lib.SPTE_HOST_WRITABLE_BIT, State.HOST_WRITABLE),
    (1 << lib.SPTE_MMU_WRITABLE_BIT, State.MMU_WRITABLE),
)


class _Lock(MmuLock):
    """An mmu_lock that notes when it is taken and released, and lets another CPU in when a walk yields."""

    __slots__ = ("side",)

    def __init__(self, side: ModelSide) -> None:
        super().__init__(side.kvm.id)
        self.side = side

    def lock(self, cpu: Cpu, how: int) -> None:
        super().lock(cpu, how)
        self.side.note(cpu, Kind.LOCK, how)

    def unlock(self, cpu: Cpu) -> None:
        self.side.note(cpu, Kind.UNLOCK, cpu.mmu_lock_held)
        super().unlock(cpu)

    def needbreak(self, cpu: Cpu) -> bool:
        return False

    def cond_resched(self, cpu: Cpu, schedule: Callable[[], object] | None = None) -> None:
        how = cpu.mmu_lock_held
        point = self.side.point
        self.side.note(cpu, Kind.YIELD, point.gfn if point else 0, with_state=True)
        self.unlock(cpu)
        self.side.point_passed()
        self.lock(cpu, how)


class ModelSide:
    """A VM of one vCPU with two address spaces, which never runs."""

    def __init__(self, policy: Policy, *, ad_bits: bool) -> None:
        self.machine = Machine(_CONFIG)
        self.cpu, self.other_cpu, self.rcu = self.machine.cpus[1:4]
        for cpu in (self.cpu, self.other_cpu):
            lib.cpu_online(cpu.m, cpu.id)
        self.ad_bits = ad_bits
        params = KvmParams(fault_around=0, resched_chunks=0, eptad=ad_bits, chunk=_WHOLE)
        self.stepping = replace(params, chunk=1)
        self.whole = params
        self.kvm: Kvm = kvm_create_vm(self.cpu, NPAGES, policy, params)
        self.vcpu: Vcpu = kvm_vm_ioctl_create_vcpu(self.cpu, self.kvm)
        for space in (0, 1):
            kvm_set_memory_region(self.cpu, self.kvm, 0, Gfn(0), NPAGES, Hva(0), as_id=space)
        self.pages: list[tuple[Hfn, Custody]] = self._populate()
        self.kvm.mmu_lock = _Lock(self)
        self.events: list[Event] = []
        self.roots: list[KvmMmuPage] = []
        self.point: Point | None = None
        self.acting = self.cpu
        self.flushing = False
        self.cache: dict[tuple[int, int], int] = {}
        self.age_locked = policy.age_lock(self.cpu, self.kvm, Gfn(0)) == "mmu-lock"

    def close(self) -> None:
        """Free the machine."""
        self.machine.stop()
        self.machine.destroy()

    def _populate(self) -> list[tuple[Hfn, Custody]]:
        """Let the host allocate all pages, some of them huge; return frame and custody of each."""
        cpu, page = self.cpu, self.cpu.page
        pages: list[tuple[Hfn, Custody]] = []
        for gfn in range(NPAGES):
            cpu.check(lib.mm_fault(cpu.m, cpu.id, self.kvm.id, Hva(gfn), True, page))
        for first in range(0, HUGE_RANGES * 512, 512):
            cpu.check(lib.mm_collapse(cpu.m, cpu.id, self.kvm.id, Hva(first)))
        for gfn in range(NPAGES):
            cpu.check(lib.mm_fault(cpu.m, cpu.id, self.kvm.id, Hva(gfn), True, page))
            pages.append((page.hfn, page.tag))
        return pages

    @property
    def pfns(self) -> list[int]:
        return [hfn for hfn, _ in self.pages]

    # --- events ---------------------------------------------------------------------------------------------

    def note(self, cpu: Cpu, kind: Kind, a: int = 0, b: int = 0, *, with_state: bool = False) -> None:
        state = self.state() if with_state else None
        self.events.append(Event(kind, cpu.rcu_depth > 0, cpu.mmu_lock_held, a, b, state))

    def _instrument(self) -> None:
        """Replace the functions that other CPUs notice by those that note it first."""
        self.machine.install(self._at_point)
        side = self

        def kvm_flush_remote_tlbs(cpu: Cpu, kvm: Kvm, reason: FlushReason) -> None:
            side.note(cpu, Kind.FLUSH, with_state=True)

        def kvm_flush_remote_tlbs_range(
            cpu: Cpu, kvm: Kvm, gfn: Gfn, nr_pages: int, reason: FlushReason
        ) -> None:
            side.note(cpu, Kind.FLUSH_RANGE, gfn, nr_pages, with_state=True)

        def kvm_flush_remote_tlbs_memslot(
            cpu: Cpu, kvm: Kvm, slot: KvmMemorySlot, reason: FlushReason
        ) -> None:
            side.note(cpu, Kind.FLUSH_SLOT, slot.as_id, with_state=True)

        def mark_page_dirty_in_slot(cpu: Cpu, slot: KvmMemorySlot, gfn: Gfn) -> None:
            if slot.dirty_track_enabled():
                side.note(cpu, Kind.DIRTY, slot.as_id, gfn)

        replace_function(requests.kvm_flush_remote_tlbs, kvm_flush_remote_tlbs)
        replace_function(requests.kvm_flush_remote_tlbs_range, kvm_flush_remote_tlbs_range)
        replace_function(requests.kvm_flush_remote_tlbs_memslot, kvm_flush_remote_tlbs_memslot)
        replace_function(slots.mark_page_dirty_in_slot, mark_page_dirty_in_slot)
        replace_function(tdp_iter.need_resched, lambda kvm, it: side.need_resched(it))

    def _at_point(self, cpu: Cpu, kind: PointKind, obj: object, mode: str) -> None:
        if kind == "call_rcu":
            self.note(cpu, Kind.CALL_RCU)

    def need_resched(self, it: tdp_iter.TdpIter) -> bool:
        """Return whether the walk has to yield here; or let another CPU act beside it."""
        point = self.point
        if point is None or it.next_last_level_gfn < point.gfn:
            return False
        if point.yields:
            return True
        self.point_passed()
        return False

    def point_passed(self) -> None:
        point, self.point = self.point, None
        if point is not None and point.other is not None:
            before, self.acting = self.acting, self.other_cpu
            self._call(point.other)
            self.acting = before

    # --- the tables' contents -------------------------------------------------------------------------------

    def state(self) -> tuple[int, ...]:
        words: list[int] = []
        m, sptes, tables = self.cpu.m, ffi.new("uint64_t[]", 8), ffi.new("uint32_t[]", 8)
        for root in self.kvm.tdp_mmu_roots:
            words.append(root.role.smm | root.role.invalid << 1 | root.tdp_mmu_root_count.value << 8)
            for gfn in WATCHED:
                level = lib.tdp_mmu_get_walk(m, root.hfn, root.role.level, Gfn(gfn), sptes, tables)
                words.append(self._spelled(sptes[level], level))
        return tuple(words)

    def _spelled(self, spte: int, level: Level) -> int:
        key = spte, level
        if key not in self.cache:
            self.cache[key] = self._normal(spte, level)
        return self.cache[key]

    def _normal(self, spte: int, level: Level) -> int:
        state = level * LEVEL
        if spte == lib.FROZEN_SPTE:
            return state | State.FROZEN
        if not is_shadow_present_pte(spte):
            return state
        state |= State.PRESENT
        state |= sum(flag for bit, flag in _FLAGS if spte & bit)
        if not is_last_spte(spte, level):
            return state
        state |= State.LEAF
        state |= sum(flag for bit, flag in _LEAF_FLAGS if spte & bit)
        state |= State.TRACKED if is_access_track_spte(spte) else 0
        if not self.ad_bits:
            state &= ~int(State.A | State.D)
        return int(state) | (spte >> lib.SPTE_HFN_SHIFT & 0xFFFFFF) * PFN

    # --- running --------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin a sequence: the VM of the one before is emptied."""
        self._instrument()
        for root in self.roots:
            with self.kvm.mmu_lock.read_lock(self.cpu):
                tdp_roots.kvm_tdp_mmu_put_root(self.cpu, self.kvm, root)
        self.roots = []
        with self.kvm.mmu_lock.write_lock(self.cpu):
            tdp_roots.kvm_tdp_mmu_invalidate_roots(self.cpu, self.kvm)
        tdp_mmu.kvm_tdp_mmu_zap_invalidated_roots(self.cpu, self.kvm, shared=True)
        self._callbacks()
        if self.kvm.tdp_mmu_roots or self._tables():
            raise AssertionError(f"the model keeps {self.kvm.tdp_mmu_roots} and {self._tables()} tables")
        for space in (0, 1):
            self._set_logging(space, on=False)

    def run(self, operation: Operation) -> Outcome:
        self.events = []
        self.point = operation.point
        self.kvm.params = self.stepping if operation.point else self.whole
        returned = self._call(operation)
        self.point = None
        self._callbacks()
        complaints = () if self.acting is self.cpu else ("another CPU has not finished",)
        return Outcome(returned, tuple(self.events), self.state(), self._tables(), complaints)

    def _call(self, operation: Operation) -> int:
        return int(getattr(self, f"_{operation.name}")(self.acting, operation) or 0)

    def _callbacks(self) -> None:
        m = self.cpu.m
        while lib.rcu_pending(m):
            lib.rcu_gp_begin(m, self.rcu.id)
            if lib.rcu_gp_end(m, self.rcu.id) < 0:
                raise AssertionError("an operation ends inside RCU")

    def _tables(self) -> int:
        m = self.cpu.m
        return lib.frames_in_use(m, lib.FRAME_ROOT) + lib.frames_in_use(m, lib.FRAME_TABLE)

    def slot(self, space: int) -> KvmMemorySlot:
        return self.kvm.memslots[space].by_id[0]

    def _set_logging(self, space: int, *, on: bool) -> None:
        slot = self.slot(space)
        slot.flags = KVM_MEM_LOG_DIRTY_PAGES if on else 0
        slot.dirty_bitmap = bytearray(NPAGES) if on else None

    # --- the operations -------------------------------------------------------------------------------------

    def _alloc_root(self, cpu: Cpu, one: Operation) -> None:
        if len(self.roots) < MOST_ROOTS:
            role = KvmMmuPageRole(smm=one["space"])
            self.roots.append(tdp_roots.kvm_tdp_mmu_alloc_root(cpu, self.kvm, role))

    def _put_root(self, cpu: Cpu, one: Operation) -> None:
        if one["root"] < len(self.roots):
            with self.kvm.mmu_lock.read_lock(cpu):
                tdp_roots.kvm_tdp_mmu_put_root(cpu, self.kvm, self.roots.pop(one["root"]))

    def _map(self, cpu: Cpu, one: Operation) -> int:
        if one["root"] >= len(self.roots) or self.roots[one["root"]].role.invalid:
            return -1
        root, gfn = self.roots[one["root"]], one["gfn"]
        hfn, tag = self.pages[gfn]
        writable = host_writable(gfn)
        access = lib.ACCESS_WRITE if one["write"] and writable else lib.ACCESS_READ
        fault = KvmPageFault(gfn << 12, access, present=False)
        fault.slot = self.slot(root.role.smm)
        fault.pfn = PfnAndRights(hfn, tag, HostWritable(writable))
        fault.max_level = Level(one["level"])
        self.vcpu.mmu.root = KvmMmuRootInfo(pgd=0, hfn=root.hfn, sp=root)
        try:
            with self.kvm.mmu_lock.read_lock(cpu):
                kvm_mmu_hugepage_adjust(cpu, self.kvm, fault)
                returned = kvm_tdp_mmu_map(cpu, self.vcpu, fault)
        finally:
            self.vcpu.mmu.root = None
        assert returned in _RETURNS
        return returned

    def _touch(self, cpu: Cpu, one: Operation) -> int:
        if one["root"] >= len(self.roots):
            return -1
        root, gfn = self.roots[one["root"]], one["gfn"]
        with rcu_read_lock(cpu):
            entry = tdp_entry(cpu, root, Gfn(gfn), PG_LEVEL_4K)
            needed = lib.SPTE_WRITABLE if one["write"] else lib.SPTE_READABLE
            if not is_last_spte(entry.spte, entry.level) or not entry.spte & needed:
                return 0
            new_spte = entry.spte | lib.SPTE_ACCESSED | (lib.SPTE_DIRTY if one["write"] else 0)
            if new_spte != entry.spte:
                assert tdp_mmu_set_spte_atomic(cpu, self.kvm, entry, new_spte)
        return 1

    def _zap_leafs(self, cpu: Cpu, one: Operation) -> int:
        reason = lib.REASON_REMOTE_ZAP
        with self.kvm.mmu_lock.write_lock(cpu):
            return tdp_mmu.kvm_tdp_mmu_zap_leafs(
                cpu, self.kvm, Gfn(one["start"]), Gfn(one["end"]), bool(one["flush"]), reason
            )

    def _unmap(self, cpu: Cpu, one: Operation) -> int:
        slot = self.slot(one["space"])
        with self.kvm.mmu_lock.write_lock(cpu):
            return tdp_mmu.kvm_tdp_mmu_unmap_gfn_range(
                cpu,
                self.kvm,
                slot,
                Gfn(one["start"]),
                Gfn(one["end"]),
                bool(one["flush"]),
                lib.REASON_REMOTE_NOTIFIER,
                bool(one["may_block"]),
            )

    def _age(self, cpu: Cpu, one: Operation) -> int:
        slot, lock = self.slot(one["space"]), self.kvm.mmu_lock
        if not self.age_locked:
            return tdp_mmu.kvm_tdp_mmu_age_gfn_range(cpu, self.kvm, slot, Gfn(one["start"]), Gfn(one["end"]))
        with lock.write_lock(cpu):
            return tdp_mmu.kvm_tdp_mmu_age_gfn_range(cpu, self.kvm, slot, Gfn(one["start"]), Gfn(one["end"]))

    def _wrprot_slot(self, cpu: Cpu, one: Operation) -> int:
        with self.kvm.mmu_lock.read_lock(cpu):
            return tdp_dirty.kvm_tdp_mmu_wrprot_slot(
                cpu, self.kvm, self.slot(one["space"]), Level(one["level"])
            )

    def _write_protect_gfn(self, cpu: Cpu, one: Operation) -> int:
        slot = self.slot(one["space"])
        with self.kvm.mmu_lock.write_lock(cpu):
            return tdp_dirty.kvm_tdp_mmu_write_protect_gfn(
                cpu, self.kvm, slot, Gfn(one["gfn"]), Level(one["level"])
            )

    def _clear_dirty(self, cpu: Cpu, one: Operation) -> None:
        slot = self.slot(one["space"])
        with self.kvm.mmu_lock.write_lock(cpu):
            tdp_dirty.kvm_tdp_mmu_clear_dirty_pt_masked(cpu, self.kvm, slot, Gfn(one["gfn"]), one["mask"])

    def _split(self, cpu: Cpu, one: Operation) -> None:
        lock, slot = self.kvm.mmu_lock, self.slot(one["space"])
        with lock.read_lock(cpu) if one["shared"] else lock.write_lock(cpu):
            tdp_dirty.kvm_tdp_mmu_try_split_huge_pages(
                cpu,
                self.kvm,
                slot,
                Gfn(one["start"]),
                Gfn(one["end"]),
                PG_LEVEL_4K,
                shared=bool(one["shared"]),
            )

    def _recover(self, cpu: Cpu, one: Operation) -> None:
        slot = self.slot(one["space"])
        if not slot.dirty_track_enabled():
            with self.kvm.mmu_lock.read_lock(cpu):
                tdp_dirty.kvm_tdp_mmu_recover_huge_pages(cpu, self.kvm, slot)

    def _logging(self, cpu: Cpu, one: Operation) -> None:
        self._set_logging(one["space"], on=bool(one["on"]))

    def _invalidate_roots(self, cpu: Cpu, one: Operation) -> None:
        with self.kvm.mmu_lock.write_lock(cpu):
            tdp_roots.kvm_tdp_mmu_invalidate_roots(cpu, self.kvm)

    def _zap_invalidated_roots(self, cpu: Cpu, one: Operation) -> None:
        tdp_mmu.kvm_tdp_mmu_zap_invalidated_roots(cpu, self.kvm, shared=True)
