"""Which scenario catches which mutant of the shadow MMU on real threads, and with which delays.

With a minute for each, nearly all runs catch the mutant on a machine of two busy cores; most do in seconds.
"""

from __future__ import annotations

from typing import Final, NamedTuple


class Storm(NamedTuple):
    """A scenario, the operation whose count shows that it took place, and the delays (`--chaos`) that the
    mutant needs."""

    scenario: str
    precondition: str
    chaos: int = 0


_TABLES: Final = Storm("table-churn", "vm_entries")

STORMS: Final[dict[str, Storm]] = {
    # A fault on an MMIO SPTE walks without a lock, while the pages that it walks over are recycled.
    "reader-not-awaited": Storm("device-faults", "tables_freed"),
    "reader-without-mode": Storm("device-faults", "tables_freed"),
    "shadow-account-without-flush": _TABLES,
    "shadow-direct-page-stays": Storm("huge-aliases", "guest_invalidations"),
    "shadow-direct-shares-rights": Storm("huge-aliases", "guest_invalidations"),
    "shadow-free-without-flush": _TABLES,
    "shadow-guest-flush-keeps-previous": Storm("table-churn", "guest_switches"),
    "shadow-guest-flush-without-sync": _TABLES,
    # Each process has its own tables for the kernel's global pages.
    "shadow-invlpg-current-only": Storm("table-churn", "guest_switches"),
    "shadow-invlpg-without-flush": Storm("late-threads", "guest_invalidations"),
    "shadow-invlpg-without-sync": _TABLES,
    "shadow-invpcid-current-only": _TABLES,
    "shadow-invpcid-retains-roots": _TABLES,
    "shadow-load-without-sync": Storm("table-churn", "guest_switches"),
    "shadow-log-get-without-rmaps": _TABLES,
    "shadow-log-skips-huge": Storm("huge-churn", "guest_invalidations"),
    "shadow-mmio-over-present": Storm("device-slots", "guest_invalidations"),
    "shadow-pae-root-without-flush": Storm("table-churn", "vm_entries"),
    "shadow-pcid-keeps-previous-roots": _TABLES,
    "shadow-pcide-keeps-roots": Storm("role-work", "guest_role_windows"),
    "shadow-pge-flushes-current": _TABLES,
    # A page that the host lets KVM only read must be a neighbour of one that a guest faults on.
    "shadow-prefetch-assumes-writable": Storm("host-protects", "accesses"),
    "shadow-prefetch-while-invalidating": Storm("table-churn", "frames_freed"),
    "shadow-recover-without-flush": Storm("log-toggles", "frames_freed"),
    "shadow-recycle-without-flush": _TABLES,
    "shadow-smm-keeps-paging": Storm("table-churn", "vm_entries"),
    "shadow-store-without-flush": Storm("huge-unmaps", "guest_invalidations"),
    "shadow-switch-without-sync": Storm("table-churn", "guest_switches"),
    "shadow-sync-keeps-rights": _TABLES,
    # Another vCPU must use a page between the flush that protects its table and the sync that drops its SPTE.
    "shadow-sync-without-flush": Storm("late-syncs", "guest_invalidations"),
    "shadow-sync-without-protect-flush": _TABLES,
    "shadow-tracked-becomes-writable": Storm("table-churn", "vm_entries"),
    "shadow-unmap-without-flush": Storm("table-churn", "frames_freed"),
    "shadow-unsync-after-spte": _TABLES,
    # With CR0.WP clear the kernel must write to a page that is mapped read-only.
    "shadow-wp-user-writes": Storm("role-work", "guest_role_windows"),
    "shadow-yield-without-flush": Storm("table-churn", "frames_freed"),
    "shadow-zap-forgets-space": _TABLES,
    "shadow-zap-flushes-writable-only": Storm("table-churn", "frames_freed"),
    "shadow-zap-misses-first": _TABLES,
}

# Mutants that no scenario catches, and why: a litmus test does.
ARGUED: Final[dict[str, str]] = {
    "shadow-sync-makes-writable": (
        "A sync leaves an SPTE alone if its entry grants the same as before. So the guest must change what "
        "its map of all memory grants to a page table that is in use, which kernels do not."
    ),
    "shadow-track-own-space": (
        "Firmware must store to the page tables of the OS, and then meets a hole of Linux 7.3 as well: a run "
        "fails under the unchanged kernel, too."
    ),
}

# Caught in some runs only, too seldom for a test.  Litmus tests always catch them.
RARE: Final[dict[str, Storm]] = {
    # A table with unsync ones below it must be linked, and used before its next sync.
    "shadow-link-before-sync": Storm("table-churn", "guest_switches"),
    # A page must become a table between the loss of W, as logging begins, and the flush.
    "shadow-protect-forgets-mmu-writable": Storm("logged-tables", "guest_invalidations"),
}

# Mutants that no scenario has caught within a minute; a litmus test does.
MISSED: Final[dict[str, str]] = {
    "shadow-zap-flushes-accessed-only": "No scenario without EPT ages pages.",
}
