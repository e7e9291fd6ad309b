"""Each moment is told once, at its time, with the state of the machine that its docstring promises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest

from emulator.kvm.kvm_host import IN_GUEST_MODE, KVM_REQ_TLB_FLUSH
from emulator.kvm.mmu.structs import KvmMmuPage
from emulator.kvm.notifications import Heard, PcpuFlush
from emulator.kvm.structs import Kvm, Vcpu
from emulator.machine.runtime import Cpu
from emulator.policy import Policy
from emulator.policy.acting import MOMENTS
from native import lib
from native.types import FlushReason
from tests.emulator.kvm.rig import Rig, recreate_slot, scopes


class Hears(Policy):
    """Notes each moment with what `look` makes of its arguments."""

    def __init__(self, **answers: str) -> None:
        super().__init__("hears", **answers)
        self.log: list[tuple[str, Any]] = []
        self.look: Callable[..., Any] = lambda *arguments: None

    def note(self, moment: str, *arguments: Any) -> None:
        self.log.append((moment, self.look(*arguments)))

    def of(self, moment: str) -> list[Any]:
        return [found for name, found in self.log if name == moment]


class HearsRoots(Hears):
    def root_created(self, cpu: Cpu, kvm: Kvm, root: KvmMmuPage) -> None:
        self.log.append(("created", (root.hfn, root in kvm.tdp_mmu_roots)))

    def root_released(self, cpu: Cpu, kvm: Kvm, root: KvmMmuPage) -> None:
        self.log.append(("released", (root.hfn, root in kvm.tdp_mmu_roots)))

    def root_current(self, cpu: Cpu, vcpu: Vcpu, root: KvmMmuPage) -> None:
        assert vcpu.mmu.root is not None
        assert vcpu.mmu.root.sp is root
        self.log.append(("current", root.hfn))

    def root_load(self, cpu: Cpu, vcpu: Vcpu, root: KvmMmuPage) -> Any:
        self.log.append(("asked", root.hfn))
        return super().root_load(cpu, vcpu, root)


def test_the_life_of_a_root(rig: Rig) -> None:
    policy = HearsRoots()
    kvm = rig.vm(policy)
    guest = rig.guest(kvm)
    guest.read(0, 5)
    assert guest.vcpu.mmu.root is not None
    first = guest.vcpu.mmu.root.hfn
    assert policy.log == [("created", (first, False)), ("current", first), ("asked", first)]
    policy.log.clear()
    recreate_slot(rig, kvm)
    assert policy.log == []  # the vCPU still holds it
    guest.read(0, 5)
    second = guest.vcpu.mmu.root.hfn
    assert policy.log == [
        ("released", (first, True)),
        ("created", (second, False)),
        ("current", second),
        ("asked", second),
    ]


def test_a_cached_root_becomes_current(rig: Rig) -> None:
    policy = HearsRoots(role_change="keep-roots")
    kvm = rig.vm(policy)
    rig.smm_slots(kvm)
    guest = rig.guest(kvm)
    for _ in range(2):
        guest.write(0, 5)
        guest.enter_smm(0, 70)
    guest.write(0, 5)
    loads = policy.of("asked")
    currents = policy.of("current")
    assert len(loads) == 2
    assert currents[:2] == loads
    assert len(currents) > 4
    assert set(currents[2:]) == set(loads)


def test_a_remote_flush_is_due_before_a_request_is_visible(rig: Rig) -> None:
    class HearsFlushes(Hears):
        def remote_flush_due(self, cpu: Cpu, kvm: Kvm, reason: FlushReason) -> None:
            requests = [lib.kvm_test_request(cpu.m, vcpu.id, KVM_REQ_TLB_FLUSH) for vcpu in kvm.vcpus]
            self.log.append(("due", (reason, requests)))

    policy = HearsFlushes()
    kvm = rig.vm(policy)
    guest = rig.guest(kvm)
    guest.read(0, 5)
    policy.log.clear()
    rig.unmap(kvm, 0, 64)
    assert policy.of("due") == [(lib.REASON_REMOTE_NOTIFIER, [0])]
    assert lib.kvm_test_request(rig.machine.m, guest.vcpu.id, KVM_REQ_TLB_FLUSH)


def test_a_vcpu_is_loading_while_its_vmcs_tells_the_pcpu_before(rig: Rig) -> None:
    class HearsLoads(Hears):
        def vcpu_loading(self, cpu: Cpu, vcpu: Vcpu) -> None:
            before = vcpu.loaded_vmcs.cpu, lib.vcpu_cpu(cpu.m, vcpu.id)
            self.log.append(("loading", (cpu.id, *before)))

    policy = HearsLoads()
    guest = rig.guest(rig.vm(policy))
    for pcpu in (0, 1, 1, 0):
        guest.read(pcpu, 5)
    moves = [one for one in policy.of("loading") if one[0] != one[1]]
    assert moves == [(0, -1, -1), (1, 0, 0), (0, 1, 1)]


@pytest.mark.parametrize("order", ["mode-then-requests", "requests-then-mode"])
def test_before_entry_comes_before_the_last_check(rig: Rig, order: str) -> None:
    class HearsEntries(Hears):
        requests = 0

        def before_entry(self, cpu: Cpu, vcpu: Vcpu) -> None:
            found = lib.irqs_disabled(cpu.m, cpu.id), lib.vcpu_mode(cpu.m, vcpu.id) == IN_GUEST_MODE
            self.log.append(("entry", found))
            if self.requests:
                self.requests -= 1
                lib.kvm_make_request(cpu.m, vcpu.id, KVM_REQ_TLB_FLUSH)

    policy = HearsEntries(entry_order=order)
    kvm = rig.vm(policy)
    guest = rig.guest(kvm)
    guest.read(0, 5)
    assert set(policy.of("entry")) == {(1, order == "mode-then-requests")}
    policy.log.clear()
    policy.requests = 1
    with rig.counting(kvm) as counts:
        guest.read(0, 5)
    # The request that was made there has cancelled the first entry, and was serviced before the second.
    assert len(policy.of("entry")) == 2
    assert counts["tlb_flush"] == 1
    assert counts["exits"] == 1


class HearsPcpus(Hears):
    def pcpu_flushes(self, cpu: Cpu, kvm: Kvm, flush: PcpuFlush) -> None:
        self.note("flushes", cpu, kvm, flush)

    def pcpu_flushed(self, cpu: Cpu, kvm: Kvm, flush: PcpuFlush) -> None:
        self.note("flushed", cpu, kvm, flush)


def test_a_pcpu_tells_its_flushes_before_and_after(rig: Rig) -> None:
    policy = HearsPcpus(migration_vpid="invvpid")
    kvm = rig.vm(policy)
    policy.look = lambda cpu, kvm, flush: (cpu.id, flush, sum(scopes(rig).values()))
    guest = rig.guest(kvm)
    guest.read(0, 5)
    guest.read(1, 5)
    root = guest.vcpu.mmu.root
    assert root is not None
    assert root.sp is not None
    before = [(cpu, flush) for cpu, flush, _ in policy.of("flushes")]
    assert (0, PcpuFlush("invept-single", root.hfn, lib.REASON_ROOT_LOAD, (root.sp,))) in before
    assert before[-2:] == [
        (1, PcpuFlush("invvpid-single", guest.vcpu.vpid, lib.REASON_MIGRATION)),
        (1, PcpuFlush("invept-global", -1, lib.REASON_MIGRATION, (root.sp,))),
    ]
    assert [(cpu, flush) for cpu, flush, _ in policy.of("flushed")] == before
    assert [(moment, found[2]) for moment, found in policy.log] == [
        ("flushes" if at % 2 == 0 else "flushed", (at + 1) // 2) for at in range(2 * len(before))
    ]


def test_a_policy_that_hears_nothing_costs_the_test_of_a_field(rig: Rig) -> None:
    kvm = rig.vm()
    guest = rig.guest(kvm)
    guest.read(0, 5)
    assert kvm.heard == Heard()
    assert kvm.policy_data is None
    assert guest.vcpu.policy_data is None
    assert kvm.tdp_mmu_roots[0].policy_data is None


def test_all_moments_have_signatures() -> None:
    assert list(MOMENTS) == [one.name for one in fields(Heard)]
    assert all(parameters[:2] == ("self", "cpu") for parameters in MOMENTS.values())
