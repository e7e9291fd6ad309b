"""A vCPU whose guest is a hypervisor, and the counts of its round trips to L2; see nested.toml for its steps.

One thread plays the host and the pCPU that the vCPU is on.
"""

from __future__ import annotations

import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from emulator.kvm import kvm_host
from emulator.kvm.kvm_host import KVM_MEM_LOG_DIRTY_PAGES, KVM_REQUEST_MASK, PREEMPTIBLE
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
from native.types import CpuId, Gfn, Hva, Vpid
from tests.emulator.kvm.rig import Rig, online, scopes

from .probes import Probes

FIXTURE: Final = Path(__file__).with_name("nested.toml")
# First page, pages.
SLOTS: Final = {0: (0, 1024), 1: (1024, 256), 2: (2048, 128)}
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
REQUESTS: Final = {
    getattr(kvm_host, name) & KVM_REQUEST_MASK: name.removeprefix("KVM_REQ_")
    for name in dir(kvm_host)
    if name.startswith("KVM_REQ_") and name != "KVM_REQ_OUTSIDE_GUEST_MODE"
}


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
    id: str
    ept: bool
    vpid: bool
    steps: tuple[Recorded, ...]


def load(fixture: Path = FIXTURE) -> list[Run]:
    runs = tomllib.loads(fixture.read_text())["run"]
    return [Run(r["id"], r["ept"], r["vpid"], tuple(map(_recorded, r["steps"]))) for r in runs]


def _recorded(texts: list[str]) -> Recorded:
    if len(texts) == 1:
        return Recorded(texts[0], "", None)
    do, operation, *counts = texts
    parts = [part.rsplit(maxsplit=1) for part in " ".join(counts).split(",") if part.strip()]
    exact = Counter({name.strip(): int(n) for name, n in parts if n != "?"})
    return Recorded(do, operation, exact, frozenset(name.strip() for name, n in parts if n == "?"))


class NestedProbes:
    """Counts of KVM's functions by their names, under the names of the recording's columns."""

    def __init__(self, probes: Probes, rig: Rig) -> None:
        self._rig = rig
        self._roots: list[Any] = []
        self.seen: Counter[str] = Counter()
        for scope in ("all", "current", "guest"):
            probes.probe(f"vmx_flush_tlb_{scope}", self._by_mode(f"flush_{scope}"))
        probes.probe("kvm_mmu_load", self._saw(lambda args: f"load_{_mmu(args[1])}"))
        probes.probe("kvm_flush_remote_tlbs", self._saw(lambda args: "remote_tlb_flush_requests"))
        probes.probe("kvm_make_all_cpus_request", self._saw(lambda args: f"make_all {args[2]:#x}"))
        probes.probe(
            "kvm_mmu_new_pgd",
            self._saw(lambda args: f"{_mmu(args[1])}:{self._switched(args[1])}"),
            before=lambda args: self._roots.append(args[1].mmu.root),
        )
        probes.probe("invvpid_single_context", self._invvpid("context"))
        probes.probe("invvpid_individual_addr", self._invvpid("addr"))
        # A generator: nothing has run yet.
        probes.probe("vcpu_enter_guest", self._pending)
        probes.probe_method(Cpu, "stat", self._stat)

    def _saw(self, name: Any) -> Any:
        def handler(args: tuple[Any, ...], result: object) -> None:
            self.seen[name(args)] += 1

        return handler

    def _by_mode(self, name: str) -> Any:
        return self._saw(lambda args: f"{name}_{_mode(args[1])}")

    def _switched(self, vcpu: Vcpu) -> str:
        before = self._roots.pop()
        if vcpu.mmu.root is None:
            return "miss"
        return "same" if vcpu.mmu.root is before else "prev"

    def _invvpid(self, kind: str) -> Any:
        def name(args: tuple[Any, ...]) -> str:
            (vcpu,) = args[1].vcpus
            names: dict[Vpid, str] = {vcpu.vpid: "vpid01", vcpu.nested.vpid02: "vpid02"}
            return f"invvpid {kind}({names[args[2]]})"

        return self._saw(name)

    def _pending(self, args: tuple[Any, ...], result: object) -> None:
        cpu, vcpu = args
        bits = lib.kvm_requests(cpu.m, vcpu.id)
        for bit, name in REQUESTS.items():
            self.seen[f"{_mode(vcpu)}:{name}"] += bits >> bit & 1

    def _stat(self, args: tuple[Any, ...], result: object) -> None:
        self.seen["vcpu_tlb_flush"] += args[2] == lib.STAT_TLB_FLUSH

    def counts(self) -> Counter[str]:
        executed = scopes(self._rig)
        instructions = {f"invept_{scope}": executed[f"invept_{scope}"] for scope in ("single", "global")}
        instructions["invvpid all(vpid=0)"] = executed["invvpid_all"]
        return self.seen + Counter(instructions)


def _mode(vcpu: Vcpu) -> str:
    return "L2" if vcpu.arch.guest_mode else "L1"


def _mmu(vcpu: Vcpu) -> str:
    return "root_mmu" if vcpu.mmu is vcpu.root_mmu else "guest_mmu"


