"""Counts of KVM's functions while nested guests run, under the names of the recordings' columns."""

from __future__ import annotations

from collections import Counter
from typing import Any, Final

from emulator.kvm import kvm_host
from emulator.kvm.kvm_host import KVM_REQUEST_MASK
from emulator.kvm.structs import Vcpu
from emulator.machine.runtime import Cpu
from native import lib
from tests.emulator.kvm.rig import Rig, scopes

from .probes import Probes

REQUESTS: Final = {
    getattr(kvm_host, name) & KVM_REQUEST_MASK: name.removeprefix("KVM_REQ_")
    for name in dir(kvm_host)
    if name.startswith("KVM_REQ_") and name != "KVM_REQ_OUTSIDE_GUEST_MODE"
}


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
            vcpus = args[1].vcpus
            names = {vcpu.vpid: "vpid01" for vcpu in vcpus} | {vcpu.nested.vpid02: "vpid02" for vcpu in vcpus}
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
