"""vCPUs whose guests are hypervisors, and their round trips to L2; see nested.toml for the steps.

One thread plays the host and the pCPUs that the vCPUs are on.
"""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from emulator.kvm.kvm_host import KVM_MEM_LOG_DIRTY_PAGES, PREEMPTIBLE, RunYield
from emulator.kvm.mmu.roots import kvm_mmu_unload
from emulator.kvm.reset import power_on
from emulator.kvm.structs import Vcpu
from emulator.kvm.virt.kvm_main import (
    kvm_sched_in,
    kvm_sched_out,
    kvm_set_memory_region,
    kvm_vm_ioctl_create_vcpu,
    kvm_vm_ioctl_get_dirty_log,
)
from emulator.kvm.x86 import vcpu_run
from emulator.machine.runtime import Cpu
from emulator.policy import preset
from native import ffi, lib
from native.types import CpuId, Gfn, Hva
from tests.emulator.kvm.rig import Rig, online

from .nested_probes import NestedProbes
from .probes import Probes

FIXTURE: Final = Path(__file__).with_name("nested.toml")
# First page, pages.
SLOTS: Final = {0: (0, 1024), 1: (1024, 256), 2: (2048, 128)}
OS_PAGES: Final = 64
L2_PAGES: Final = 64
L1_PAGES: Final = 32
# Linear pages: one in slot 0, those of L2 in slot 1, those of L1 in slot 2.
HOME, L2_FIRST, L1_FIRST = 0x10, 0x1000, 0x2000
# A linear page of L1 and of L2, and the pages of L1's that are APIC-access pages in turn.
APIC, APIC_PAGES = 0x3000, (0x20, 0x21)
# Steps that let the vCPU go on by themselves.
_RUN_THE_VCPU: Final = frozenset(
    {"round", "round-apic", "touch", "touch-resumed", "start", "stop", "setup", "l2-apic", "l1-apic"}
)
VPIDS: Final = {"none": 0, "const": 5, "changing": 6}


@dataclass(frozen=True)
class Recorded:
    """One step; `counts` is None for a step without a counterpart in the recording.  timing: counts that
    depend on when the vCPU saw a request."""

    do: str
    operation: str
    counts: Counter[str] | None
    timing: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Run:
    """two_vcpus: whether a recording with two vCPUs has the run's steps, too."""

    id: str
    ept: bool
    vpid: bool
    steps: tuple[Recorded, ...]
    two_vcpus: bool = False

    def parts(self) -> Iterator[list[tuple[int, Recorded]]]:
        """Yield the steps of one VMCS12 each, with their numbers."""
        part: list[tuple[int, Recorded]] = []
        for number, step in enumerate(self.steps):
            if step.do.startswith("setup") and part:
                yield part
                part = []
            part.append((number, step))
        yield part


def load(fixture: Path = FIXTURE) -> list[Run]:
    runs = tomllib.loads(fixture.read_text())["run"]
    return [
        Run(r["id"], r["ept"], r["vpid"], tuple(map(_recorded, r["steps"])), "two_vcpus" in r) for r in runs
    ]


def _recorded(texts: list[str]) -> Recorded:
    if len(texts) == 1:
        return Recorded(texts[0], "", None)
    do, operation, *counts = texts
    parts = [part.rsplit(maxsplit=1) for part in " ".join(counts).split(",") if part.strip()]
    exact = Counter({name.strip(): int(n) for name, n in parts if n != "?"})
    return Recorded(do, operation, exact, frozenset(name.strip() for name, n in parts if n == "?"))


@dataclass
class L1:
    """A vCPU, and its progress.

    nested_os: the first page of its nested guest's OS, behind which are those of L1's own.  changing: the
    number of VM entries with a VPID that changes; 0: none does.
    """

    vcpu: Vcpu
    nested_os: int
    pcpu: CpuId
    run: Generator[RunYield, Cpu, Any]
    state: RunYield | None = None
    changing: int = 0
    apic_page: int = 0


