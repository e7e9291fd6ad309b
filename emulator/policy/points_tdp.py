"""The decision points of the TDP MMU, which are asked on hosts with EPT alone."""

from __future__ import annotations

from typing import Final

from emulator.kvm.decisions import Decisions
from emulator.policy.point import DecisionPoint, point

TDP_POINTS: Final[tuple[DecisionPoint, ...]] = (
    point(
        Decisions.root_alloc,
        "Flush when a page becomes a root (kvm_tdp_mmu_alloc_root; mmu_alloc_root for an EPT of L1's).",
        {
            "none": "No flush: a vCPU that loads the root flushes it, on the pCPU where it loads it.",
        },
        proposed={
            "vm-pcpu-mask": (
                "INVEPT single-context on the root, on the pCPUs where a vCPU of the VM was ever loaded. A "
                "pCPU that joins is flushed (an idea of August 2025)."
            ),
            "on-each-cpu": (
                "INVEPT single-context on the root, on every pCPU of the host (proposed in July 2025)."
            ),
        },
    ),
    point(
        Decisions.root_lock,
        "How a vCPU holds mmu_lock while it takes or drops roots (kvm_mmu_load, kvm_mmu_free_roots).",
        {
            "read": "For read, as page faults do (since 6.9).",
            "write": "For write: no page fault and no zap runs meanwhile (before 6.9).",
        },
    ),
    point(
        Decisions.root_put,
        "The end of a root, when its last reference is put (kvm_tdp_mmu_put_root).",
        {
            "sync-no-flush": (
                "The root's page is given to RCU. The TDP MMU holds a reference of its own until the root "
                "is invalidated and zapped (since 6.6)."
            ),
            "flush": (
                "A remote flush is made, and then the root's page is given to RCU as with sync-no-flush."
            ),
            "async": (
                "A worker zaps the root first. A role change may put the last reference and lose the whole "
                "tree (5.18 to 6.5)."
            ),
            "inline": (
                "The thread that puts the last reference unlinks and zaps the root at once, in one step. A "
                "role change may be that thread (before 5.18)."
            ),
        },
    ),
    point(
        Decisions.invalid_root_zap,
        "Flush when the SPTEs of an invalidated root have been zapped.",
        {
            "no-flush": (
                "No flush: no vCPU uses the root any more, and the next life of its page begins with a flush."
            ),
            "flush": "A remote flush at each yield and at the end (5.12 to 5.17).",
        },
    ),
    point(
        Decisions.zap_scope,
        "The SPTEs that the zap of a range removes (tdp_mmu_zap_leafs).",
        {
            "leafs": "Leaf SPTEs only; tables stay (since 5.18).",
            "leafs-and-tables": "Leaf SPTEs, and tables that lie wholly in the range (before 5.18).",
        },
    ),
    point(
        Decisions.zap,
        "When tables that are unlinked are flushed, and when they are given to RCU (handle_removed_pt).",
        {
            "rcu-proxy": (
                "They are given to RCU at once. One flush for all of them comes before this thread leaves "
                "its read section, and so before a grace period can end (since 5.18)."
            ),
            "flush-per-table": (
                "Each table is flushed before it is given to RCU, at every level (before 5.18)."
            ),
        },
        proposed={
            "disconnected-list": (
                "They are collected on a list, flushed once, and then given to RCU (proposed in November "
                "2021)."
            ),
        },
    ),
    point(
        Decisions.zap_root,
        "In which passes an invalidated root is zapped. A zap can yield only between two SPTEs of a pass.",
        {
            "4k-2m-1g-root": "Level by level, so that no step is long (since 6.9).",
            "1g-root": "Everything below each 1G SPTE in one step, then the root's SPTEs (5.18 to 6.8).",
            "root": "Everything below each SPTE of the root page in one step (before 5.18).",
        },
    ),
    point(
        Decisions.zap_yield,
        "Order of flush and unlock in tdp_mmu_iter_cond_resched(), and at the end of walks that remove "
        "tables.",
        {
            "flush-then-unlock": "Flush, then rcu_read_unlock(), then drop mmu_lock (since 5.18).",
        },
        wrong={
            "unlock-then-flush": (
                "rcu_read_unlock(), then flush, then drop mmu_lock (5.12 to 5.17). Harmless while only leaf "
                "SPTEs are zapped, or while each table is flushed before it is given to RCU. Wrong with "
                "zap=rcu-proxy."
            ),
            "no-flush": "The walk yields without the flush, and reports it done.",
        },
    ),
    point(
        Decisions.map_replace,
        "Flush when a fault installs a huge leaf over a table (tdp_mmu_map_handle_target_level).",
        {
            "flush": "kvm_flush_remote_tlbs_gfn() before rcu_read_unlock().",
        },
        wrong={
            "none": "No flush: cached pointers to the freed table stay in use.",
        },
    ),
    point(
        Decisions.eager_split,
        "Whether huge pages are split when dirty logging is armed or cleared, before a write fault meets "
        "them (kvm_mmu_try_split_huge_pages).",
        {
            "split": (
                "All huge pages are split for which table pages are free, without a flush (since 5.18, with "
                "eager_page_split)."
            ),
            "none": "Huge pages are left to the write faults, decision fault_split (before 5.18).",
        },
    ),
    point(
        Decisions.split_alloc,
        "Locks that are dropped while an eager split allocates a table (tdp_mmu_split_huge_pages_root).",
        {
            "unlocked": "RCU and mmu_lock, always; the walk then reads the SPTE again (6.12 and later).",
            "locked": "Neither, unless no table page is left at once (5.18 to 6.1).",
        },
    ),
    point(
        Decisions.fault_split,
        "A huge leaf in the way of a fault that needs a 4K mapping (kvm_tdp_mmu_map).",
        {
            "split": "A table that maps the same frames replaces the leaf, without a flush (since 6.2).",
            "zap": "The leaf is zapped with a flush, and each 4K page faults again (before 6.2).",
        },
    ),
    point(
        Decisions.invalid_roots,
        "Whether zaps of ranges and write-protection also change the SPTEs of invalidated roots "
        "(kvm_tdp_mmu_zap_leafs, kvm_tdp_mmu_write_protect_gfn, kvm_tdp_mmu_clear_dirty_pt_masked).",
        {
            "skip": (
                "They do not. mmu_notifiers do, without a flush, because no vCPU can use such a root "
                "(since 6.9)."
            ),
            "include": "They do, and a zap there owes a flush, for mmu_notifiers too (before 6.9).",
        },
    ),
    point(
        Decisions.frozen_zap,
        "The order in which a zap under mmu_lock for read ends; the SPTE is frozen meanwhile "
        "(tdp_mmu_zap_spte_atomic, before 6.13).",
        {
            "flush-first": "Flush, and then take the table behind the SPTE apart (6.10 to 6.12).",
            "tables-first": (
                "Take the table apart and give it to RCU, and then flush, still in RCU's read section "
                "(before 6.10)."
            ),
        },
    ),
    point(
        Decisions.mapped_fault,
        "A fault that finds a leaf which permits the access already, because another vCPU was quicker "
        "(tdp_mmu_map_handle_target_level).",
        {
            "spurious": "The leaf stays as it is (since 6.13).",
            "remake": (
                "The leaf is made anew: it has W again if dirty logging had taken it and the host permits "
                "writes, and loses the dirty flag if it had W (before 6.13)."
            ),
        },
    ),
    point(
        Decisions.huge_recovery,
        "How tables become huge pages again when dirty logging ends.",
        {
            "in-place": "A huge leaf replaces each table, with one flush for all (since 6.13).",
            "zap-each": "Each table is zapped and flushed, and faults install the 2M leafs (before 6.13).",
        },
    ),
)
