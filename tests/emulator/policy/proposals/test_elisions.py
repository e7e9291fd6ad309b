"""Elisions of proposals that remember flushes, and the single pieces of their memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from emulator.kvm.decisions import Migration
from emulator.kvm.mmu.structs import KvmMmuPage, KvmMmuRootInfo
from emulator.kvm.structs import Kvm, Vcpu
from emulator.machine.runtime import Cpu
from emulator.policy import MUTANTS, Policy, preset
from emulator.policy.instructions import REASON_MIGRATION, invept_single
from emulator.policy.proposals import PROPOSALS
from native.types import Hfn
from tests.emulator.kvm.rig import Guest, Rig, scopes
from tests.emulator.policy.proposals.test_tracking import (
    bounce,
    guest_invalidates_elsewhere,
    zapped_while_away,
)


def flushes_of(rig: Rig, policy: str, action: Callable[[Kvm, Guest], None]) -> dict[str, int]:
    """INVEPTs and INVVPIDs that the action takes, once both pCPUs know the root."""
    kvm = rig.vm(preset(policy))
    guest = rig.guest(kvm)
    bounce(guest, 5)
    before = scopes(rig)
    action(kvm, guest)
    return {name: n - before[name] for name, n in scopes(rig).items() if n != before[name]}


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("linux-7.3", {"invept_global": 2}),
        ("lkml-2025-active-roots", {"invept_single": 2}),
        ("lkml-2025-cpu-flushed-mask", {}),
        ("cpu-flushed-mask-cleared", {"invvpid_single": 2}),
        ("root-tlb-gen", {"invvpid_single": 2}),
        ("lkml-2025-on-each-cpu", {}),
    ],
)
def test_what_two_moves_cost_when_nothing_changes(rig: Rig, policy: str, expected: dict[str, int]) -> None:
    def move(_: Kvm, guest: Guest) -> None:
        guest.read(0, 5)
        guest.read(1, 5)

    assert flushes_of(rig, policy, move) == expected


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("linux-7.3", {"invept_global": 3}),
        ("cpu-flushed-mask-cleared", {"invept_single": 2, "invvpid_single": 2}),
        ("root-tlb-gen", {"invept_single": 2, "invvpid_single": 2}),
    ],
)
def test_what_they_cost_after_a_remote_flush(rig: Rig, policy: str, expected: dict[str, int]) -> None:
    """Served on pCPU 1; then pCPU 0 is due once, and pCPU 1 not again."""

    def zap_and_move(kvm: Kvm, guest: Guest) -> None:
        rig.unmap(kvm, 0, 64)
        guest.read(1, 70)
        guest.read(0, 70)
        guest.read(1, 70)

    assert flushes_of(rig, policy, zap_and_move) == expected


def test_a_second_vcpu_profits_from_the_flush_of_the_first(rig: Rig) -> None:
    kvm = rig.vm(preset("root-tlb-gen"))
    first, second = rig.guest(kvm), rig.guest(kvm)
    first.read(0, 5)
    second.read(1, 5)
    before = scopes(rig)
    second.read(0, 5)
    assert scopes(rig)["invept_single"] == before["invept_single"]


@pytest.mark.parametrize(
    ("policy", "answers", "flushed"),
    [("root-tlb-gen", {}, 1), ("root-tlb-gen", {"remote_flush": "active-roots"}, 2)],
)
def test_vcpus_on_one_pcpu_serve_a_remote_flush_once(
    rig: Rig, policy: str, answers: dict[str, str], flushed: int
) -> None:
    kvm = rig.vm(preset(policy).with_settings(answers) if answers else preset(policy))
    guests = rig.guest(kvm), rig.guest(kvm)
    for guest in guests:
        guest.read(0, 5)
        guest.read(0, 70)
    before = scopes(rig)
    rig.unmap(kvm, 0, 64)
    for guest in guests:
        guest.read(0, 70)
    assert scopes(rig)["invept_single"] - before["invept_single"] == flushed
    for guest in guests:
        guest.read(0, 5)
    assert rig.violations() == {}


def test_a_root_that_is_loaded_again_is_not_flushed_again(rig: Rig) -> None:
    kvm = rig.vm(preset("root-tlb-gen"))
    rig.smm_slots(kvm)
    guest = rig.guest(kvm)
    for _ in range(2):
        guest.write(0, 5)
        guest.enter_smm(0, 70)
    guest.write(0, 5)
    before = scopes(rig)
    with rig.counting(kvm) as counts:
        guest.enter_smm(0, 70)
        guest.write(0, 5)
    assert counts["mmu_load"] == 2
    assert scopes(rig)["invept_single"] == before["invept_single"]
    assert rig.violations() == {}


def test_a_flush_that_a_vcpu_asks_of_itself_is_no_remote_one(rig: Rig) -> None:
    """With migration=all-contexts it is owed for the guest's invalidations, too."""
    policy = Policy().with_settings({"remote_flush": "root-tlb-gen"})
    assert guest_invalidates_elsewhere(rig, policy) == set()
    assert zapped_while_away(rig, policy) == set()


