"""The names that the rules look for in KVM's code: functions of emulator.kvm, of the core, and of locks.

A call belongs to a kind by the last part of its name, so `kvm.mmu_lock.cond_resched(cpu)` is `cond_resched`.
tests/bench/mutation checks that each name is still called somewhere, so a renamed function cannot silently
take its mutants along.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

# The calls that rules drop, move and duplicate.
EVENTS: Final[Mapping[str, frozenset[str]]] = {
    "flush": frozenset({
        "ept_sync_context",
        "flush_invept_global",
        "flush_invept_single",
        "flush_invvpid_single",
        "invvpid_individual_addr",
        "invvpid_single_context",
        "kvm_flush_remote_tlbs",
        "kvm_flush_remote_tlbs_memslot",
        "kvm_flush_remote_tlbs_range",
        "kvm_mmu_commit_zap_page",
        "kvm_mmu_remote_flush_or_zap",
        "kvm_service_local_tlb_flush_requests",
        "kvm_vcpu_flush_tlb_all",
        "map_replace_flush",
        "migration_ept",
        "migration_vpid",
        "notifier_flush",
        "vmx_flush_tlb_all",
        "vmx_flush_tlb_current",
        "vmx_flush_tlb_ept_root",
        "vmx_flush_tlb_guest",
        "vpid_sync_context",
        "write_protect_flush",
    }),
    "kick": frozenset({
        "kvm_kick_many_cpus",
        "kvm_vcpu_kick",
        "smp_call_function_many",
        "smp_call_function_single",
        "wake",
    }),
    "barrier": frozenset({
        "local_irq_disable",
        "loaded_vmcs_clear",
        "rcu_barrier",
        "smp_mb",
        "smp_mb__after_srcu_read_unlock",
        "synchronize_srcu",
        "vcpu_exiting_guest_mode",
        "wait_until",
    }),
    "sequence": frozenset({
        "kvm_mmu_invalidate_start",
        "mmu_invalidate_begin",
        "mmu_invalidate_end",
        "mmu_invalidate_range_add",
    }),
    "request": frozenset({
        "kvm_make_all_cpus_request",
        "kvm_make_request",
        "request_tlb_flush",
    }),
    "reference": frozenset({
        "inc_not_zero",
        "kvm_mmu_free_roots",
        "kvm_mmu_free_obsolete_roots",
        "kvm_mmu_unload",
        "kvm_tdp_mmu_get_root",
        "kvm_tdp_mmu_put_root",
        "mmu_free_root_page",
        "shadow_mmu_free_root_page",
        "free_pae_roots",
        "free_vpid",
    }),
    "free": frozenset({
        "ept_table_free",
        "ept_table_free_rcu",
        "handle_removed_pt",
        "tdp_mmu_free_sp_rcu",
    }),
    "zap": frozenset({
        "kvm_tdp_mmu_clear_dirty_pt_masked",
        "kvm_tdp_mmu_invalidate_roots",
        "kvm_tdp_mmu_write_protect_gfn",
        "kvm_tdp_mmu_zap_invalidated_roots",
        "kvm_arch_flush_shadow_memslot",
        "kvm_mmu_zap_all_fast_back",
        "tdp_mmu_set_spte",
        "tdp_mmu_zap_root",
        "drop_parent_pte",
        "drop_spte",
        "kvm_mmu_prepare_zap_page",
        "kvm_zap_all_rmap_sptes",
        "mmu_page_zap_pte",
        "mmu_spte_clear_track_bits",
    }),
    "sync": frozenset({
        "kvm_mmu_mark_parents_unsync",
        "kvm_mmu_sync_prev_roots",
        "kvm_mmu_sync_roots",
        "mark_unsync",
        "mmu_sync_children",
    }),
    "account": frozenset({
        "account_shadowed",
        "kvm_mmu_gfn_allow_lpage",
        "kvm_mmu_gfn_disallow_lpage",
        "rmap_add",
        "unaccount_shadowed",
    }),
}  # fmt: skip

# Statements that must keep their place among their neighbours: they release a lock, leave RCU, clear a bit,
# set a mode, or publish.
ORDERED: Final = frozenset({
    "_clear",
    "_unlink_root",
    "append",
    "cond_resched",
    "kvm_check_request",
    "invalidate",
    "kvm_init_mmu",
    "kvm_swap_active_memslots",
    "kvm_vcpu_srcu_read_lock",
    "kvm_vcpu_srcu_read_unlock",
    "local_irq_enable",
    "mark_page_dirty_in_slot",
    "rcu_enter",
    "mmu_spte_set",
    "rcu_leave",
    "set_mode",
    "srcu_read_lock",
    "srcu_read_unlock",
    "vcpu_set_cpu",
    "vcpu_set_mode",
    "vmcs_write_eptp",
    "vmptrld",
    "vmx_load_mmu_pgd",
    "vmx_vcpu_load_vmcs",
})  # fmt: skip

# Locals with fields that only the thread itself uses: its vCPU and CPU, a walk, a fault.
PRIVATE: Final = frozenset({
    "arch", "child", "cpu", "entry", "fault", "it", "mmu", "removal", "vcpu", "walker",
})  # fmt: skip

# Doing one of these twice is doing it once, for it sets a bit or frees all that there is.
IDEMPOTENT: Final = frozenset({
    "kvm_make_request",
    "kvm_mmu_free_obsolete_roots",
    "kvm_mmu_free_roots",
    "kvm_mmu_unload",
    "request_tlb_flush",
})  # fmt: skip

# Context managers that hold a lock or a read section for the length of their block.
SECTIONS: Final = frozenset({"held", "rcu_read_lock", "read_lock", "write_lock"})

# The emulator's own accounts, promises to the oracle, moments that policies hear of, and ordering points: no
# code of KVM, and never mutated.
ACCOUNTS: Final = frozenset({
    "_revoke",
    "event",
    "flush_begins",
    "flush_elided",
    "flush_ended",
    "host_works",
    "oracle_revoke",
    "oracle_revoke_mask",
    "oracle_ticket",
    "point",
    "stat",
    "stores_exit",
    "stores_need_not_exit",
    "vcpu_add_flush_reason",
    "vcpus_went_on",
    "walk_ends",
})  # fmt: skip

# Arguments that bound a range of pages, by their meaning: narrowed and widened by one.
LOWER: Final = frozenset({"base_gfn", "gfn_start", "hva_start", "start"})
UPPER: Final = frozenset({"end", "end_gfn", "gfn_end", "hva_end", "npages", "nr_pages", "pages"})

# Calls that ignore the range that they are given: bare metal flushes a whole VM.
RANGELESS: Final = frozenset({"kvm_flush_remote_tlbs_range", "removed_page"})

# The parameter that cuts walks into steps for explore, and is no code of KVM.
STEPPING: Final = "single"

# Whether the walk has yielded: the rule `skip` moves the iterator on by one page before the walk goes on.
YIELDS: Final = frozenset({"tdp_mmu_iter_cond_resched"})