class NestedBench:
    """A VM of one vCPU, L1 after VMXON, and its nested guest."""

    def __init__(self, rig: Rig, run: Run, policy: str) -> None:
        self.rig = rig
        self.vpid = run.vpid
        self.kvm = rig.vm(preset(policy), slot=False, ept=run.ept, vpid=run.vpid, slice_accesses=1 << 20)
        for slot in SLOTS:
            self._create(str(slot))
        self.vcpu = kvm_vm_ioctl_create_vcpu(rig.host, self.kvm)
        self.pcpu = CpuId(0)
        self.changing = 0
        self.ept = run.ept
        self.apic_page = 0
        self._keep: list[Any] = []
        m = rig.machine.m
        self._configure(960)
        rig.host.check(lib.guest_create_nested(m, self.vcpu.id, 1))
        lib.vcpu_set_guest_mode(m, self.vcpu.id, 1)
        self._configure(896)
        if not run.ept:
            lib.guest_power_on(m, self.vcpu.id)
        lib.vcpu_set_guest_mode(m, self.vcpu.id, 0)
        power_on(rig.host, self.vcpu, paging=True, pcid=False)
        self.run = vcpu_run(self.vcpu)
        next(self.run)
        self.execute(
            guest_map(HOME, 0x10),
            *(guest_map(L1_FIRST + i, 2048 + i) for i in range(L1_PAGES)),
            guest_read(HOME),
        )
        if not run.ept:
            self._boot_l2()
        self.execute(vmx("VMXON"))

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

    def _configure(self, first_gfn: int) -> None:
        rig, settings = self.rig, {"first_gfn": first_gfn, "end_gfn": first_gfn + 64, "seed": 1, "paging": 1}
        config = ffi.new("struct guest_config *", settings)
        rig.host.check(lib.guest_configure(rig.machine.m, self.vcpu.id, config))
        known = [HOME, *range(L2_FIRST, L2_FIRST + L2_PAGES), *range(L1_FIRST, L1_FIRST + L1_PAGES), APIC]
        pages, records = ffi.new("uint64_t[]", known), ffi.new("uint64_t[]", 1)
        self._keep += [config, pages, records]
        rig.host.check(lib.guest_add_process(rig.machine.m, self.vcpu.id, records, 1, pages, len(known)))

    def execute(self, *ops: dict[str, int]) -> None:
        """Let the vCPU execute operations, and read a page: whatever was requested has been serviced then."""
        array = ffi.new("struct guest_op[]", [*ops, guest_read(HOME)])
        m = self.rig.machine.m
        self.rig.host.check(lib.guest_set_program(m, self.vcpu.id, array, len(array)))
        state = None
        while lib.guest_program_position(m, self.vcpu.id) < len(array) or state is PREEMPTIBLE:
            cpu = self.rig.machine.cpus[self.pcpu]
            with online(cpu):
                if self.vcpu.kvm and not self.vcpu.loaded and state is not None:
                    kvm_sched_in(cpu, self.vcpu)
                state = self.run.send(cpu)

    def step(self, do: str) -> int:
        """Do a step, and let the vCPU go on; return how often it did the operation."""
        name, *words = do.split()
        getattr(self, f"_{name.replace('-', '_')}")(*words)
        if name not in _RUN_THE_VCPU:
            self.execute()
        return int(words[0]) if name.startswith("round") and words else 1

    # --- L1 and L2 ------------------------------------------------------------------------------------------

    def _setup(self, vpid: str, apic: str = "") -> None:
        self.changing = vpid == "changing"
        # Without VPIDs in the host, L1 is offered none.
        value = VPIDS[vpid] if self.vpid else 0
        self.apic_page = APIC_PAGES[0] if apic else 0
        self.execute(
            vmx("VMCLEAR", 1),
            vmx("VMPTRLD", 1),
            vmx("VMWRITE", value),
            vmx("VMWRITE", self.apic_page, lib.VMCS12_APIC_PAGE),
        )

    def _enter(self) -> list[dict[str, int]]:
        if not self.changing or not self.vpid:
            return [vmx("VMLAUNCH")]
        self.changing += 1
        return [vmx("VMWRITE", 6 + self.changing % 2), vmx("VMLAUNCH")]

    def _round(self, n: str = "1") -> None:
        for _ in range(int(n)):
            maps = [guest_map(HOME, 0x11)] if self.ept else []
            self.execute(*self._enter(), *maps, _write(HOME), vmx("VMCALL"))

    def _round_apic(self, n: str) -> None:
        for i in range(int(n)):
            page = APIC_PAGES[(i + 1) % len(APIC_PAGES)]
            self.execute(vmx("VMWRITE", page, lib.VMCS12_APIC_PAGE))
            self._round()
        assert page == self.apic_page

    def _l2_apic(self) -> None:
        write = {**_write(APIC), "flags": lib.GUEST_OP_APIC}
        self.execute(*self._enter(), guest_map(APIC, self.apic_page), write)

    def _l1_apic(self) -> None:
        self.execute(guest_map(APIC, self.apic_page), _write(APIC))

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
            kvm_sched_out(self.rig.machine.cpus[self.pcpu], self.vcpu)
        self.pcpu = CpuId(int(pcpu))
        with online(self.rig.machine.cpus[self.pcpu]):
            kvm_sched_in(self.rig.machine.cpus[self.pcpu], self.vcpu)

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


def differences(run: Run, bench: NestedBench, counting: NestedProbes) -> list[tuple[Any, ...]]:
    """Do all steps; return those with other counts than the recorded ones, with both."""
    differ: list[tuple[Any, ...]] = []
    for number, step in enumerate(run.steps):
        before = counting.counts()
        n = bench.step(step.do)
        counts = counting.counts() - before
        if step.counts is None:
            continue
        counts = Counter({name: n for name, n in counts.items() if name not in step.timing})
        recorded = {name: count * n for name, count in step.counts.items() if count}
        expected = Counter(recorded) + bench.besides(step.do)
        if counts != expected:
            differ.append((number, step.do, step.operation, dict(counts), expected))
    return differ
