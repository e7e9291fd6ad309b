"""Elisions of policies that remember flushes, and the single pieces of the memory that roots have."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from emulator.kvm.decisions import Migration, Tracking
from emulator.kvm.mmu import root_tracking
from emulator.kvm.mmu.spte import root_to_sp
from emulator.kvm.mmu.structs import KvmMmuRootInfo
from emulator.kvm.structs import Kvm, Vcpu
from emulator.machine.runtime import Cpu
from emulator.policy import MUTANTS, Policy, preset
from native.types import Hfn
from tests.emulator.kvm.rig import Guest, Rig, running_rig, scopes
from tests.emulator.kvm.test_root_tracking import bounce, guest_invalidates_elsewhere, zapped_while_away


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
            return "root-tlb-gen"

    policy = Counts(migration_vpid="invvpid")
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


def root_of(rig: Rig, policy: str = "root-tlb-gen") -> tuple[Kvm, KvmMmuRootInfo]:
    kvm = rig.vm(preset(policy))
    guest = rig.guest(kvm)
    guest.read(0, 5)
    assert guest.vcpu.mmu.root is not None
    return kvm, guest.vcpu.mmu.root


def test_a_root_without_a_shadow_page_has_no_record(rig: Rig) -> None:
    root_of(rig)
    cpu = rig.machine.cpus[0]
    root = KvmMmuRootInfo(pgd=0, hfn=Hfn(0), sp=None)
    for how in ("cpu-flushed-mask", "cpu-flushed-mask-cleared", "root-tlb-gen"):
        assert not root_tracking.test_and_set_flushed(cpu, root, how)
        assert not root_tracking.test_and_set_flushed(cpu, root, how)


@pytest.mark.parametrize("how", ["cpu-flushed-mask-cleared", "root-tlb-gen"])
def test_a_record_is_of_one_pcpu_and_ends_with_a_remote_flush(rig: Rig, how: Tracking) -> None:
    kvm, root = root_of(rig)
    a, b = rig.machine.cpus[1:3]
    root_tracking.record_flush(a, kvm, [root])
    assert root_tracking.test_and_set_flushed(a, root, how)
    assert not root_tracking.test_and_set_flushed(b, root, how)
    assert root_tracking.test_and_set_flushed(b, root, how)
    rig.unmap(kvm, 0, 64)
    assert not root_tracking.test_and_set_flushed(a, root, how)


def test_nothing_is_remembered_where_no_policy_asks() -> None:
    with running_rig() as rig:
        kvm = rig.vm()
        guest = rig.guest(kvm)
        guest.read(0, 5)
        assert not kvm.tracks_roots
        root = root_to_sp(guest.vcpu.mmu.root)
        assert root is not None
        assert root.tracking is None


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
