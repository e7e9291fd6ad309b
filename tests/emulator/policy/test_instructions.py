"""The instructions of policies act as the SDM says, are told, and are accounted for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from emulator.kvm.kvm_host import IN_GUEST_MODE
from emulator.kvm.mmu.structs import KvmMmuRootInfo
from emulator.kvm.notifications import PcpuFlush
from emulator.kvm.structs import Kvm, Vcpu
from emulator.machine.runtime import Cpu
from emulator.policy import Policy
from emulator.policy import instructions as do
from native import FLUSH_REASONS, FLUSH_SCOPES, ffi, lib
from native.types import CpuId, Hfn
from tests.emulator.kvm.rig import Rig, idle_pcpus

Act = Callable[[Cpu, Kvm, Vcpu], None]


class Hears(Policy):
    def __init__(self) -> None:
        super().__init__("hears")
        self.log: list[PcpuFlush] = []

    def pcpu_flushes(self, cpu: Cpu, kvm: Kvm, flush: PcpuFlush) -> None:
        self.log.append(flush)


def counted(rig: Rig) -> dict[tuple[str, str], int]:
    """Flushes so far, by scope and reason."""
    n, size = len(FLUSH_REASONS), rig.machine.config["vms"] * len(FLUSH_SCOPES) * len(FLUSH_REASONS)
    flushes, necessary = ffi.new("uint64_t[]", size), ffi.new("uint64_t[]", size)
    lib.flushes_sum(rig.machine.m, flushes, necessary)
    return {
        (scope, reason): flushes[i * n + r]
        for i, scope in enumerate(FLUSH_SCOPES)
        for r, reason in enumerate(FLUSH_REASONS)
        if flushes[i * n + r]
    }


def entries(rig: Rig, pcpu: int) -> int:
    return int(lib.tlb_dump(lib.cpu_tlb(rig.machine.m, CpuId(pcpu)), ffi.NULL, 0))


@pytest.mark.parametrize(
    ("act", "scope", "kind", "drops"),
    [
        (lambda c, k, v: do.invept_single(c, k, v.mmu.root, do.REASON_MIGRATION), "invept_single",
         "invept-single", True),
        (lambda c, k, v: do.invept_single(c, k, v.mmu.root.sp, do.REASON_MIGRATION), "invept_single",
         "invept-single", True),
        (lambda c, k, v: do.invept_global(c, k, do.REASON_MIGRATION), "invept_global", "invept-global", True),
        (lambda c, k, v: do.invvpid_single(c, v, do.REASON_MIGRATION), "invvpid_single",
         "invvpid-single", False),
        (lambda c, k, v: do.invvpid_all(c, k, do.REASON_MIGRATION), "invvpid_all", "invvpid-all", False),
        (lambda c, k, v: do.invvpid_address(c, v, 5, do.REASON_MIGRATION), "invvpid_address",
         "invvpid-address", False),
        (lambda c, k, v: do.invvpid_retain_globals(c, v, do.REASON_MIGRATION), "invvpid_single",
         "invvpid-single", False),
    ],
)  # fmt: skip
def test_flushes(rig: Rig, act: Act, scope: str, kind: str, drops: bool) -> None:
    """The guest has no paging: its mappings are guest-physical, which INVVPID leaves alone."""
    policy = Hears()
    kvm = rig.vm(policy)
    guest = rig.guest(kvm)
    guest.read(0, 5)
    before, policy.log = counted(rig), []
    there = entries(rig, 0)
    assert there
    act(rig.machine.cpus[0], kvm, guest.vcpu)
    after = counted(rig)
    changed = {key: after[key] - before.get(key, 0) for key in after if after[key] != before.get(key, 0)}
    assert changed == {(scope, "migration"): 1}
    assert (entries(rig, 0) < there) == drops
    assert [(flush.kind, flush.reason) for flush in policy.log] == [(kind, lib.REASON_MIGRATION)]
    roots = (kvm.tdp_mmu_roots[0],) if kind == "invept-single" else ()
    assert policy.log[0].roots == roots


def test_a_root_without_a_shadow_page_has_no_eptp(rig: Rig) -> None:
    kvm = rig.vm()
    root = KvmMmuRootInfo(pgd=0, hfn=Hfn(0), sp=None)
    with pytest.raises(AssertionError, match=r"^WARN_ON_ONCE: construct_eptp: root 0x0 has no shadow page$"):
        do.invept_single(rig.machine.cpus[0], kvm, root, do.REASON_MIGRATION)
    assert not counted(rig)


@pytest.mark.parametrize(
    ("pcpus", "acting", "flushed"), [([0, 1], 2, [0, 1]), ([0, 1, 2], 0, [0, 1, 2]), ([], 0, [])]
)
def test_invept_on_other_pcpus(rig: Rig, pcpus: list[int], acting: int, flushed: list[int]) -> None:
    kvm = rig.vm()
    guest = rig.guest(kvm)
    for pcpu in (0, 1, 2):
        guest.read(pcpu, 5)
    others = [CpuId(pcpu) for pcpu in (0, 1, 2) if pcpu != acting]
    cpu = rig.machine.cpus[acting]
    lib.cpu_online(rig.machine.m, cpu.id)
    with idle_pcpus(rig, *others):
        do.invept_single_on(cpu, kvm, kvm.tdp_mmu_roots[0], pcpus, wait=True)
        assert [pcpu for pcpu in (0, 1, 2) if not entries(rig, pcpu)] == flushed
    lib.cpu_offline(rig.machine.m, cpu.id)
    assert counted(rig).get(("invept_single", "root_alloc"), 0) == len(flushed)


def test_invept_on_each_cpu(rig: Rig) -> None:
    kvm = rig.vm()
    guest = rig.guest(kvm)
    for pcpu in (0, 1, 2):
        guest.read(pcpu, 5)
    with idle_pcpus(rig, *map(CpuId, range(3))):
        do.invept_single_on_each_cpu(rig.host, kvm, kvm.tdp_mmu_roots[0])
    assert [entries(rig, pcpu) for pcpu in range(3)] == [0, 0, 0]


def test_a_kick_interrupts_the_pcpus_of_its_mask(rig: Rig) -> None:
    kvm = rig.vm()
    with idle_pcpus(rig, *map(CpuId, range(3))):
        before = [received(rig, pcpu) for pcpu in range(3)]
        do.kick(rig.host, kvm, [0, 2], wait=True)
        assert [received(rig, pcpu) - n for pcpu, n in enumerate(before)] == [1, 0, 1]


def received(rig: Rig, pcpu: int) -> int:
    values = ffi.new("uint64_t[]", lib.COUNTERS)
    lib.counters_read(rig.machine.m, CpuId(pcpu), values)
    return int(values[lib.COUNT_IPIS_RECEIVED])


def test_a_kick_leaves_the_mask_alone_that_kvm_is_filling(rig: Rig) -> None:
    class Adds(Policy):
        def remote_kick(self, cpu: Cpu, kvm: Kvm) -> Any:
            before = cpu.kick_mask[0]
            do.kick(cpu, kvm, [], wait=False)
            assert cpu.kick_mask[0] == before
            self.seen = before
            cpu.kick_mask[0] = 0b100
            return "done"

    policy = Adds("adds")
    kvm = rig.vm(policy)
    guest = rig.guest(kvm)
    guest.read(0, 5)
    lib.vcpu_set_mode(rig.machine.m, guest.vcpu.id, IN_GUEST_MODE)
    with idle_pcpus(rig, *map(CpuId, range(3))):
        before = [received(rig, pcpu) for pcpu in range(3)]
        rig.unmap(kvm, 0, 64)
        # The class has changed the mask from pCPU 0 to pCPU 2.
        assert [received(rig, pcpu) - n for pcpu, n in enumerate(before)] == [0, 0, 1]
    assert policy.seen == 0b001
    lib.vcpu_set_mode(rig.machine.m, guest.vcpu.id, lib.OUTSIDE_GUEST_MODE)


def test_an_elided_flush_is_counted(rig: Rig) -> None:
    kvm = rig.vm()
    with rig.counting(kvm) as counts:
        do.flush_elided(rig.machine.cpus[0], kvm, do.REASON_MIGRATION)
    assert counts == {"flushes_elided": 1}


@pytest.mark.parametrize(
    ("point", "happened"),
    [("remote_flush", "tlb_flush"), ("root_load", "mmu_load"), ("migration", "migrations")],
)
def test_done_leaves_the_flush_to_the_policy(rig: Rig, point: str, happened: str) -> None:
    """KVM neither flushes nor counts an elision."""
    policy = type("Acts", (Policy,), {point: lambda self, *arguments: "done"})("acts")
    kvm = rig.vm(policy)
    guest = rig.guest(kvm)
    guest.read(0, 5)
    if point != "root_load":
        guest.read(1, 5)
        rig.unmap(kvm, 64, 128)
        guest.read(1, 5)
    stats = rig.stats(kvm)
    assert stats["flushes_elided"] == 0
    assert stats[happened]
    flushes = counted(rig)
    if point == "remote_flush":
        assert "invept_global" not in {scope for scope, _ in flushes}
    else:
        assert point not in {reason for _, reason in flushes}
