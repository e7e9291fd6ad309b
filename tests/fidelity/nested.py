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
VPIDS: Final = {"none": 0, "const": 5, "changing": 6}
REQUESTS: Final = {
    getattr(kvm_host, name) & KVM_REQUEST_MASK: name.removeprefix("KVM_REQ_")
    for name in dir(kvm_host)
    if name.startswith("KVM_REQ_") and name != "KVM_REQ_OUTSIDE_GUEST_MODE"
}


@dataclass(frozen=True)
class Recorded:
    """One step; `counts` is None for a step without a counterpart in the recording."""

    do: str
    operation: str
    counts: Counter[str] | None


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
    parts = (part.split() for part in " ".join(counts).split(",") if part.strip())
    return Recorded(do, operation, Counter({" ".join(name): int(n) for *name, n in parts}))


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
        self._keep: list[Any] = []
        m = rig.machine.m
        self._configure(960)
        rig.host.check(lib.guest_create_nested(m, self.vcpu.id, 1))
        lib.vcpu_set_guest_mode(m, self.vcpu.id, 1)
        self._configure(896)
        lib.vcpu_set_guest_mode(m, self.vcpu.id, 0)
        self.run = vcpu_run(self.vcpu)
        next(self.run)
        self.execute(
            guest_map(HOME, 0x10),
            *(guest_map(L1_FIRST + i, 2048 + i) for i in range(L1_PAGES)),
            guest_read(HOME),
        )
        self.execute(vmx("VMXON"))

    def besides(self, do: str) -> Counter[str]:
        """Return what a step counts here beside what was recorded, and why not there."""
        return Counter()

    def _configure(self, first_gfn: int) -> None:
        rig, settings = self.rig, {"first_gfn": first_gfn, "end_gfn": first_gfn + 64, "seed": 1, "paging": 1}
        config = ffi.new("struct guest_config *", settings)
        rig.host.check(lib.guest_configure(rig.machine.m, self.vcpu.id, config))
        known = [HOME, *range(L2_FIRST, L2_FIRST + L2_PAGES), *range(L1_FIRST, L1_FIRST + L1_PAGES)]
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
        if name not in ("round", "touch", "touch-resumed", "start", "stop", "setup"):
            self.execute()
        return int(words[0]) if name == "round" and words else 1

    # --- L1 and L2 ------------------------------------------------------------------------------------------

    def _setup(self, vpid: str) -> None:
        self.changing = vpid == "changing"
        # Without VPIDs in the host, L1 is offered none.
        value = VPIDS[vpid] if self.vpid else 0
        self.execute(vmx("VMCLEAR", 1), vmx("VMPTRLD", 1), vmx("VMWRITE", value))

    def _enter(self) -> list[dict[str, int]]:
        if not self.changing or not self.vpid:
            return [vmx("VMLAUNCH")]
        self.changing += 1
        return [vmx("VMWRITE", 6 + self.changing % 2), vmx("VMLAUNCH")]

    def _round(self, n: str = "1") -> None:
        for _ in range(int(n)):
            self.execute(*self._enter(), guest_map(HOME, 0x11), _write(HOME), vmx("VMCALL"))

    def _touch(self) -> None:
        self.execute(*self._enter(), *_l2_writes(), vmx("VMCALL"))

    def _start(self) -> None:
        self.execute(*self._enter(), *_l2_writes())

    def _stop(self) -> None:
        self.execute(vmx("VMCALL"))

    def _l2_write(self) -> None:
        self.execute(*_l2_writes())

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


def _l2_writes() -> list[dict[str, int]]:
    pages = range(L2_PAGES)
    return [
        *(guest_map(L2_FIRST + i, SLOTS[1][0] + i) for i in pages),
        *(_write(L2_FIRST + i) for i in pages),
    ]


def differences(run: Run, bench: NestedBench, counting: NestedProbes) -> list[tuple[Any, ...]]:
    """Do all steps; return those with other counts than the recorded ones, with both."""
    differ: list[tuple[Any, ...]] = []
    for number, step in enumerate(run.steps):
        before = counting.counts()
        n = bench.step(step.do)
        counts = counting.counts() - before
        if step.counts is None:
            continue
        recorded = {name: count * n for name, count in step.counts.items() if count}
        expected = Counter(recorded) + bench.besides(step.do)
        if counts != expected:
            differ.append((number, step.do, step.operation, dict(counts), expected))
    return differ
