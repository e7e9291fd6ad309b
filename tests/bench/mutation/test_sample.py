"""The suite catches mutants of each kind that concerns flushes, kicks, requests, sequences and references."""

from __future__ import annotations

import os

import pytest

from bench.mutation import run
from bench.mutation.generate import mutants
from bench.mutation.judge import CAUGHT, QUICK
from bench.mutation.results import Results
from bench.mutation.suite import SECOND, Pair

# Each with the test of the pair that catching.toml lists, which is tried first.
# By name, so that an edit of KVM's code elsewhere does not choose others, each with a test that catches it.
# If one of them is gone because its statement is, put another of that rule in its place.
SAMPLE = {
    "drop-flush@kvm_zap_gfn_range#1": "zap-range-ioctl",
    "drop-flush@tdp_mmu_iter_cond_resched#1": "zap-leafs-yield",
    "drop-flush@write_protect_flush#1": "log-get",
    "drop-free@tdp_mmu_free_sp_rcu#1": "stale-dead-root",
    "drop-kick@loaded_vmcs_clear#1": "away-zap",
    "drop-reference@kvm_mmu_free_roots#1": "guest-paging-off",
    "drop-request@kvm_flush_remote_tlbs#1": "zap-range-ioctl",
    "drop-request@request_guest_flush#1": "guest-pge",
    "drop-sequence@kvm_mmu_invalidate_start#1": "fault-races-unmap",
    "drop-zap@kvm_invalidate_memslot#1": "slot-delete-fault",
    "late-flush@kvm_handle_hva_range#1": "notifier-second-zap",
    "narrow-end@kvm_tdp_mmu_wrprot_slot#1": "log-edges",
    "skip-after-yield@tdp_mmu_zap_leafs#1": "zap-yield-restart",
    "split-flush@kvm_zap_gfn_range#1": "zap-range-second-zap",
    # Of code without EPT.
    "drop-alternative@kvm_mmu_invalidate_addr_in_root#4": "shadow-invlpg-absent",
    "drop-alternative@kvm_prefetch_pages#2": "shadow-prefetch-protected",
    "drop-branch@unaccount_shadowed#1": "shadow-two-roles",
    "drop-flush@validate_direct_spte#1": "shadow-huge-clean-small",
    "drop-not@_fault_in#1": "shadow-table-swapped",
    "drop-not@direct_pte_prefetch#1": "shadow-prefetch-unpaged",
    "drop-operand@mmu_set_spte#5": "shadow-huge-clean",
    "drop-operand@update_accessed_dirty_bits#2": "shadow-read-then-write",
    "drop-zap@kvm_sync_page#1": "shadow-table-swapped",
    "late-flush@kvm_mmu_track_write#1": "shadow-store-second-zap",
    "off-by-one@kvm_mmu_invalidate_addr_in_root#1": "shadow-invlpg-keeps",
    "twice-zap@validate_direct_spte#1": "shadow-huge-clean-small",
}


@pytest.mark.stress
@pytest.mark.timeout(300)
def test_mutants_of_each_kind_are_caught() -> None:
    run.prepare()
    results, jobs = Results(None, ""), len(os.sched_getaffinity(0))
    wanted = [Pair(test) for test in dict.fromkeys(SAMPLE.values())]
    known = run.learn(results, wanted, jobs, print, executions=SECOND)
    by_name = {mutant.name: mutant for mutant in mutants()}
    assert not SAMPLE.keys() - by_name.keys(), "no such mutants"
    judged = run.judge_all(results, [by_name[name] for name in SAMPLE], known, jobs, print, depth=QUICK)
    assert {mutant.name: judgement.verdict for mutant, judgement in judged} == dict.fromkeys(SAMPLE, CAUGHT)