class NestedBench:
    """A VM of one vCPU or two, each with a pCPU of its own, an L1 after VMXON, and a nested guest.

    Steps are those of the vCPU in turn().  Another one is in L1, and enters again after each remote request.
    """

    def __init__(self, rig: Rig, run: Run, policy: str, vcpus: int = 1) -> None:
        self.rig = rig
        self.vpid = run.vpid
        self.ept = run.ept
        self._keep: list[Any] = []
        self.kvm = rig.vm(preset(policy), slot=False, ept=run.ept, vpid=run.vpid, slice_accesses=1 << 20)
        for slot in SLOTS:
            self._create(str(slot))
        self._l1s: list[L1] = []
        for number in range(vcpus):
            self._l1s.append(self._new_l1(number))
            self.turn(number)
            self._boot_l1()
        for l1 in self._l1s:
            self._execute(l1)

    def _new_l1(self, number: int) -> L1:
        rig, m = self.rig, self.rig.machine.m
        vcpu = kvm_vm_ioctl_create_vcpu(rig.host, self.kvm)
        os_pages = 960 - 2 * OS_PAGES * number
        self._configure(vcpu, os_pages)
        rig.host.check(lib.guest_create_nested(m, vcpu.id, 1))
        lib.vcpu_set_guest_mode(m, vcpu.id, 1)
        self._configure(vcpu, os_pages - OS_PAGES)
        if not self.ept:
            lib.guest_power_on(m, vcpu.id)
        lib.vcpu_set_guest_mode(m, vcpu.id, 0)
        power_on(rig.host, vcpu, paging=True, pcid=False)
        run = vcpu_run(vcpu)
        next(run)
        return L1(vcpu, os_pages - OS_PAGES, CpuId(number), run)

    def _boot_l1(self) -> None:
        self.execute(
            guest_map(HOME, 0x10),
            *(guest_map(L1_FIRST + i, 2048 + i) for i in range(L1_PAGES)),
            guest_read(HOME),
        )
        if not self.ept:
            self._boot_l2()
        self.execute(vmx("VMXON"))

    def turn(self, number: int) -> None:
        """Let steps be those of this vCPU."""
        self.l1 = self._l1s[number]

    @property
    def vcpu(self) -> Vcpu:
        return self.l1.vcpu

    @property
    def vcpus(self) -> int:
        return len(self._l1s)

    def besides(self, do: str) -> Counter[str]:
        """Return what a step counts here beside what was recorded, and why not there."""
        return Counter()

    def _boot_l2(self) -> None:
        """Let L2 build its tables, which are there as the recording begins; KVM keeps no root of it."""
        self.execute(vmx("VMXON"), vmx("VMPTRLD", 1))
        self.execute(vmx("VMLAUNCH"), guest_map(HOME, 0x11), *_l2_maps(), *_l2_writes(), _write(HOME))
        self.execute(vmx("VMCALL"))
        self.execute(vmx("VMXOFF"))
        kvm_mmu_unload(self.rig.host, self.vcpu)
        self.execute()

    def _configure(self, vcpu: Vcpu, first_gfn: int) -> None:
        rig = self.rig
        settings = {"first_gfn": first_gfn, "end_gfn": first_gfn + OS_PAGES, "seed": 1, "paging": 1}
        config = ffi.new("struct guest_config *", settings)
        rig.host.check(lib.guest_configure(rig.machine.m, vcpu.id, config))
        known = [HOME, *range(L2_FIRST, L2_FIRST + L2_PAGES), *range(L1_FIRST, L1_FIRST + L1_PAGES), APIC]
        pages, records = ffi.new("uint64_t[]", known), ffi.new("uint64_t[]", 1)
        self._keep += [config, pages, records]
        rig.host.check(lib.guest_add_process(rig.machine.m, vcpu.id, records, 1, pages, len(known)))

    def execute(self, *ops: dict[str, int]) -> None:
        """Let the vCPU execute operations, and read a page: whatever was requested has been serviced then."""
        self._execute(self.l1, *ops)

    def _execute(self, l1: L1, *ops: dict[str, int]) -> None:
        array = ffi.new("struct guest_op[]", [*ops, guest_read(HOME)])
        m, vcpu = self.rig.machine.m, l1.vcpu
        self.rig.host.check(lib.guest_set_program(m, vcpu.id, array, len(array)))
        l1.state = None
        while lib.guest_program_position(m, vcpu.id) < len(array) or l1.state is PREEMPTIBLE:
            cpu = self.rig.machine.cpus[l1.pcpu]
            with online(cpu):
                if vcpu.kvm and not vcpu.loaded and l1.state is not None:
                    kvm_sched_in(cpu, vcpu)
                l1.state = l1.run.send(cpu)

    def others_enter(self) -> None:
        """Let the vCPUs that are not in turn enter again, as a request that interrupts them makes them do."""
        for l1 in self._l1s:
            if l1 is not self.l1 and self.kvm in self.rig.vms:
                self._execute(l1)

    def step(self, do: str) -> int:
        """Do a step, and let the vCPU go on; return how often it did the operation."""
        name, *words = do.split()
        getattr(self, f"_{name.replace('-', '_')}")(*words)
        if name not in _RUN_THE_VCPU:
            self.execute()
        return int(words[0]) if name.startswith("round") and words else 1

    # --- L1 and L2 ------------------------------------------------------------------------------------------

    def _setup(self, vpid: str, apic: str = "") -> None:
        self.l1.changing = vpid == "changing"
        # Without VPIDs in the host, L1 is offered none.
        value = VPIDS[vpid] if self.vpid else 0
        self.l1.apic_page = APIC_PAGES[0] if apic else 0
        self.execute(
            vmx("VMCLEAR", 1),
            vmx("VMPTRLD", 1),
            vmx("VMWRITE", value),
            vmx("VMWRITE", self.l1.apic_page, lib.VMCS12_APIC_PAGE),
        )

    def _enter(self) -> list[dict[str, int]]:
        if not self.l1.changing or not self.vpid:
            return [vmx("VMLAUNCH")]
        self.l1.changing += 1
        return [vmx("VMWRITE", 6 + self.l1.changing % 2), vmx("VMLAUNCH")]

    def _round(self, n: str = "1") -> None:
        for _ in range(int(n)):
            maps = [guest_map(HOME, 0x11)] if self.ept else []
            self.execute(*self._enter(), *maps, _write(HOME), vmx("VMCALL"))

    def _round_apic(self, n: str) -> None:
        for i in range(int(n)):
            page = APIC_PAGES[(i + 1) % len(APIC_PAGES)]
            self.execute(vmx("VMWRITE", page, lib.VMCS12_APIC_PAGE))
            self._round()
        assert page == self.l1.apic_page

    def _l2_apic(self) -> None:
        write = {**_write(APIC), "flags": lib.GUEST_OP_APIC}
        self.execute(*self._enter(), guest_map(APIC, self.l1.apic_page), write)

    def _l1_apic(self) -> None:
        self.execute(guest_map(APIC, self.l1.apic_page), _write(APIC))

    def _touch(self) -> None:
        self.execute(*self._enter(), *self._maps(), *_l2_writes(), vmx("VMCALL"))

    def _start(self) -> None:
        self.execute(*self._enter(), *self._maps(), *_l2_writes())

    def _stop(self) -> None:
        self.execute(vmx("VMCALL"))

    def _l2_write(self) -> None:
        self.execute(*self._maps(), *_l2_writes())

    def _maps(self) -> list[dict[str, int]]:
        """L2's stores to its tables, which only exit without EPT, and are made at its boot then."""
        return _l2_maps() if self.ept else []

    def _l1_touch(self) -> None:
        self.execute(*(_write(L1_FIRST + i) for i in range(L1_PAGES)))

    def _invvpid(self, kind: str, vpid: str) -> None:
        self.execute(vmx("INVVPID", int(vpid), int(kind), HOME))

    # --- the host -------------------------------------------------------------------------------------------

    def _migrate(self, pcpu: str) -> None:
        if self.vcpu.loaded:
            kvm_sched_out(self.rig.machine.cpus[self.l1.pcpu], self.vcpu)
        self.l1.pcpu = CpuId(int(pcpu))
        with online(self.rig.machine.cpus[self.l1.pcpu]):
            kvm_sched_in(self.rig.machine.cpus[self.l1.pcpu], self.vcpu)

    def _region(self, slot: int, flags: int = 0) -> None:
        first, pages = SLOTS[slot]
        kvm_set_memory_region(self.rig.host, self.kvm, slot, Gfn(first), pages, Hva(first), flags)

    def _create(self, slot: str) -> None:
        self._region(int(slot))

    def _delete(self, slot: str) -> None:
        kvm_set_memory_region(self.rig.host, self.kvm, int(slot), Gfn(0), 0, Hva(0))

    def _madvise(self, slot: str, first: str, n: str) -> None:
        start = SLOTS[int(slot)][0] + int(first)
        self.rig.unmap(self.kvm, start, start + int(n))

    def _protect(self) -> None:
        self.rig.protect(self.kvm, SLOTS[1][0], SLOTS[1][0] + L2_PAGES, 0)

    def _unprotect(self) -> None:
        self.rig.protect(self.kvm, SLOTS[1][0], SLOTS[1][0] + L2_PAGES, 1)

    def _log(self) -> None:
        self._region(1, KVM_MEM_LOG_DIRTY_PAGES)

    def _log_get(self) -> None:
        assert any(kvm_vm_ioctl_get_dirty_log(self.rig.host, self.kvm, 1))

    def _unlog(self) -> None:
        self._region(1)


