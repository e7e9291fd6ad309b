"""arch/x86/kvm/mmu/tdp_iter.[ch] and the yielding of tdp_mmu.c: walks over the SPTEs of a range.

The SPTE loop itself is native and does `params.chunk` SPTEs a call, always starting from the root; between
two calls the code here decides whether to yield, in which order, and with which flush.
"""

from __future__ import annotations

from dataclasses import dataclass

from emulator.kvm.accounting import flush_elided
from emulator.kvm.host_work import host_works
from emulator.kvm.kvm_host import SPTE_ENT_PER_PAGE, SPTE_LEVEL_BITS
from emulator.kvm.mmu.structs import KvmMmuPage
from emulator.kvm.structs import Kvm
from emulator.kvm.virt.requests import kvm_flush_remote_tlbs
from emulator.machine.runtime import Cpu, rcu_enter, rcu_leave
from native import ffi, lib
from native.types import FlushReason, Gfn, Hfn, Level, SpteIndex


@dataclass(slots=True)
class Entry:
    """The position of a walk: the SPTE, its table page, index and level, and the first gfn that it covers."""

    spte: int
    table: Hfn
    level: Level
    gfn: Gfn

    @property
    def index(self) -> SpteIndex:
        """SPTE_INDEX()"""
        return SpteIndex(self.gfn >> SPTE_LEVEL_BITS * (self.level - 1) & SPTE_ENT_PER_PAGE - 1)


class TdpIter:
    """struct tdp_iter over [start, end): the kind of a walk (enum tdp_walk) and its progress.

    After a yield the iterator needs no restart: every step walks down from the root again.
    """

    __slots__ = ("chunk", "chunks_since_yield", "looked_at", "reason", "root", "shared", "yielded_gfn")

    def __init__(
        self,
        root: KvmMmuPage,
        walk: int,
        start: Gfn,
        end: Gfn,
        *,
        shared: bool,
        level: Level = lib.PG_LEVEL_4K,
        mask: int = 0,
        reason: FlushReason = lib.REASON_OTHER,
    ) -> None:
        self.root = root
        self.shared = shared
        self.reason = reason  # of a flush at a yield
        self.chunks_since_yield = 0
        self.looked_at = 0  # SPTEs of the incomplete chunk so far
        self.yielded_gfn = start
        self.chunk = ffi.new("struct tdp_chunk *")
        chunk = self.chunk
        chunk.root = root.hfn
        chunk.root_level = root.role.level
        chunk.root_link = root.parent_spte
        chunk.walk = walk
        chunk.level = level
        chunk.shared = shared
        chunk.next_gfn = start
        chunk.end_gfn = end
        chunk.mask = mask

    @property
    def done(self) -> bool:
        return bool(self.chunk.done)

    @property
    def next_last_level_gfn(self) -> Gfn:
        return self.chunk.next_gfn

    @property
    def old_spte(self) -> int:
        """iter->old_spte of each SPTE that the last step changed, OR'ed together.

        A bit that is clear here was clear in all of them.  Under `explore` a step changes one SPTE at most.
        """
        return int(self.chunk.old_spte)

    def step(self, cpu: Cpu, kvm: Kvm) -> int:
        """Process up to params.chunk SPTEs, or with params.single stop at the first that changes; return how
        many changed.

        A frozen SPTE in the way ends the step early; the next step reads it again.
        """
        assert cpu.rcu_depth, "suspicious RCU usage: tables are walked outside of a read section"
        cpu.point("sptes", (self.root.hfn, self.chunk.next_gfn), "write")
        most = kvm.params.chunk - self.looked_at
        self.chunk.most_changed = kvm.params.single
        cpu.check(lib.tdp_walk_chunk(cpu.m, cpu.id, kvm.id, self.chunk, most))
        self.looked_at += self.chunk.looked_at
        # A step that only a change cut short has not completed its chunk.
        cut = kvm.params.single and not (self.chunk.done or self.chunk.found_level)
        if not cut or self.looked_at >= kvm.params.chunk:
            self.chunks_since_yield += 1
            self.looked_at = 0
        return int(self.chunk.changed)

    def found(self) -> Entry | None:
        """Return the entry at which the last step stopped: a TDP_FIND_ walk's match, or an unlinked table."""
        chunk = self.chunk
        if not chunk.found_level:
            return None
        return Entry(chunk.found_spte, chunk.found_table, chunk.found_level, chunk.found_gfn)

    def retry(self, gfn: Gfn) -> None:
        """Process gfn again, as `goto retry` in the kernel's loops."""
        self.chunk.next_gfn = gfn
        self.chunk.done = 0


def need_resched(kvm: Kvm, it: TdpIter) -> bool:
    """need_resched() (include/linux/sched.h): return whether another thread is due on this CPU.

    It is every resched_chunks chunks.
    """
    return 0 < kvm.params.resched_chunks <= it.chunks_since_yield


def tdp_mmu_iter_cond_resched(cpu: Cpu, kvm: Kvm, it: TdpIter, flush: bool) -> bool:
    """tdp_mmu_iter_cond_resched(): drop mmu_lock and RCU if another thread needs the CPU or the lock; return
    whether it did.  It never yields twice without progress in between.

    After a yield no flush is pending: the caller sets its own `flush` to False, and the walk goes on from the
    root.  Decision zap_yield: the order of flush and unlock matters, because RCU callbacks free table pages,
    and they wait only as long as this thread is a reader.
    """
    if it.next_last_level_gfn == it.yielded_gfn:
        return False
    scheduled = need_resched(kvm, it)
    if not scheduled and not kvm.mmu_lock.needbreak(cpu):
        return False
    order = kvm.policy.zap_yield(cpu, kvm)
    if flush and order == "flush-then-unlock":
        kvm_flush_remote_tlbs(cpu, kvm, it.reason)
    rcu_leave(cpu)
    if flush and order == "unlock-then-flush":
        kvm_flush_remote_tlbs(cpu, kvm, it.reason)
    if flush and order == "no-flush":
        flush_elided(cpu, kvm, it.reason, it.next_last_level_gfn)
    cpu.stat(kvm.id, lib.STAT_YIELDS)
    cpu.stat(kvm.id, lib.STAT_YIELDS_PENDING, flush)
    cpu.event(lib.EVENT_YIELD, kvm.id, flush and order != "no-flush", kvm.id)
    valid = not it.root.role.invalid
    # The other thread's turn takes as long as any work of the host.
    kvm.mmu_lock.cond_resched(cpu, (lambda: host_works(cpu, kvm)) if scheduled else None)
    rcu_enter(cpu)
    cpu.stat(kvm.id, lib.STAT_YIELDS_INVALIDATED, valid and it.root.role.invalid)
    it.chunks_since_yield = it.looked_at = 0
    it.yielded_gfn = it.next_last_level_gfn
    return True
