"""A hypervisor without EPT on the native primitives: it shadows the guest's tables, a tree per address space.

It write-protects every table that it has walked, emulates the stores to them, and drops the SPTEs that were
derived from the entry stored to.  `broken` names the steps that it omits.  It is not KVM; emulator/kvm is.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple, Self

from native import ffi, lib
from native.types import (
    AccessKind,
    CpuId,
    Gfn,
    Gva,
    Hfn,
    HostWritable,
    Hva,
    Level,
    LinearPage,
    SpteIndex,
    VcpuId,
    VmcsId,
    VmId,
    Vpid,
    WordIndex,
)
from tests.native.hypervisor import READ, WRITE, Hypervisor

P, W, U, A, D, PS = 1, 2, 4, 0x20, 0x40, 0x80
FRAME = (1 << 52) - (1 << 12)
NOFLUSH = 1 << 63
CR0_PG, CR4_PCIDE = 1 << 31, 1 << 17
KERNEL_BASE = 0x800000000
DIRECT_BASE = KERNEL_BASE + (1 << 18)
RIGHTS = lib.SPTE_WRITABLE | lib.SPTE_EXECUTABLE | lib.SPTE_USER

_FIELDS = ("kind", "linear", "value", "flags")
_INSNS = {
    getattr(lib, f"GUEST_INSN_{name}"): name
    for name in ("MOV_CR0", "MOV_CR3", "MOV_CR4", "INVLPG", "INVPCID", "WRMSR_EFER")
}


class Space(NamedTuple):
    """The identity of an address space: whether CR0.PG is set, and the PML4's gfn."""

    vcpu: VcpuId
    paging: bool
    cr3: int


class Translation(NamedTuple):
    gfn: int
    writable: bool
    user: bool