def guest_op(kind: str, page: int = 0, value: int = 0, flags: int = 0) -> dict[str, int]:
    return {"kind": getattr(lib, f"GUEST_OP_{kind}"), "linear": page << 12, "value": value, "flags": flags}


def guest_map(page: int, gfn: int) -> dict[str, int]:
    return guest_op("MAP", page, gfn)


def guest_read(page: int) -> dict[str, int]:
    return guest_op("READ", page)


def _write(page: int) -> dict[str, int]:
    return guest_op("WRITE", page)


def vmx(insn: str, value: int = 0, kind: int = 0, page: int = 0) -> dict[str, int]:
    return guest_op("VMX", page, value, getattr(lib, f"GUEST_INSN_{insn}") | kind << 8)


def _l2_maps() -> list[dict[str, int]]:
    return [guest_map(L2_FIRST + i, SLOTS[1][0] + i) for i in range(L2_PAGES)]


def _l2_writes() -> list[dict[str, int]]:
    return [_write(L2_FIRST + i) for i in range(L2_PAGES)]


# A remote request, as counted of a vCPU that is in L1 and has no more to do than to enter again.
_ENTERS_AGAIN: Final = ("vcpu_tlb_flush", "flush_all_L1", "invept_global", "L1:TLB_FLUSH")


def differences(run: Run, bench: NestedBench, probes: Probes) -> list[tuple[Any, ...]]:
    """Let each vCPU in turn do all steps of a VMCS12, then those of the next; return the steps with other
    counts than the recorded ones, with both."""
    counting = NestedProbes(probes, bench.rig)
    probes.probe("kvm_flush_remote_tlbs", lambda args, result: bench.others_enter())
    differ: list[tuple[Any, ...]] = []
    for part in run.parts():
        for vcpu in range(bench.vcpus):
            bench.turn(vcpu)
            for number, step in part:
                before = counting.counts()
                n = bench.step(step.do)
                counts, expected = counting.counts() - before, _expected(step, n, bench)
                for name in step.timing:
                    del counts[name]
                if step.counts is not None and counts != expected:
                    differ.append((vcpu, number, step.do, step.operation, dict(counts), expected))
    return differ


def _expected(step: Recorded, n: int, bench: NestedBench) -> Counter[str]:
    recorded = step.counts or Counter()
    others = (bench.vcpus - 1) * recorded["remote_tlb_flush_requests"]
    expected = Counter({name: count * n for name, count in recorded.items() if count})
    return expected + Counter(dict.fromkeys(_ENTERS_AGAIN, others * n)) + bench.besides(step.do)
