"""Operations of litmus tests on the threads of ioctl callers and of the host's memory management.

Host pages are those of the VMM's address space, which memslot 0 maps one to one: page 0x10 of the guest
is page 0x10 of user memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from emulator.errors import shown
from emulator.kvm.kvm_host import KVM_MEM_LOG_DIRTY_PAGES
from emulator.kvm.mmu.mmu import kvm_mmu_zap_all_fast, kvm_zap_gfn_range
from emulator.kvm.reset import apic_send_init
from emulator.kvm.smm import kvm_inject_smi
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
from emulator.litmus.syntax import Arg, Context, KvmOp, Op, OpError, check_huge
from emulator.machine.runtime import HPAGE_PMD_NR
from native import lib
from native.types import Gfn, Hva

if TYPE_CHECKING:
    from emulator.kvm.structs import Kvm
    from emulator.litmus.model import LitmusTest
    from emulator.machine.runtime import Cpu

SLOT = 0
SMM_SLOT = 1
DEVICE_SLOT = 2
_LINGER_MICROSECONDS = 150
# Far below the time after which a thread counts as stuck.
_MOST_LINGERS = 10_000
_RANGE = (Arg("page", "page"), Arg("count", "count", 1))
_PAGE = (Arg("page", "page"),)


class _Range(KvmOp):
    args: ClassVar[tuple[Arg, ...]] = _RANGE

    def range(self) -> tuple[Hva, Hva]:
        """Return the range [start, end) in pages of user space's memory."""
        start = Hva(self.number("page"))
        return start, start + self.number("count")


# --- the host's memory management ---------------------------------------------------------------------------


class HostUnmap(_Range):
    verb = "host-unmap"
    doc = (
        "Reclaim: the mmu_notifier is called, then the frames of COUNT pages from PAGE on are freed. Their "
        "contents go to swap."
    )

    def run(self, context: Context) -> None:
        context.memory.reclaim(context.cpu, *self.range())


class HostDiscard(_Range):
    verb = "host-discard"
    doc = (
        "MADV_DONTNEED (a balloon): the mmu_notifier is called, then the frames of COUNT pages from PAGE on "
        "are freed. Their contents are lost."
    )

    def run(self, context: Context) -> None:
        context.memory.discard(context.cpu, *self.range())


class HostTouch(_Range):
    verb = "host-touch"
    doc = "User space writes to COUNT pages from PAGE on, which takes frames, the last freed ones first."

    def run(self, context: Context) -> None:
        cpu, vm = context.cpu, context.kvm.id
        for page in range(*self.range()):
            rc = lib.mm_fault(cpu.m, cpu.id, vm, Hva(page), True, cpu.page)
            if rc != lib.MACHINE_AGAIN:
                cpu.check(rc)


class HostProtect(_Range):
    verb = "host-protect"
    doc = "mprotect(PROT_READ), or a merge by KSM: the pages must not be written any more."

    def run(self, context: Context) -> None:
        context.memory.protect(context.cpu, *self.range(), writable=False)


class HostUnprotect(_Range):
    verb = "host-unprotect"
    doc = "mprotect(PROT_READ | PROT_WRITE): the pages may be written again."

    def run(self, context: Context) -> None:
        context.memory.protect(context.cpu, *self.range(), writable=True)


class HostMigrate(_Range):
    verb = "host-migrate"
    doc = "migrate_pages(): each page moves to another frame, and the old frame is freed."

    def run(self, context: Context) -> None:
        context.memory.migrate(context.cpu, *self.range())


class _Huge(KvmOp):
    args = _PAGE

    def check(self, test: LitmusTest, thread: str) -> None:
        super().check(test, thread)
        check_huge(self, "page")

    def span(self) -> int:
        return HPAGE_PMD_NR


class HostCollapse(_Huge):
    verb = "host-collapse"
    doc = "khugepaged: one 2 MiB page replaces the 512 pages from PAGE on."

    def run(self, context: Context) -> None:
        context.memory.collapse(context.cpu, Hva(self.number("page")))


