"""A hypervisor of a hundred lines on the native primitives, driven by one thread.

It maps on EPT violations, unmaps, write-protects and frees in whatever order a test says, with or without the
flush that is due, and the oracle must distinguish these.  It is not KVM; emulator/kvm is.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from native import ffi, lib
from native.types import (
    AccessKind,
    CounterId,
    CpuId,
    Gfn,
    Gva,
    Hfn,
    HostWritable,
    Hva,
    Level,
    PromiseKind,
    ReportNumber,
    SpteIndex,
    VcpuId,
    VmcsId,
    VmId,
    Vpid,
)
from tests.support import CPU0, machine_fields

if TYPE_CHECKING:
    from native._native import CDataBase, MachineConfigPtr, ViolationReport

READ, WRITE, EXECUTE = 0, 1, 2
GLOBAL_FLUSH = "global"


def config(**changes: int) -> MachineConfigPtr:
    """A small machine: 2 pCPUs, 2 VMs, one vCPU each."""
    fields = {"pcpus": 2, "housekeeping": 1, "vms": 2, "vcpus": 4, "root_frames": 8}
    fields |= {"table_frames": 256, "guest_frames": 2048, "guest_blocks": 4}
    return ffi.new("struct machine_config *", machine_fields(**(fields | changes)))


class Hypervisor:
    """One native machine with VMs; the calling thread plays every CPU in turn."""

    def __init__(self, **changes: int) -> None:
        error = ffi.new("char[]", 200)
        self.m = lib.machine_create(config(**changes), error, 200)
        if self.m == ffi.NULL:
            raise AssertionError(ffi.string(error).decode())
        self.pcpus = changes.get("pcpus", 2)
        self.housekeeping = CpuId(self.pcpus)
        for cpu in map(CpuId, range(self.pcpus)):
            lib.cpu_online(self.m, cpu)
        self.exit = ffi.new("struct vcpu_exit *")
        self.keep: list[CDataBase] = []
        self.roots: dict[VmId, Hfn] = {}
        self.vm_of: dict[VcpuId, VmId] = {}
        self.vmcs: dict[VcpuId, VmcsId] = {}
        self.active: dict[VmcsId, CpuId] = {}  # loaded_vmcs->cpu

    def __enter__(self) -> Hypervisor:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        lib.machine_stop(self.m)
        lib.machine_destroy(self.m)

    def vm(self, gfns: int = 1024) -> VmId:
        """A VM with a fresh root."""
        vm = VmId(lib.vm_create(self.m, gfns))
        assert vm >= 0
        self.roots[vm] = self.new_root()
        return vm

    def new_root(self) -> Hfn:
        root = Hfn(lib.ept_table_alloc(self.m, CpuId(0), lib.FRAME_ROOT))
        assert root >= 0
        return root

    def vcpu(self, vm: VmId, vpid: int, **guest: int) -> VcpuId:
        """Create a vCPU, with paging off in the guest by default."""
        vcpu = VcpuId(lib.vcpu_create(self.m, vm))
        assert vcpu >= 0
        values = {"first_gfn": 0, "end_gfn": 1024, "pcid": 1, "seed": vpid, "paging": 0}
        values.update(guest)
        lib.guest_configure(self.m, vcpu, ffi.new("struct guest_config *", values))
        self.vmcs[vcpu] = VmcsId(lib.vmcs_create(self.m, vcpu, Vpid(vpid)))
        assert self.vmcs[vcpu] >= 0
        lib.vmcs_write_eptp(self.m, self.vmcs[vcpu], self.roots[vm], Level(4))
        self.vm_of[vcpu] = vm
        return vcpu

    def process(self, vcpu: VcpuId, records: list[int], pages: list[int]) -> None:
        """A process that replays records; the OS knows its pages."""
        r, p = ffi.new("uint64_t[]", records or [0]), ffi.new("uint64_t[]", sorted(pages))
        self.keep += [r, p]
        lib.guest_add_process(self.m, vcpu, r, len(records), p, len(pages))

    # -- guest mode

    def load(self, cpu: CpuId, vcpu: VcpuId) -> None:
        """Make the vCPU's VMCS current on this pCPU, after VMCLEAR on the one where it was."""
        vmcs = self.vmcs[vcpu]
        last = self.active.get(vmcs, cpu)
        if last != cpu:
            assert lib.vmclear(self.m, last, vmcs) == 0
        assert lib.vmptrld(self.m, cpu, vmcs) == 0
        self.active[vmcs] = cpu

    def enter(self, cpu: CpuId, vcpu: VcpuId) -> None:
        """Prepare for guest_run or guest_access, right before the call."""
        self.load(cpu, vcpu)
        lib.local_irq_disable(self.m, cpu, b"test")
        lib.vcpu_set_mode(self.m, vcpu, lib.IN_GUEST_MODE)

    def access(self, cpu: CpuId, vcpu: VcpuId, linear: int, kind: int = READ) -> None:
        """One access, with every EPT violation on the way served by mapping the page."""
        for _ in range(64):
            self.enter(cpu, vcpu)
            reason = lib.guest_access(self.m, cpu, vcpu, Gva(linear), AccessKind(kind), self.exit)
            assert reason >= 0, ffi.string(lib.machine_error_text(self.m, cpu))
            if reason != lib.EXIT_EPT_VIOLATION:
                assert reason == lib.EXIT_PREEMPTION_TIMER, reason
                return
            self.map(cpu, self.vm_of[vcpu], self.exit.gpa >> 12)
        raise AssertionError("64 EPT violations for one access")

    def run(self, cpu: CpuId, vcpu: VcpuId, budget: int) -> int:
        """Guest accesses until the budget is used up; returns how many were done."""
        done = 0
        while done < budget:
            self.enter(cpu, vcpu)
            reason = lib.guest_run(self.m, cpu, vcpu, budget - done, self.exit)
            assert reason >= 0, ffi.string(lib.machine_error_text(self.m, cpu))
            done += self.exit.accesses
            if reason == lib.EXIT_EPT_VIOLATION:
                self.map(cpu, self.vm_of[vcpu], self.exit.gpa >> 12)
            else:
                assert reason in (lib.EXIT_PREEMPTION_TIMER, lib.EXIT_HLT), reason
        return done

    # -- EPT

    def leaf(self, cpu: CpuId, vm: VmId, gfn: int, create: bool) -> tuple[Hfn, int, int]:
        """Table, index and SPTE of a gfn's 4K level (or where the walk ends, without `create`)."""
        sptes, tables = ffi.new("uint64_t[]", 6), ffi.new("uint32_t[]", 6)
        while True:  # one table more each time round
            level = lib.tdp_mmu_get_walk(self.m, self.roots[vm], Level(4), Gfn(gfn), sptes, tables)
            if level == 1 or not create:
                return Hfn(tables[level]), gfn >> 9 * (level - 1) & 511, int(sptes[level])
            child = Hfn(lib.ept_table_alloc(self.m, cpu, lib.FRAME_TABLE))
            assert child >= 0
            assert not lib.tdp_mmu_set_spte_atomic(
                self.m, cpu, vm, Hfn(tables[level]), SpteIndex(gfn >> 9 * (level - 1) & 511), level, Gfn(gfn),
                sptes[level], lib.make_nonleaf_spte(self.m, child),
            )  # fmt: skip

    def map(self, cpu: CpuId, vm: VmId, gfn: int, writable: bool = True) -> Hfn:
        """Fault a page in; returns its frame."""
        page = ffi.new("struct mm_page *")
        assert lib.mm_fault(self.m, cpu, vm, Hva(gfn), True, page) == 0
        table, index, old = self.leaf(cpu, vm, gfn, True)
        if old & 7 and old >> lib.SPTE_HFN_SHIFT & 0xFFFFFF != page.hfn:
            self.zap(cpu, vm, gfn)  # another frame: KVM, too, has zapped the old one before
            old = 0
        new = lib.make_spte(page.hfn, page.tag, Level(1), writable, HostWritable(True))
        assert (
            lib.tdp_mmu_set_spte_atomic(
                self.m, cpu, vm, table, SpteIndex(index), Level(1), Gfn(gfn), old, new
            )
            == 0
        )
        return page.hfn

    def mapped(self, vm: VmId, gfn: int) -> bool:
        """A present 4K SPTE is there."""
        return bool(self.leaf(CPU0, vm, gfn, False)[2] & 7)

    def zap(self, cpu: CpuId, vm: VmId, gfn: int) -> None:
        """Clear the SPTE; flush nothing, promise nothing."""
        table, index, old = self.leaf(cpu, vm, gfn, False)
        if old & 7:
            lib.tdp_mmu_set_spte(self.m, cpu, vm, table, SpteIndex(index), Level(1), Gfn(gfn), 0)

    def write_protect(self, cpu: CpuId, vm: VmId, gfn: int) -> None:
        """Take W from the SPTE."""
        table, index, old = self.leaf(cpu, vm, gfn, False)
        if old & 2:
            lib.tdp_mmu_set_spte(self.m, cpu, vm, table, SpteIndex(index), Level(1), Gfn(gfn), old & ~2)

    def flush(self, vm: VmId) -> None:
        """INVEPT all-context on every pCPU."""
        for cpu in map(CpuId, range(self.pcpus)):
            lib.flush_invept_global(self.m, cpu, vm, lib.REASON_REMOTE_ZAP)

    def promise(self, cpu: CpuId, vm: VmId, gfn: int, promise: PromiseKind) -> None:
        lib.oracle_revoke(self.m, cpu, vm, Gfn(gfn), Gfn(gfn + 1), promise, lib.oracle_ticket(self.m, vm))

    def free(self, cpu: CpuId, vm: VmId, gfn: int) -> None:
        """Give the frame behind the page back to the host."""
        lib.mm_unmap(self.m, cpu, vm, Hva(gfn), Hva(gfn + 1), False)

    # -- results

    def violations(self) -> dict[str, int]:
        """Counts of the kinds that occurred."""
        counts = ffi.new("uint64_t[]", lib.VIOLATIONS)
        lib.oracle_counts(self.m, counts)
        names = sorted((v, k) for k, v in ffi.typeof("enum violation").relements.items() if k != "VIOLATIONS")
        return {name[10:].lower().replace("_", "-"): int(counts[v]) for v, name in names if counts[v]}

    def reports(self) -> list[ViolationReport]:
        out = ffi.new("struct violation_report[]", 64)
        return [out[i] for i in range(lib.oracle_reports(self.m, ReportNumber(0), out, 64))]

    def count(self, counter: CounterId) -> int:
        values = ffi.new("uint64_t[]", lib.COUNTERS)
        lib.counters_sum(self.m, values)
        return int(values[counter])
