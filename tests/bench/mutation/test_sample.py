"""The suite catches mutants of each kind that concerns flushes, kicks, requests, sequences and references."""

from __future__ import annotations

import os

import pytest

from bench.mutation import run
from bench.mutation.generate import mutants
from bench.mutation.judge import CAUGHT, QUICK
from bench.mutation.results import Results
from bench.mutation.suite import FIRST, quick_pairs

# By name, so that an edit of KVM's code elsewhere does not choose others.  If one of them is gone
# because its statement is, put another of that rule in its place.
SAMPLE = (
    "drop-flush@kvm_zap_gfn_range#1",
    "drop-flush@tdp_mmu_iter_cond_resched#1",
    "drop-flush@write_protect_flush#1",
    "drop-free@tdp_mmu_free_sp_rcu#1",
    "drop-kick@loaded_vmcs_clear#1",
    "drop-reference@kvm_mmu_free_roots#1",
    "drop-request@kvm_flush_remote_tlbs#1",
    "drop-request@request_guest_flush#1",
    "drop-sequence@kvm_mmu_invalidate_start#1",
    "drop-zap@kvm_invalidate_memslot#1",
    "late-flush@kvm_handle_hva_range#1",
    "skip-after-yield@tdp_mmu_zap_leafs#1",
    "split-flush@kvm_zap_gfn_range#1",
)


@pytest.mark.stress
@pytest.mark.timeout(300)
def test_mutants_of_each_kind_are_caught() -> None:
    run.prepare()
    results, jobs = Results(None, ""), len(os.sched_getaffinity(0))
    known = run.learn(results, quick_pairs(), jobs, print, executions=FIRST)
    by_name = {mutant.name: mutant for mutant in mutants()}
    assert not set(SAMPLE) - set(by_name), "no such mutants"
    judged = run.judge_all(results, [by_name[name] for name in SAMPLE], known, jobs, print, depth=QUICK)
    assert {mutant.name: judgement.verdict for mutant, judgement in judged} == dict.fromkeys(SAMPLE, CAUGHT)
