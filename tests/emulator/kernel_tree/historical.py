"""Bugs that Linux's TDP MMU had, or that its comments warn of, as changes of 6.12.

Each is told as the function, a short pattern in it, and its replacement, of which a test makes a patch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tests.emulator.kernel_tree.bugs import Bug

VERSION: Final = "6.12"


@dataclass(frozen=True, slots=True)
class Historical:
    """A bug, the litmus test that finds it, and the violations of which it has to show one.

    kinds: none if the tree's code crashes.  function: one that the story names; "" if no step of the tree's
    code took the right away, so that there is no story.
    """

    bug: Bug
    test: str
    kinds: frozenset[str]
    function: str


def _one(
    name: str, function: str, pattern: str, replacement: str, test: str, kinds: str, story: str
) -> Historical:
    return Historical(Bug(name, function, pattern, replacement), test, frozenset(kinds.split()), story)


_CMPXCHG: Final = r"!try_cmpxchg64\(([^,]*), &iter->old_spte, new_spte\)"

HISTORICAL: Final = (
    _one(
        "the flush of an earlier root is lost (a835429cda91)", "kvm_tdp_mmu_unmap_gfn_range",
        r"may_block, flush\)", "may_block, false)",
        "zap-root-order", "use-after-free", "tdp_mmu_zap_leafs",
    ),
    _one(
        "a yield leaves the flush to later (a835429cda91)", "tdp_mmu_iter_cond_resched",
        r"if \(flush\)", "if (0)",
        "zap-leafs-yield", "use-after-free", "tdp_mmu_zap_leafs",
    ),
    _one(
        "a zap owes no flush", "tdp_mmu_zap_leafs",
        r"flush = true", "flush = false",
        "remote-one-root", "use-after-free", "tdp_mmu_zap_leafs",
    ),
    _one(
        "the reference count begins at one (edbdb43fc96b)", "kvm_tdp_mmu_alloc_root",
        r"count, 2\)", "count, 1)",
        "slot-delete", "leak walk-after-free", "",
    ),
    _one(
        "a root is freed without RCU", "kvm_tdp_mmu_put_root",
        r"call_rcu\(([^,]*), (\w+)\)", r"\2(\1)",
        "root-previous-obsolete", "", "tdp_mmu_next_root",
    ),
    _one(
        "a notifier skips invalid roots", "kvm_tdp_mmu_unmap_gfn_range",
        r"as_id, false\)", "as_id, true)",
        "zap-invalid-root", "use-after-free", "tdp_mmu_zap_root",
    ),
    _one(
        "a leaf over a table is not flushed for", "tdp_mmu_map_handle_target_level",
        r"kvm_flush_\w+\(.*\)", "0",
        "huge-replaces-table", "walk-after-free", "tdp_mmu_map_handle_target_level",
    ),
    _one(
        "a fault maps over a frozen SPTE", "kvm_tdp_mmu_map",
        r"is_frozen_spte\(iter.old_spte\)", "0",
        "recover-frozen", "use-after-free", "handle_removed_pt",
    ),
    _one(
        "a shared walk stores without comparing", "__tdp_mmu_set_spte_atomic",
        _CMPXCHG, r"(*(\1) = new_spte, 0)",
        "recover-frozen", "stale-after-revoke use-after-free deadlock", "",
    ),
    _one(
        "a shared walk exchanges without comparing", "__tdp_mmu_set_spte_atomic",
        _CMPXCHG, r"(xchg(\1, new_spte), 0)",
        "recover-frozen", "stale-after-revoke use-after-free deadlock", "",
    ),
    _one(
        "write-protection leaves MMU-writable (f81602958c11)", "write_protect_gfn",
        r"\| shadow_mmu_writable_mask", "",
        "nested-ept-table", "missed-guest-write", "write_protect_gfn",
    ),
    _one(
        "the last SPTE of a range is left", "tdp_mmu_zap_leafs",
        r"min\(end,", "min(end - 1,",
        "return-zap", "use-after-free", "",
    ),
)  # fmt: skip