class HostSplit(_Huge):
    verb = "host-split"
    doc = "__split_huge_pmd(): 4 KiB pages map the frames of a 2 MiB page."

    def run(self, context: Context) -> None:
        context.memory.split(context.cpu, Hva(self.number("page")))


class HostAge(_Range):
    verb = "host-age"
    doc = "clear_young: the host asks whether COUNT pages from PAGE on were used since it last asked."

    def run(self, context: Context) -> None:
        kvm_mmu_notifier_clear_young(context.cpu, context.kvm, *self.range())


class HostAgeReclaim(_Range):
    verb = "host-age-reclaim"
    doc = (
        "clear_flush_young: reclaim asks whether COUNT pages from PAGE on were used since it last asked; "
        "decision age_flush."
    )

    def run(self, context: Context) -> None:
        kvm_mmu_notifier_clear_flush_young(context.cpu, context.kvm, *self.range())


class NotifierStart(_Range):
    verb = "notifier-start"
    doc = "mmu_notifier_invalidate_range_start() alone, for tests that look between it and notifier-end."

    def run(self, context: Context) -> None:
        kvm_mmu_notifier_invalidate_range_start(context.cpu, context.kvm, *self.range())


class NotifierFree(_Range):
    verb = "notifier-free"
    doc = (
        "The host frees the frames of COUNT pages from PAGE on, as reclaim does between notifier-start and "
        "notifier-end. Without those it is a host that does not call the mmu_notifier."
    )

    def run(self, context: Context) -> None:
        cpu = context.cpu
        lib.mm_unmap(cpu.m, cpu.id, context.kvm.id, *self.range(), True)


class NotifierEnd(_Range):
    verb = "notifier-end"
    doc = "mmu_notifier_invalidate_range_end() alone."

    def run(self, context: Context) -> None:
        kvm_mmu_notifier_invalidate_range_end(context.cpu, context.kvm, *self.range())


# --- ioctls -------------------------------------------------------------------------------------------------


class Zap(_Range):
    verb = "zap"
    doc = (
        "kvm_zap_gfn_range() of COUNT pages from PAGE on. KVM zaps whole huge pages: if a range ends within "
        "one, a fault next to the range may map the huge page again meanwhile."
    )

    def run(self, context: Context) -> None:
        start, end = map(Gfn, self.range())  # slot 0 begins at gfn 0 and at page 0 of the memory
        kvm_zap_gfn_range(context.cpu, context.kvm, start, end)


class ZapAll(KvmOp):
    verb = "zap-all"
    doc = "kvm_mmu_zap_all_fast(): all roots are invalidated and replaced."

    def run(self, context: Context) -> None:
        with context.kvm.slots_lock.held(context.cpu):
            kvm_mmu_zap_all_fast(context.cpu, context.kvm)


class FlushRemote(KvmOp):
    verb = "flush-remote"
    doc = "kvm_flush_remote_tlbs()."

    def run(self, context: Context) -> None:
        kvm_flush_remote_tlbs(context.cpu, context.kvm, lib.REASON_OTHER)


class _Send(KvmOp):
    """An event for a vCPU from another processor; the sender does not wait until it is served."""

    args = (Arg("vcpu", "number"),)

    def check(self, test: LitmusTest, thread: str) -> None:
        super().check(test, thread)
        number = test.threads[thread].vm
        if self.number("vcpu") >= test.vm[number].vcpus:
            raise OpError(shown(self.text), f"a vCPU of VM {number}, which has {test.vm[number].vcpus}")


class SendSmi(_Send):
    verb = "send-smi"
    doc = (
        "Another processor sends an SMI to vCPU VCPU: an IPI of that delivery mode. A vCPU that is in guest "
        "mode is kicked."
    )

    def run(self, context: Context) -> None:
        kvm_inject_smi(context.cpu, context.kvm.vcpus[self.number("vcpu")])


class SendInit(_Send):
    verb = "send-init"
    doc = (
        "Another processor sends an INIT to vCPU VCPU, as for kexec. A vCPU that is in guest mode is kicked."
    )

    def run(self, context: Context) -> None:
        apic_send_init(context.cpu, context.kvm.vcpus[self.number("vcpu")])


