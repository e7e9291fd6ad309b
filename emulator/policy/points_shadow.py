"""The decision points of the shadow MMU, which are asked on hosts without EPT, and for EPTs of L1's."""

from __future__ import annotations

from typing import Final

from emulator.kvm.decisions import Decisions
from emulator.policy.point import DecisionPoint, point

SHADOW_POINTS: Final[tuple[DecisionPoint, ...]] = (
    point(
        Decisions.pcide_on,
        "A vCPU's roots when it sets CR4.PCIDE, which flushes nothing (kvm_post_set_cr4).",
        {
            "free": "All roots are dropped, so that each is synced when it is loaded again.",
        },
        wrong={
            "keep": (
                "Previous roots stay cached. A MOV to CR3 with bit 63 returns to one from the time without "
                "PCIDs, when a MOV to CR3 invalidated all processes and synced the new root alone."
            ),
        },
    ),
    point(
        Decisions.noflush_root,
        "A cached root to which a vCPU returns by a MOV to CR3 with bit 63 (kvm_set_cr3).",
        {
            "none": (
                "It is used as it is: an invalidation of its PCID meanwhile would have dropped it (since "
                "4.19)."
            ),
            "sync": "It is synced, as for a MOV to CR3 that flushes (before 4.19).",
        },
    ),
    point(
        Decisions.commit_zap,
        "The flush before shadow pages that were zapped are freed (kvm_mmu_commit_zap_page).",
        {
            "flush-then-free": "A remote flush, while mmu_lock is still held; then all are freed.",
        },
        wrong={
            "batch": (
                "They wait until there are ten, for one flush. Wrong because their leaf SPTEs are gone at "
                "once: an unmap of such a page finds none, and flushes nothing."
            ),
            "none": "No flush: cached pointers to the freed tables stay in use.",
        },
    ),
    point(
        Decisions.spte_replace,
        "Flush when a fault sets a leaf SPTE over a table or over a leaf of another frame (mmu_set_spte).",
        {
            "flush": "A remote flush, after the SPTE is set.",
        },
        wrong={
            "none": (
                "No flush: the guest may have the old translation cached under another PCID, and an unmap "
                "of the old frame finds no SPTE of it."
            ),
        },
    ),
    point(
        Decisions.table_protect,
        "Flush when a page is write-protected because it is a guest's page table (spte_write_protect).",
        {
            "mmu-writable": (
                "If an SPTE was writable, or could become so without mmu_lock: dirty logging takes W first, "
                "and flushes later (since 5.15)."
            ),
        },
        wrong={
            "if-changed": "Only if an SPTE was writable until now.",
            "none": "No flush: the guest goes on writing to the table unseen.",
        },
    ),
    point(
        Decisions.spte_update,
        "Flush after a leaf SPTE of the shadow MMU was changed (make_spte, mmu_spte_update).",
        {
            "mmu-writable": "If it was MMU-writable and is no more: a guest's table is write-protected.",
            "accessed-dirty": (
                "Also if it lost the accessed or dirty flag, or W alone (before 6.13). A fault on a page "
                "that another vCPU has just mapped loses the dirty flag, and thus flushes."
            ),
        },
    ),
)
