"""Mutants that no shipped test, no run and no chaos noticed once: each has a test now, which refutes it as a
patch, and which finds nothing without it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from bench.mutation.generate import mutants
from emulator.errors import BadInput
from emulator.explore.results.verdict import Plan, Verdict, explore_verdict
from emulator.litmus.loader import load_test
from emulator.litmus.model import INCONCLUSIVE
from emulator.litmus.policies import named_policy
from emulator.litmus.verdict import FAILED, VIOLATIONS

pytestmark = pytest.mark.slow

CASES = {
    # The flush moves out of mmu_lock: a second zapper finds the SPTE gone, and goes on without one.
    "late-flush@kvm_handle_hva_range#1": ("notifier-second-zap", "use-after-free"),
    "split-flush@kvm_handle_hva_range#1": ("notifier-second-zap", "use-after-free"),
    "late-flush@kvm_zap_gfn_range#1": ("zap-range-second-zap", "use-after-free"),
    "split-flush@kvm_zap_gfn_range#1": ("zap-range-second-zap", "use-after-free"),
    # Roots are invalidated in one critical section, and the request is made in another, or in none.
    "split-request@kvm_mmu_zap_all_fast_front#1": ("zap-all-notifier", "use-after-free"),
    "late-request@kvm_mmu_zap_all_fast_front#1": ("zap-all-notifier", "use-after-free"),
    # A yield-safe iterator puts the previous root before it has the next one.
    "first-reference@tdp_mmu_next_root#1": ("notifier-root-freed", "KASAN: a walk over the roots"),
    # A memslot update amid an invalidation.
    "drop-branch@kvm_swap_active_memslots#1": ("slot-waits", "is refused for ever"),
    # Kicks from other threads: an SMI, an INIT, a new set of memslots.
    "drop-kick@kvm_inject_smi#1": ("smi-kicks", INCONCLUSIVE),
    "drop-kick@apic_send_init#1": ("init-kicks", INCONCLUSIVE),
    "drop-kick@kvm_arch_memslots_updated#1": ("slot-create-kicks", INCONCLUSIVE),
    # An INIT that was latched in SMM is lost.
    "drop-request@kvm_smm_changed#1": ("smm-init-latched", INCONCLUSIVE),
    # A memslot goes amid invalidations: its update does not wait, or its INVALID copy lacks a page.
    "drop-barrier@kvm_swap_active_memslots#2": ("slot-waits-zap", "inconsistent"),
    "narrow-end@kvm_invalidate_memslot#1": ("slot-delete-notifier", "use-after-free"),
    # A vCPU goes on in SMM with the root that it had before.
    "drop-reference@kvm_mmu_unload#1": ("smm-memory-root", "use-after-free"),
    # Logging is armed: the walk passes over a page after a yield, or ends before the slot.
    "skip-after-yield@kvm_tdp_mmu_wrprot_slot#1": ("log-arm-yields", "lost-dirty"),
    "narrow-end@kvm_tdp_mmu_wrprot_slot#1": ("log-edges", "lost-dirty"),
    # The oldest of four roots stays where it is, and becomes the root of a fifth process.
    "drop-reference@cached_root_find_and_keep_current#1": ("shadow-five-processes", "guest-stale"),
    # INVVPID without VPIDs fails.
    "drop-guard@vpid_sync_vcpu_addr#1": ("shadow-invlpg-no-vpid", "invvpid failed"),
    # Neighbours of a fault: invalidated meanwhile, or logged.
    "drop-guard@tdp_mmu_map_around#1": ("fault-around-races", "use-after-free"),
    "drop-operand@__kvm_mmu_faultin_pfn#4": ("log-fault-around", "lost-dirty"),
    # An invalidation that drops mmu_lock lacks a part of its range, or has not begun.
    "narrow-end@kvm_zap_gfn_range#1": ("zap-range-levels", "stale-after-revoke"),
    "swap@kvm_handle_hva_range#1": ("smm-unmap-yields", "inconsistent"),
    "last-sequence@kvm_handle_hva_range#1": ("smm-unmap-yields", "inconsistent"),
    # CR0.WP is toggled without EPT, and the role stays as it was.
    "drop-not@kvm_post_set_cr0#2": ("shadow-wp-write", INCONCLUSIVE),
    # A huge page that is not split is write-protected by nothing, or outside of RCU.
    "drop-not@kvm_tdp_mmu_write_protect_gfn#3": ("log-unsplit", "lost-dirty"),
    "release-early@kvm_tdp_mmu_write_protect_gfn#1": ("log-unsplit", "suspicious RCU usage"),
    # Locks that the kernel asserts, too.
    "release-early@kvm_vm_ioctl_clear_dirty_log#1": ("log-clear-edges", "slots_lock is not held"),
    "early-sequence@kvm_handle_hva_range#1": ("fault-races-unmap", "mmu_lock is not held for write"),
    # Without EPT obsolete pages stay, or their roots do.
    "drop-flush@kvm_zap_obsolete_pages#1": ("shadow-zap-all-unpaged", "leak"),
    "drop-not@shadow_mmu_free_root_page#1": ("shadow-zap-all-unpaged", "leak"),
    # A nested guest that exits before its first instruction leaves L1 its flush.
    "last-flush@nested_vmx_vmexit#1": ("nested-entry-halted", "cross-guest"),
    # A register changes although the instruction faults; a reserved bit is ignored.
    "drop-guard@set_efer#1": ("shadow-gp", "'efer lme 0 gp' is no general-protection fault"),
    "drop-guard@_read_tables#4": ("shadow-entry-bits", "shutdown"),
    # A sync that drops an SPTE keeps its translation, and the host frees the page.
    "drop-flush@kvm_mmu_find_shadow_page#3": ("shadow-relinked", "use-after-free"),
}


@cache
def diffs() -> dict[str, str]:
    """Return the mutants as patches, by name; made when a test needs them, not when tests are collected."""
    return {one.name: one.diff for one in mutants()}


def explored(test: str, policy: str, executions: int) -> Verdict:
    return explore_verdict(load_test(test), named_policy(policy), Plan(executions=executions, minimize=False))


@pytest.mark.parametrize("name", CASES)
def test_it_is_caught(name: str, tmp_path: Path) -> None:
    test, expected = CASES[name]
    path = tmp_path / "mutant.patch"
    path.write_text(diffs()[name])
    found = explored(test, str(path), 1500)
    if expected == INCONCLUSIVE:
        assert found.verdict == INCONCLUSIVE
    elif found.verdict == FAILED:
        assert expected in found.failure
    else:
        assert (found.verdict, found.kinds[0]) == (VIOLATIONS, expected)


@pytest.mark.parametrize("test", sorted({test for test, _ in CASES.values()}))
def test_nothing_is_found_without_it(test: str) -> None:
    found = explored(test, "linux-7.3", 150)
    assert found.verdict not in (VIOLATIONS, FAILED)
    assert found.met


@pytest.mark.parametrize(
    ("name", "test"),
    [
        ("drop-not@spte_permission_fault#2", "aged-exec"),
        ("drop-not@spte_permission_fault#3", "aged-read"),
    ],
)
def test_an_access_that_passes_for_spurious_never_ends(name: str, test: str, tmp_path: Path) -> None:
    """No execution comes to the danger, so one tells as much as many."""
    path = tmp_path / "mutant.patch"
    path.write_text(diffs()[name])
    assert explored(test, str(path), 1).verdict == INCONCLUSIVE
    assert explored(test, "linux-7.3", 1).met == 1


def test_a_lost_race_for_a_table_is_noticed(tmp_path: Path) -> None:
    """The fault goes on below a table that was never linked, which ends the search."""
    path = tmp_path / "mutant.patch"
    path.write_text(diffs()["drop-guard@kvm_tdp_mmu_map#3"])
    with pytest.raises(BadInput, match="has no attribute 'level'"):
        explored("fault-two-link", str(path), 150)
    assert explored("fault-two-link", "linux-7.3", 150).verdict not in (VIOLATIONS, FAILED)
