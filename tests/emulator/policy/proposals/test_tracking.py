"""Policies that elide flushes by roots' memory: each hole is shown, and each repair closes it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from emulator.policy import Policy, preset
from native import lib
from tests.emulator.kvm.rig import Guest, Rig, at_point, page_is_a_root_again, unmap_while_entering

Scenario = Callable[[Rig, Policy], set[str]]


def bounce(guest: Guest, gfn: int) -> None:
    """Both pCPUs have flushed the root and have the page's translation; the vCPU is on pCPU 1.  (Page 70 is
    one that stays.)"""
    for pcpu in (0, 1, 0, 1):
        guest.read(pcpu, gfn)
        guest.read(pcpu, 70)


def zapped_while_away(rig: Rig, policy: Policy) -> set[str]:
    """The page goes while the vCPU is on another pCPU, which alone serves the flush."""
    kvm = rig.vm(policy)
    guest = rig.guest(kvm)
    bounce(guest, 5)
    rig.unmap(kvm, 0, 64)
    guest.read(1, 70)
    guest.read(0, 5)
    return set(rig.violations())


def zapped_while_another_vcpu_fills(rig: Rig, policy: Policy) -> set[str]:
    """Another vCPU of the VM has filled the entry under the same root, and serves the flush elsewhere."""
    kvm = rig.vm(policy)
    mine, other = rig.guest(kvm), rig.guest(kvm)
    bounce(mine, 70)
    bounce(other, 70)
    other.read(0, 5)
    other.read(2, 70)
    rig.unmap(kvm, 0, 64)
    other.read(2, 70)
    mine.read(1, 70)
    mine.read(0, 5)
    return set(rig.violations())


def serve_and_move_at(rig: Rig, policy: Policy, kind: str) -> set[str]:
    """The vCPU serves the request and is on the other pCPU when the flusher is at its point `kind`."""
    kvm = rig.vm(policy)
    guest = rig.guest(kvm)
    bounce(guest, 5)

    def serve_and_move() -> None:
        guest.read(1, 70)
        guest.read(0, 70)

    with at_point(rig, rig.host.id, kind, "write", serve_and_move):
        rig.unmap(kvm, 0, 64)
    guest.read(0, 5)
    return set(rig.violations())


def served_and_moved_before_the_flush_ends(rig: Rig, policy: Policy) -> set[str]:
    """All requests are made, no vCPU has been kicked."""
    return serve_and_move_at(rig, policy, "mode")


def served_before_the_masks_are_cleared(rig: Rig, policy: Policy) -> set[str]:
    """Just before roots forget: too late if requests are visible by then."""
    return serve_and_move_at(rig, policy, "policy_state")


def entered_before_the_masks_are_cleared(rig: Rig, policy: Policy) -> set[str]:
    """As before, and the vCPU is in guest mode on the other pCPU until the flush is over."""
    kvm = rig.vm(policy)
    guest = rig.guest(kvm)
    bounce(guest, 5)
    unmap_while_entering(rig, kvm, guest, "policy_state", lambda: guest.read(1, 70))
    return set(rig.violations())


def guest_invalidates_elsewhere(rig: Rig, policy: Policy) -> set[str]:
    """The guest changes its page tables and invalidates on one pCPU, and comes back to the other."""
    kvm = rig.vm(policy, slice_accesses=40)
    guest = Guest(rig, kvm, pages=16, paging=1, pcid=1, unmap_every=10, end_gfn=512)
    for turn in range(60):
        guest.run_slices(turn % 2, 4)
    assert rig.counter(lib.COUNT_GUEST_INVALIDATIONS) > 50
    return set(rig.violations())


def root_page_has_a_new_life(rig: Rig, policy: Policy) -> set[str]:
    """The root's page is a root again, and an idle pCPU still has entries of its earlier life."""
    kvm = rig.vm(policy)
    guest = rig.guest(kvm)
    bounce(guest, 5)
    page_is_a_root_again(rig, guest, 1)
    guest.read(0, 5)
    return set(rig.violations())


def zapped_in_smm(rig: Rig, policy: Policy) -> set[str]:
    """The page goes while the vCPU is in SMM, where it was not mapped."""
    kvm = rig.vm(policy)
    rig.smm_slots(kvm)
    guest = rig.guest(kvm)
    guest.write(0, 5)
    guest.enter_smm(0, 70, 71, 72)
    rig.unmap(kvm, 0, 64)
    for _ in range(3):
        guest.next_slice(0)
    guest.read(0, 5)
    assert not guest.vcpu.arch.smm
    return set(rig.violations())


def zapped_in_smm_while_away(rig: Rig, policy: Policy) -> set[str]:
    """As before, while it is in SMM on another pCPU; then it comes back, and leaves SMM there."""
    kvm = rig.vm(policy)
    rig.smm_slots(kvm)
    guest = rig.guest(kvm)
    bounce(guest, 70)
    guest.write(0, 5)
    guest.enter_smm(0, 70, 71, 72, 73, 74)
    guest.next_slice(1)
    rig.unmap(kvm, 0, 64)
    guest.next_slice(1)
    for _ in range(4):
        guest.next_slice(0)
    guest.read(0, 5)
    assert not guest.vcpu.arch.smm
    return set(rig.violations())