class ShadowHypervisor(Hypervisor):
    def __init__(self, *, vpid: bool = True, broken: tuple[str, ...] = (), **changes: int) -> None:
        super().__init__(**({"root_frames": 64} | changes))
        self.broken = frozenset(broken)
        self.with_vpid = vpid
        self.vpid: dict[VcpuId, Vpid] = {}
        self.space: dict[VcpuId, Space] = {}
        self.pcid: dict[VcpuId, int] = {}
        self.tree: dict[Space, Hfn] = {}
        self.mapped_by: dict[tuple[VmId, int], set[tuple[Space, int]]] = defaultdict(set)  # rmap
        self.derived: dict[tuple[VmId, int, int], set[tuple[Space, int]]] = defaultdict(set)
        self.tables: set[tuple[VmId, int]] = set()
        self.exits: list[tuple[str, int]] = []
        self.emulated = 0
        self.errors: list[int] = []

    def __enter__(self) -> Self:
        return self

    def new_root(self) -> Hfn:
        root = Hfn(lib.shadow_page_alloc(self.m, CpuId(0), lib.FRAME_ROOT))
        assert root >= 0
        return root

    def vcpu(self, vm: VmId, vpid: int, **guest: int) -> VcpuId:
        vcpu = super().vcpu(vm, vpid if self.with_vpid else 0, **guest)
        self.vpid[vcpu] = Vpid(vpid if self.with_vpid else 0)
        lib.vmcs_enable_ept(self.m, self.vmcs[vcpu], False)
        self.switch(vcpu, Space(vcpu, False, 0), 0)
        return vcpu

    def power_on(self, vcpu: VcpuId) -> None:
        lib.guest_power_on(self.m, vcpu)

    def switch(self, vcpu: VcpuId, space: Space, pcid: int) -> None:
        """Load the root of an address space."""
        self.space[vcpu], self.pcid[vcpu] = space, pcid
        if space not in self.tree:
            self.tree[space] = self.new_root()
        lib.vmcs_write_guest_cr3(self.m, self.vmcs[vcpu], self.tree[space], pcid)

    def flush_vpid(self, cpu: CpuId, vcpu: VcpuId) -> None:
        if self.vpid[vcpu]:
            lib.flush_invvpid_single(self.m, cpu, self.vm_of[vcpu], self.vpid[vcpu], lib.REASON_GUEST)

    # -- exits

    def access(self, cpu: CpuId, vcpu: VcpuId, linear: int, kind: int = READ) -> None:
        for _ in range(4096):
            self.enter(cpu, vcpu)
            reason = lib.guest_access(self.m, cpu, vcpu, Gva(linear), AccessKind(kind), self.exit)
            assert reason >= 0, ffi.string(lib.machine_error_text(self.m, cpu))
            if reason == lib.EXIT_PREEMPTION_TIMER:
                return
            self.serve(cpu, vcpu, reason)
        raise AssertionError("4096 exits for one access")

    def run(self, cpu: CpuId, vcpu: VcpuId, budget: int) -> int:
        done = 0
        while done < budget:
            reason = self.once(cpu, vcpu, budget - done)
            done += self.exit.accesses
            if reason not in (lib.EXIT_PREEMPTION_TIMER, lib.EXIT_HLT):
                self.serve(cpu, vcpu, reason)
        return done

    def execute(self, cpu: CpuId, vcpu: VcpuId, *ops: tuple[int, ...]) -> None:
        """Run a program (kind, linear, value, flags) to its end."""
        array = ffi.new("struct guest_op[]", [dict(zip(_FIELDS, op, strict=False)) for op in ops])
        assert lib.guest_set_program(self.m, vcpu, array, len(ops)) == 0
        for _ in range(4096):
            reason = self.once(cpu, vcpu, 1 << 20)
            if reason == lib.EXIT_PROGRAM_END:
                return
            self.serve(cpu, vcpu, reason)
        raise AssertionError("the program does not end")

    def once(self, cpu: CpuId, vcpu: VcpuId, budget: int) -> int:
        self.enter(cpu, vcpu)
        reason = lib.guest_run(self.m, cpu, vcpu, budget, self.exit)
        assert reason >= 0, ffi.string(lib.machine_error_text(self.m, cpu))
        return reason

    def serve(self, cpu: CpuId, vcpu: VcpuId, reason: int) -> None:
        if reason == lib.EXIT_EXCEPTION:
            self.errors.append(self.exit.error_code)
            self.page_fault(cpu, vcpu)
        else:
            assert reason == lib.EXIT_INSTRUCTION, reason
            self.instruction(cpu, vcpu)

    def instruction(self, cpu: CpuId, vcpu: VcpuId) -> None:
        insn, value, space = self.exit.access, self.exit.linear, self.space[vcpu]
        name = _INSNS[insn]
        self.exits.append((name, value))
        if name == "MOV_CR0":
            paging = bool(value & CR0_PG)
            lib.vcpu_set_paging(self.m, vcpu, paging)
            self.switch(vcpu, space._replace(paging=paging), self.pcid[vcpu])
        elif name == "MOV_CR3":
            self.switch(vcpu, space._replace(cr3=(value & FRAME) >> 12), value & 0xFFF)
            if value & NOFLUSH or "cr3" in self.broken:
                return
        elif name == "INVLPG":
            if "invlpg" not in self.broken and self.vpid[vcpu]:
                reason = lib.REASON_GUEST
                rc = lib.flush_invvpid_address(
                    self.m, cpu, self.vm_of[vcpu], self.vpid[vcpu], LinearPage(value >> 12), reason
                )
                assert rc == 0
            return
        self.flush_vpid(cpu, vcpu)

    # -- page faults

    def page_fault(self, cpu: CpuId, vcpu: VcpuId) -> None:
        linear, error = self.exit.linear, self.exit.error_code
        write, vm, space = bool(error & lib.PFERR_WRITE), self.vm_of[vcpu], self.space[vcpu]
        page = linear >> 12
        path: list[tuple[int, int]] = []
        found = self.walk_guest(cpu, vm, space, page, error, path)
        if found is None:
            lib.guest_inject_page_fault(self.m, vcpu, Gva(linear), error)
            return
        for gfn, _ in path:
            self.shadow(cpu, vcpu, gfn)
        writable = found.writable
        if (vm, found.gfn) in self.tables:
            writable = "track" in self.broken
            if write and not writable:
                self.emulate(cpu, vcpu, found.gfn, linear)
                return
        self.map_linear(cpu, vm, space, page, found, writable)
        for gfn, index in path:
            self.derived[vm, gfn, index].add((space, page))

    def walk_guest(
        self, cpu: CpuId, vm: VmId, space: Space, page: int, error: int, path: list[tuple[int, int]]
    ) -> Translation | None:
        """Walk the guest's tables; None: they do not permit the access."""
        write, user = bool(error & lib.PFERR_WRITE), bool(error & lib.PFERR_USER)
        if not space.paging:
            return Translation(page, True, True)
        gfn, writable, usable = space.cr3, True, True
        for level in (4, 3, 2, 1):
            index = page >> 9 * (level - 1) & 511
            gpte = self.word(cpu, vm, gfn, index)
            if not gpte & P:
                return None
            path.append((gfn, index))
            writable, usable = writable and bool(gpte & W), usable and bool(gpte & U)
            leaf = level == 1 or bool(gpte & PS)
            if leaf and ((write and not writable) or (user and not usable)):
                return None
            self.set_bits(cpu, vm, gfn, index, A | (D if leaf and write else 0))
            if leaf:
                dirty = bool(gpte & D) or write
                offset = page & ((1 << 9 * (level - 1)) - 1)
                return Translation(((gpte & FRAME) >> 12) + offset, writable and dirty, usable)
            gfn = (gpte & FRAME) >> 12
        raise AssertionError

    def word(self, cpu: CpuId, vm: VmId, gfn: int, index: int) -> int:
        value, page = ffi.new("uint64_t *"), ffi.new("struct mm_page *")
        while lib.mm_read_word(self.m, cpu, vm, Hva(gfn), WordIndex(index), value) == lib.MACHINE_AGAIN:
            assert lib.mm_fault(self.m, cpu, vm, Hva(gfn), True, page) == 0
        return int(value[0])

    def set_bits(self, cpu: CpuId, vm: VmId, gfn: int, index: int, bits: int) -> None:
        old = ffi.new("uint64_t *", self.word(cpu, vm, gfn, index))
        while lib.mm_cmpxchg_word(self.m, cpu, vm, Hva(gfn), WordIndex(index), old, old[0] | bits) != 0:
            pass

    def shadow(self, cpu: CpuId, vcpu: VcpuId, gfn: int) -> None:
        """Write-protect a guest's table, and promise to see each store to it."""
        vm = self.vm_of[vcpu]
        if (vm, gfn) in self.tables:
            return
        self.tables.add((vm, gfn))
        if "track" not in self.broken:
            for space, page in list(self.mapped_by[vm, gfn]):
                self.zap_linear(cpu, vm, space, page)
        if "flush" not in self.broken:
            for pcpu in map(CpuId, range(self.pcpus)):
                self.flush_vpid(pcpu, vcpu)
        assert lib.oracle_track_writes(self.m, cpu, vm, Gfn(gfn), True) == 0

    def emulate(self, cpu: CpuId, vcpu: VcpuId, gfn: int, linear: int) -> None:
        vm, value = self.vm_of[vcpu], ffi.new("uint64_t *")
        assert lib.guest_store_value(self.m, vcpu, value)
        index = linear >> 3 & 511
        self.word(cpu, vm, gfn, index)
        assert lib.mm_write_word(self.m, cpu, vm, Hva(gfn), WordIndex(index), value[0]) == 0
        lib.guest_store_done(self.m, vcpu)
        self.emulated += 1
        if "sync" not in self.broken:
            for space, page in self.derived.pop((vm, gfn, index), set()):
                self.zap_linear(cpu, vm, space, page)

    # -- SPTEs

    def spot(self, cpu: CpuId, vm: VmId, space: Space, page: int) -> tuple[Hfn, int, int]:
        """Return table, index and SPTE of a linear page's 4K level; make the tables."""
        sptes, tables = ffi.new("uint64_t[]", 6), ffi.new("uint32_t[]", 6)
        while True:
            level = lib.tdp_mmu_get_walk(self.m, self.tree[space], Level(4), Gfn(page), sptes, tables)
            index = page >> 9 * (level - 1) & 511
            if level == 1:
                return Hfn(tables[1]), index, int(sptes[1])
            child = Hfn(lib.shadow_page_alloc(self.m, cpu, lib.FRAME_TABLE))
            assert child >= 0
            spte = lib.make_nonleaf_spte(self.m, child)
            old = lib.shadow_mmu_set_spte(
                self.m, cpu, vm, Hfn(tables[level]), SpteIndex(index), level, Gfn(0), spte
            )
            assert old != (1 << 64) - 1

    def map_linear(
        self, cpu: CpuId, vm: VmId, space: Space, page: int, to: Translation, writable: bool = True
    ) -> None:
        frame = ffi.new("struct mm_page *")
        assert lib.mm_fault(self.m, cpu, vm, Hva(to.gfn), True, frame) == 0
        self.zap_linear(cpu, vm, space, page)
        table, index, _ = self.spot(cpu, vm, space, page)
        access = RIGHTS & ~(0 if writable else lib.SPTE_WRITABLE) & ~(0 if to.user else lib.SPTE_USER)
        spte = lib.make_shadow_spte(frame.hfn, frame.tag, Level(1), access, HostWritable(True))
        assert (
            lib.shadow_mmu_set_spte(self.m, cpu, vm, table, SpteIndex(index), Level(1), Gfn(to.gfn), spte)
            != (1 << 64) - 1
        )
        self.mapped_by[vm, to.gfn].add((space, page))

    def zap_linear(self, cpu: CpuId, vm: VmId, space: Space, page: int) -> None:
        table, index, old = self.spot(cpu, vm, space, page)
        if old & 7:
            gfn = lib.kvm_mmu_page_get_gfn(self.m, table, SpteIndex(index))
            self.mapped_by[vm, gfn].discard((space, page))
            assert (
                lib.shadow_mmu_set_spte(self.m, cpu, vm, table, SpteIndex(index), Level(1), Gfn(0), 0) == old
            )

    def zap(self, cpu: CpuId, vm: VmId, gfn: int) -> None:
        """Drop every SPTE that maps a gfn; flush nothing."""
        for space, page in list(self.mapped_by[vm, gfn]):
            self.zap_linear(cpu, vm, space, page)

    # -- the hardware's state

    def dump(self, cpu: CpuId) -> list[tuple[int, int, int, int]]:
        """Kind, VPID, PCID and page of each live translation."""
        entries = ffi.new("struct tlb_entry[]", 4096)
        n = lib.tlb_dump(lib.cpu_tlb(self.m, cpu), entries, 4096)
        return [(e.kind, e.vpid, e.pcid, e.page) for e in (entries[i] for i in range(n))]


__all__ = ["READ", "WRITE", "ShadowHypervisor", "Space", "Translation", "VmcsId"]
