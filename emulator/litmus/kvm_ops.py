"""Operations of litmus tests on the threads of ioctl callers and of the host's memory management.

Host pages are those of the VMM's address space, which memslot 0 maps one to one: page 0x10 of the guest
is page 0x10 of user memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from emulator.kvm.kvm_host import KVM_MEM_LOG_DIRTY_PAGES
from emulator.kvm.mmu.mmu import kvm_mmu_zap_all_fast, kvm_zap_gfn_range
from emulator.kvm.virt.kvm_main import (
    kvm_flush_remote_tlbs,
    kvm_mmu_notifier_clear_flush_young,
    kvm_mmu_notifier_clear_young,
    kvm_mmu_notifier_invalidate_range_end,
    kvm_mmu_notifier_invalidate_range_start,
    kvm_set_memory_region,
    kvm_vm_ioctl_clear_dirty_log,
    kvm_vm_ioctl_get_dirty_log,
)
from emulator.litmus.migration import WORD, Migration
from emulator.litmus.syntax import HUGE_PAGES, Arg, Context, KvmOp, Op, check_huge
from native import lib

if TYPE_CHECKING:
    from emulator.kvm.structs import Kvm
    from emulator.litmus.model import LitmusTest
    from emulator.machine.runtime import Cpu

SLOT = 0
SMM_SLOT = 1
_LINGER_MICROSECONDS = 150
# Far below the time after which a thread counts as stuck.
_MOST_LINGERS = 10_000
_RANGE = (Arg("page", "page"), Arg("count", "count", 1))
_PAGE = (Arg("page", "page"),)


class _Range(KvmOp):
    args: ClassVar[tuple[Arg, ...]] = _RANGE

    def range(self) -> tuple[int, int]:
        """Return the range [start, end) in pages."""
        start = self.number("page")
        return start, start + self.number("count")


# --- the host's memory management ---------------------------------------------------------------------------


class HostUnmap(_Range):
    verb = "host-unmap"
    doc = "reclaim: mmu_notifier, then the frames of PAGE (COUNT pages) are free; contents go to swap"

    def run(self, context: Context) -> None:
        context.memory.reclaim(context.cpu, *self.range())


class HostDiscard(_Range):
    verb = "host-discard"
    doc = "MADV_DONTNEED: the same, contents are lost (a balloon)"

    def run(self, context: Context) -> None:
        context.memory.discard(context.cpu, *self.range())


class HostTouch(_Range):
    verb = "host-touch"
    doc = "user space writes to PAGE: takes frames, those first that were freed last"

    def run(self, context: Context) -> None:
        cpu, vm = context.cpu, context.kvm.id
        for page in range(*self.range()):
            rc = lib.mm_fault(cpu.m, cpu.id, vm, page, 1, cpu.page)
            if rc != lib.MACHINE_AGAIN:
                cpu.check(rc)


class HostProtect(_Range):
    verb = "host-protect"
    doc = "mprotect(PROT_READ), or KSM: nobody writes to the pages any more"

    def run(self, context: Context) -> None:
        context.memory.protect(context.cpu, *self.range(), writable=False)


class HostUnprotect(_Range):
    verb = "host-unprotect"
    doc = "mprotect(PROT_READ | PROT_WRITE)"

    def run(self, context: Context) -> None:
        context.memory.protect(context.cpu, *self.range(), writable=True)


class HostMigrate(_Range):
    verb = "host-migrate"
    doc = "migrate_pages(): each page to another frame, the old one is free"

    def run(self, context: Context) -> None:
        context.memory.migrate(context.cpu, *self.range())


class _Huge(KvmOp):
    args = _PAGE

    def check(self, test: LitmusTest, thread: str) -> None:
        super().check(test, thread)
        check_huge(self, "page")

    def span(self) -> int:
        return HUGE_PAGES


class HostCollapse(_Huge):
    verb = "host-collapse"
    doc = "khugepaged: one 2 MiB page for the 512 pages from PAGE on"

    def run(self, context: Context) -> None:
        context.memory.collapse(context.cpu, self.number("page"))


class HostSplit(_Huge):
    verb = "host-split"
    doc = "__split_huge_pmd(): the same frames mapped by 4 KiB pages"

    def run(self, context: Context) -> None:
        context.memory.split(context.cpu, self.number("page"))


class HostAge(_Range):
    verb = "host-age"
    doc = "clear_young: were the pages used since the last time?"

    def run(self, context: Context) -> None:
        kvm_mmu_notifier_clear_young(context.cpu, context.kvm, *self.range())


class HostAgeReclaim(_Range):
    verb = "host-age-reclaim"
    doc = "clear_flush_young: reclaim asks the same; decision age_flush"

    def run(self, context: Context) -> None:
        kvm_mmu_notifier_clear_flush_young(context.cpu, context.kvm, *self.range())


class NotifierStart(_Range):
    verb = "notifier-start"
    doc = "only mmu_notifier_invalidate_range_start(), for tests that look between it and the end"

    def run(self, context: Context) -> None:
        kvm_mmu_notifier_invalidate_range_start(context.cpu, context.kvm, *self.range())


class NotifierFree(_Range):
    verb = "notifier-free"
    doc = (
        "what reclaim does between notifier-start and notifier-end: the frames are free; without them it is "
        "a host that forgets the mmu_notifier"
    )

    def run(self, context: Context) -> None:
        cpu = context.cpu
        lib.mm_unmap(cpu.m, cpu.id, context.kvm.id, *self.range(), 1)


class NotifierEnd(_Range):
    verb = "notifier-end"
    doc = "only mmu_notifier_invalidate_range_end()"

    def run(self, context: Context) -> None:
        kvm_mmu_notifier_invalidate_range_end(context.cpu, context.kvm, *self.range())


# --- ioctls -------------------------------------------------------------------------------------------------


class Zap(_Range):
    verb = "zap"
    doc = "kvm_zap_gfn_range()"

    def run(self, context: Context) -> None:
        kvm_zap_gfn_range(context.cpu, context.kvm, *self.range())


class ZapAll(KvmOp):
    verb = "zap-all"
    doc = "kvm_mmu_zap_all_fast(): all roots are invalidated and replaced"

    def run(self, context: Context) -> None:
        with context.kvm.slots_lock.held(context.cpu):
            kvm_mmu_zap_all_fast(context.cpu, context.kvm)


class FlushRemote(KvmOp):
    verb = "flush-remote"
    doc = "kvm_flush_remote_tlbs()"

    def run(self, context: Context) -> None:
        kvm_flush_remote_tlbs(context.cpu, context.kvm, lib.REASON_OTHER)


class SlotDelete(KvmOp):
    verb = "slot-delete"
    doc = "KVM_SET_USER_MEMORY_REGION: memslot 0 is deleted; if it was logged, the migration is given up"

    def run(self, context: Context) -> None:
        with context.migration.given_up(context.cpu):
            kvm_set_memory_region(context.cpu, context.kvm, SLOT, 0, 0, 0)


class SlotCreate(KvmOp):
    verb = "slot-create"
    doc = "... and created again"

    def run(self, context: Context) -> None:
        slot = context.migration.slots[0]
        kvm_set_memory_region(context.cpu, context.kvm, slot.id, 0, slot.npages, 0)


def _set_logging(context: Context, flags: int) -> None:
    for slot in context.migration.slots:
        kvm_set_memory_region(context.cpu, context.kvm, slot.id, 0, slot.npages, 0, flags, slot.as_id)


class LogArm(KvmOp):
    verb = "log-arm"
    doc = "dirty logging of memslot 0, and of its like in SMM, begins; user space copies all memory"

    def run(self, context: Context) -> None:
        _set_logging(context, KVM_MEM_LOG_DIRTY_PAGES)
        context.migration.begin(context.cpu)


class LogDisarm(KvmOp):
    verb = "log-disarm"
    doc = "dirty logging ends, huge pages are recovered; user space gives its migration up"

    def run(self, context: Context) -> None:
        with context.migration.given_up(context.cpu):
            _set_logging(context, 0)


class LogGet(KvmOp):
    verb = "log-get"
    doc = "KVM_GET_DIRTY_LOG; user space copies the pages that it names (with manual protection, owes them)"

    def run(self, context: Context) -> None:
        read_dirty_logs(context.cpu, context.kvm, context.migration)


class LogClear(KvmOp):
    verb = "log-clear"
    doc = (
        "KVM_CLEAR_DIRTY_LOG of the 64 pages around PAGE: those that log-get has named and that were not "
        "cleared since, or all if it was not called; user space copies them"
    )
    args = _PAGE

    def run(self, context: Context) -> None:
        cpu, migration, number = context.cpu, context.migration, self.number("page") // WORD
        for slot in migration.slots:
            pages = min(WORD, slot.npages - WORD * number)
            if pages <= 0:
                continue
            wanted = migration.wanted(cpu, slot, number) & (1 << pages) - 1
            kvm_vm_ioctl_clear_dirty_log(
                cpu, context.kvm, slot.id, WORD * number, pages, [wanted], slot.as_id
            )
            migration.cleared(cpu, slot, number, wanted)


def read_dirty_logs(cpu: Cpu, kvm: Kvm, migration: Migration) -> None:
    """Read the logs of all slots, and copy the pages that they name."""
    for slot in migration.slots:
        migration.named(cpu, slot, kvm_vm_ioctl_get_dirty_log(cpu, kvm, slot.id, slot.as_id))


class Rcu(KvmOp):
    verb = "rcu"
    doc = "rcu_barrier(): all callbacks queued so far have run, pages left to RCU are free"

    def run(self, context: Context) -> None:
        context.cpu.check(lib.rcu_barrier(context.cpu.m, context.cpu.id))


class Linger(KvmOp):
    verb = "linger"
    doc = "give the others time, TIMES as long; `explore` gives it them anyway"
    args = (Arg("times", "count", 1, _MOST_LINGERS),)

    def run(self, context: Context) -> None:
        cpu, microseconds = context.cpu, self.number("times") * _LINGER_MICROSECONDS
        cpu.check(lib.cpu_wait_event(cpu.m, cpu.id, lib.cpu_event(cpu.m, cpu.id), microseconds))


KVM_OPS: tuple[type[Op], ...] = (
    HostUnmap,
    HostDiscard,
    HostTouch,
    HostProtect,
    HostUnprotect,
    HostMigrate,
    HostCollapse,
    HostSplit,
    HostAge,
    HostAgeReclaim,
    NotifierStart,
    NotifierFree,
    NotifierEnd,
    Zap,
    ZapAll,
    FlushRemote,
    SlotDelete,
    SlotCreate,
    LogArm,
    LogDisarm,
    LogGet,
    LogClear,
    Rcu,
    Linger,
)