SCENARIOS: tuple[Scenario, ...] = (
    zapped_while_away,
    zapped_while_another_vcpu_fills,
    served_and_moved_before_the_flush_ends,
    guest_invalidates_elsewhere,
    root_page_has_a_new_life,
    zapped_in_smm,
    zapped_in_smm_while_away,
)
SOUND = (
    "linux-7.3",
    "linux-6.12",
    "linux-5.18",
    "linux-5.14",
    "lkml-2021-batch-list",
    "lkml-2025-active-roots",
    "cpu-flushed-mask-cleared",
    "root-tlb-gen",
)
KEEP = {"role_change": "keep-roots"}
# Policy, other answers, the scenario that shows the hole, and how.
HOLES: list[tuple[str, dict[str, str], Scenario, str]] = [
    ("lkml-2025-cpu-flushed-mask", {}, zapped_while_away, "use-after-free"),
    ("lkml-2025-cpu-flushed-mask", {}, zapped_while_another_vcpu_fills, "use-after-free"),
    ("lkml-2025-cpu-flushed-mask", {}, guest_invalidates_elsewhere, "guest-stale"),
    ("lkml-2025-cpu-flushed-mask", KEEP, zapped_in_smm_while_away, "use-after-free"),
    ("lkml-2025-on-each-cpu", {}, zapped_while_away, "use-after-free"),
    ("lkml-2025-on-each-cpu", {}, guest_invalidates_elsewhere, "guest-stale"),
    ("lkml-2025-vm-pcpu-mask", {}, zapped_while_away, "use-after-free"),
    ("lkml-2025-vm-pcpu-mask", {}, guest_invalidates_elsewhere, "guest-stale"),
    ("lkml-2021-single-context", KEEP, zapped_in_smm, "use-after-free"),
    ("mutant:remote-flush-current-only", {}, zapped_in_smm, "use-after-free"),
    ("mutant:mask-never-cleared", {}, zapped_while_away, "use-after-free"),
    ("mutant:mask-cleared-after-kick", {}, served_before_the_masks_are_cleared, "use-after-free"),
    ("mutant:mask-without-invvpid", {}, guest_invalidates_elsewhere, "guest-stale"),
    ("mutant:migration-current-only", {}, zapped_in_smm_while_away, "use-after-free"),
    ("mutant:generation-not-checked", {}, zapped_in_smm_while_away, "use-after-free"),
    ("mutant:generation-without-invvpid", {}, guest_invalidates_elsewhere, "guest-stale"),
    ("mutant:generation-after-kick", {}, entered_before_the_masks_are_cleared, "use-after-free"),
    ("mutant:generation-outlives-root", {}, root_page_has_a_new_life, "foreign-root"),
]


def _id(value: object) -> str | None:
    if isinstance(value, dict):
        return ",".join(f"{point}={answer}" for point, answer in value.items()) or "as-it-is"
    return getattr(value, "__name__", None)


@pytest.mark.parametrize(("policy", "settings", "scenario", "kind"), HOLES, ids=_id)
def test_the_hole(rig: Rig, policy: str, settings: dict[str, str], scenario: Scenario, kind: str) -> None:
    changed = preset(policy).with_settings(settings) if settings else preset(policy)
    assert kind in scenario(rig, changed)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=_id)
@pytest.mark.parametrize("policy", SOUND)
def test_sound_policies_stay_silent(rig: Rig, policy: str, scenario: Scenario) -> None:
    assert scenario(rig, preset(policy)) == set()


@pytest.mark.parametrize("policy", ["linux-7.3", "lkml-2025-active-roots", *SOUND[-2:]])
@pytest.mark.parametrize("scenario", [zapped_in_smm, zapped_in_smm_while_away], ids=_id)
def test_cached_roots_are_no_hole(rig: Rig, policy: str, scenario: Scenario) -> None:
    assert scenario(rig, preset(policy).with_settings(KEEP)) == set()


@pytest.mark.parametrize("policy", ["cpu-flushed-mask-cleared", "root-tlb-gen"])
@pytest.mark.parametrize(
    "scenario", [served_before_the_masks_are_cleared, entered_before_the_masks_are_cleared], ids=_id
)
def test_roots_forget_before_requests_are_visible(rig: Rig, policy: str, scenario: Scenario) -> None:
    assert scenario(rig, preset(policy)) == set()


def test_one_context_is_enough_while_a_vcpu_has_one_root(rig: Rig) -> None:
    """The argument of 2021: every change of the root comes with a flush of its own."""
    assert zapped_in_smm(rig, preset("lkml-2021-single-context")) == set()


@pytest.mark.parametrize("answer", ["flush-current", "root-tlb-gen", "none"])
def test_a_look_before_entry_makes_the_flush_at_load_superfluous(rig: Rig, answer: str) -> None:
    policy = preset("root-tlb-gen").with_settings({"root_load": answer})
    assert root_page_has_a_new_life(rig, policy) == set()
    assert zapped_in_smm_while_away(rig, policy) == set()
