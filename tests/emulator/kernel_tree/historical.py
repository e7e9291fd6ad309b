"""Bugs that Linux's TDP MMU had, or that its comments warn of, as changes of 6.12.

Each is told as the function, a short pattern in it, and its replacement, of which a test makes a patch.  The
commit in a name mended the bug, introduced the line that the bug leaves out, or (cf3e26427c08) had the bug.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.emulator.kernel_tree.bugs import Bug

VERSION: Final = "6.12"
# Litmus tests of races that the shipped ones do not meet.
LITMUS: Final = Path(__file__).with_name("litmus")


@dataclass(frozen=True, slots=True)
class Historical:
    """A bug, the litmus test that finds it, and the violations of which it has to show one.

    kinds: none if the tree's code crashes or warns.  function: one that the story names, with its line; "" if
    the bug bypasses the shim, so that there is no story.  executions: the most that the search makes.
    """

    bug: Bug
    test: str
    kinds: frozenset[str]
    function: str
    executions: int = 2000


def _one(
    name: str,
    function: str,
    pattern: str,
    replacement: str,
    test: str,
    kinds: str,
    story: str,
    executions: int = 2000,
) -> Historical:
    file = "tdp_iter.c" if function.startswith("tdp_iter") else "tdp_mmu.c"
    bug = Bug(name, function, pattern, replacement, file)
    own = LITMUS / f"{test}.toml"
    return Historical(bug, str(own) if own.is_file() else test, frozenset(kinds.split()), story, executions)


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
        "a later root forgets the flush (cf3e26427c08)", "kvm_tdp_mmu_zap_leafs",
        r"true, flush\)", "true, false)",
        "zap-root-yield", "use-after-free", "tdp_mmu_zap_leafs",
    ),
    _one(
        "a zap owes no flush", "tdp_mmu_zap_leafs",
        r"flush = true", "flush = false",
        "remote-one-root", "use-after-free", "tdp_mmu_zap_leafs",
    ),
    _one(
        "the reference count begins at one (edbdb43fc96b)", "kvm_tdp_mmu_alloc_root",
        r"count, 2\)", "count, 1)",
        "slot-delete", "leak walk-after-free", "kvm_tdp_mmu_put_root",
    ),
    _one(
        "a root is freed without RCU", "kvm_tdp_mmu_put_root",
        r"call_rcu\(([^,]*), (\w+)\)", r"\2(\1)",
        "root-previous-obsolete", "", "tdp_mmu_next_root",
    ),
    _one(
        "a table is freed without RCU (7cca2d0b7e7d)", "handle_removed_pt",
        r"call_rcu\(([^,]*), (\w+)\)", r"\2(\1)",
        "huge-replaces-table", "walk-after-free", "handle_removed_pt",
    ),
    _one(
        "a notifier skips invalid roots (d62007edf01f)", "kvm_tdp_mmu_unmap_gfn_range",
        r"as_id, false\)", "as_id, true)",
        "zap-invalid-root", "use-after-free", "tdp_mmu_zap_root",
    ),
    _one(
        "a notifier holds no reference on its root (7533377215b6)", "kvm_tdp_mmu_unmap_gfn_range",
        r"__for_each_tdp_mmu_root_yield_safe\((.*), false\)", r"for_each_tdp_mmu_root(\1)",
        "notifier-root-freed", "", "kvm_tdp_mmu_unmap_gfn_range",
    ),
    _one(
        "recovery of huge pages goes on after a yield (33a3164161fc)", "zap_collapsible_spte_range",
        r"true\)\)\s*continue;", "true)) barrier();",
        "recover-yields", "", "__tdp_mmu_set_spte_atomic", 300,
    ),
    _one(
        "recovery of huge pages does not flush (048f49809c52)", "tdp_mmu_zap_spte_atomic",
        r"kvm_flush_remote_tlbs_gfn\([^;]*;", "",
        "log-recover", "walk-after-free", "tdp_mmu_zap_spte_atomic",
    ),
    _one(
        "a leaf over a table is not flushed for (08f07c800e9d)", "tdp_mmu_map_handle_target_level",
        r"kvm_flush_\w+\(.*\)", "0",
        "huge-replaces-table", "walk-after-free", "tdp_mmu_map_handle_target_level",
    ),
    _one(
        "a fault maps over a frozen SPTE (f5d16bb9be68)", "kvm_tdp_mmu_map",
        r"is_frozen_spte\(iter.old_spte\)", "0",
        "recover-frozen", "use-after-free", "handle_removed_pt",
    ),
    _one(
        "a shared walk stores without comparing (9a77daacc87d)", "__tdp_mmu_set_spte_atomic",
        _CMPXCHG, r"(*(\1) = new_spte, 0)",
        "recover-frozen", "stale-after-revoke use-after-free deadlock", "",
    ),
    _one(
        "a shared walk exchanges without comparing (9a77daacc87d)", "__tdp_mmu_set_spte_atomic",
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
        "return-zap", "use-after-free", "kvm_tdp_mmu_unmap_gfn_range",
    ),
    _one(
        "an SPTE is skipped after a yield (as by 3a0f64de479c)", "tdp_iter_next",
        r"tdp_iter_restart\(iter\);", "iter->next_last_level_gfn++; tdp_iter_restart(iter);",
        "skipped", "use-after-free", "kvm_tdp_mmu_unmap_gfn_range",
    ),
    _one(
        "write-protection gives up after a race", "wrprot_gfn_range",
        r"goto retry", "continue",
        "aged", "lost-dirty", "kvm_tdp_mmu_wrprot_slot",
    ),
)  # fmt: skip