@pytest.mark.parametrize("policy", ["cpu-flushed-mask-cleared", "root-tlb-gen"])
def test_the_flush_of_a_load_counts(rig: Rig, policy: str) -> None:
    guest = rig.guest(rig.vm(preset(policy)))
    guest.read(0, 5)
    guest.read(1, 5)
    before = scopes(rig)
    guest.read(0, 5)
    assert scopes(rig)["invept_single"] == before["invept_single"]


def test_a_policy_is_asked_about_migrations_when_there_is_one(rig: Rig) -> None:
    class Counts(Policy):
        asked = 0

        def migration(self, cpu: Cpu, vcpu: Vcpu) -> Migration:
            self.asked += 1
            return super().migration(cpu, vcpu)

    policy = Counts(migration="root-tlb-gen", migration_vpid="invvpid")
    guest = rig.guest(rig.vm(policy))
    for pcpu in (0, 0, 1, 1, 0, 0):
        guest.read(pcpu, 5)
    assert policy.asked == 3


def test_elided_flushes_are_counted(rig: Rig) -> None:
    kvm = rig.vm(preset("root-tlb-gen"))
    guest = rig.guest(kvm)
    bounce(guest, 5)
    with rig.counting(kvm) as counts:
        guest.read(0, 5)
    assert counts["flushes_elided"] == 1


# --- single pieces ------------------------------------------------------------------------------------------

STATEFUL = ("cpu-flushed-mask", "cpu-flushed-mask-cleared", "root-tlb-gen")


def root_of(rig: Rig, answer: str) -> tuple[Policy, Vcpu, KvmMmuPage]:
    policy = Policy("test", migration=answer)
    guest = rig.guest(rig.vm(policy))
    guest.read(0, 5)
    assert guest.vcpu.mmu.root is not None
    assert guest.vcpu.mmu.root.sp is not None
    return policy, guest.vcpu, guest.vcpu.mmu.root.sp


def flushes_on_a_move(rig: Rig, policy: Policy, vcpu: Vcpu, pcpu: int) -> int:
    """Ask the proposal what a move to that pCPU takes."""
    before = scopes(rig)["invept_single"]
    assert policy.migration(rig.machine.cpus[pcpu], vcpu) == "done"
    return scopes(rig)["invept_single"] - before


@pytest.mark.parametrize("answer", STATEFUL)
def test_a_root_without_a_shadow_page_has_no_record(rig: Rig, answer: str) -> None:
    """It has no EPTP either, so the machine stops when it is to be flushed."""
    policy, vcpu, _ = root_of(rig, answer)
    held = vcpu.mmu.root
    vcpu.mmu.root = KvmMmuRootInfo(pgd=0, hfn=Hfn(0), sp=None)
    for _ in range(2):
        with pytest.raises(AssertionError, match="root 0x0 has no shadow page"):
            policy.migration(rig.machine.cpus[1], vcpu)
    vcpu.mmu.root = held


@pytest.mark.parametrize("answer", STATEFUL)
def test_a_record_is_of_one_pcpu_and_ends_with_a_remote_flush(rig: Rig, answer: str) -> None:
    policy, vcpu, _ = root_of(rig, answer)
    assert [flushes_on_a_move(rig, policy, vcpu, 1) for _ in range(2)] == [1, 0]
    assert [flushes_on_a_move(rig, policy, vcpu, 2) for _ in range(2)] == [1, 0]
    rig.unmap(vcpu.kvm, 0, 64)
    ends = answer != "cpu-flushed-mask"
    assert [flushes_on_a_move(rig, policy, vcpu, 1) for _ in range(2)] == [int(ends), 0]


@pytest.mark.parametrize("answer", STATEFUL[1:])
def test_each_flush_of_the_root_is_recorded(rig: Rig, answer: str) -> None:
    """The sketch records those of migrations alone; a missing bit only costs a flush."""
    policy, vcpu, root = root_of(rig, answer)
    invept_single(rig.machine.cpus[2], vcpu.kvm, root, REASON_MIGRATION)
    assert flushes_on_a_move(rig, policy, vcpu, 2) == 0


def test_all_proposals_are_alternatives_of_the_points_that_they_decide() -> None:
    from emulator.policy import POINTS

    for name, cls in PROPOSALS.items():
        decided = {point.name for point in POINTS if point.name in vars(cls)}
        offered = {point.name for point in POINTS if name in point.proposals()}
        assert decided == offered, name


def test_guards_of_the_repaired_policies_are_registered() -> None:
    assert {
        "mask-never-cleared",
        "mask-cleared-after-kick",
        "mask-without-invvpid",
        "migration-current-only",
        "generation-not-checked",
        "generation-without-invvpid",
        "generation-after-kick",
        "generation-outlives-root",
    } <= set(MUTANTS)