class _Device(KvmOp):
    """An ioctl for memslot 2."""

    def check(self, test: LitmusTest, thread: str) -> None:
        super().check(test, thread)
        number = test.threads[thread].vm
        if not test.vm[number].device:
            raise OpError(shown(self.text), f"device = 1 or more pages in VM {number}")

    def set_pages(self, context: Context, npages: int) -> None:
        base = context.vm.device_gfn
        kvm_set_memory_region(context.cpu, context.kvm, DEVICE_SLOT, Gfn(base), npages, Hva(base))


class DeviceUnplug(_Device):
    verb = "device-unplug"
    doc = "KVM_SET_USER_MEMORY_REGION deletes memslot 2, the memory of a device, which is there at first."

    def run(self, context: Context) -> None:
        self.set_pages(context, 0)


class DevicePlug(_Device):
    verb = "device-plug"
    doc = "KVM_SET_USER_MEMORY_REGION creates memslot 2 again."

    def run(self, context: Context) -> None:
        self.set_pages(context, context.vm.device)


class SlotDelete(KvmOp):
    verb = "slot-delete"
    doc = "KVM_SET_USER_MEMORY_REGION deletes memslot 0. If it was logged, user space gives its migration up."

    def run(self, context: Context) -> None:
        with context.migration.given_up(context.cpu):
            kvm_set_memory_region(context.cpu, context.kvm, SLOT, Gfn(0), 0, Hva(0))


class SlotCreate(KvmOp):
    verb = "slot-create"
    doc = "KVM_SET_USER_MEMORY_REGION creates memslot 0 again."

    def run(self, context: Context) -> None:
        slot = context.migration.slots[0]
        kvm_set_memory_region(context.cpu, context.kvm, slot.id, Gfn(0), slot.npages, Hva(0))


def _set_logging(context: Context, flags: int) -> None:
    for slot in context.migration.slots:
        kvm_set_memory_region(
            context.cpu, context.kvm, slot.id, Gfn(0), slot.npages, Hva(0), flags, slot.as_id
        )


class LogArm(KvmOp):
    verb = "log-arm"
    doc = "Dirty logging of memslot 0, and of the same memory in SMM, begins; user space copies all memory."

    def run(self, context: Context) -> None:
        _set_logging(context, KVM_MEM_LOG_DIRTY_PAGES)
        context.migration.begin(context.cpu)


class LogDisarm(KvmOp):
    verb = "log-disarm"
    doc = "Dirty logging ends, and huge pages are recovered; user space gives its migration up."

    def run(self, context: Context) -> None:
        with context.migration.given_up(context.cpu):
            _set_logging(context, 0)


class LogGet(KvmOp):
    verb = "log-get"
    doc = (
        "KVM_GET_DIRTY_LOG; user space copies the pages that the log reports (with manual protection: once "
        "they are cleared)."
    )

    def run(self, context: Context) -> None:
        read_dirty_logs(context.cpu, context.kvm, context.migration)


class LogClear(KvmOp):
    verb = "log-clear"
    doc = (
        "KVM_CLEAR_DIRTY_LOG of those of the 64 pages around PAGE that log-get has reported and that were "
        "not cleared since, or of all 64 if there was no log-get. User space copies them."
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
    doc = "rcu_barrier(): all callbacks queued so far run, and pages given to RCU are freed."

    def run(self, context: Context) -> None:
        context.cpu.check(lib.rcu_barrier(context.cpu.m, context.cpu.id))


class Linger(KvmOp):
    verb = "linger"
    doc = (
        "The thread lets the other threads run for a moment, TIMES as long. `explore` needs no such moments."
    )
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
    SendSmi,
    SendInit,
    SlotDelete,
    SlotCreate,
    DeviceUnplug,
    DevicePlug,
    LogArm,
    LogDisarm,
    LogGet,
    LogClear,
    Rcu,
    Linger,
)
