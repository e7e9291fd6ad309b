"""Which scenario catches which mutant of the shadow MMU on real threads, and with which delays.

With a minute for each, one run in two or more of STORMS catches the mutant on a machine of two busy cores;
most do in seconds.
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
    "shadow-account-without-flush": _TABLES,
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
    "shadow-pge-flushes-current": _TABLES,
    "shadow-prefetch-while-invalidating": Storm("table-churn", "frames_freed"),
    "shadow-recover-without-flush": Storm("log-toggles", "frames_freed"),
    "shadow-recycle-without-flush": _TABLES,
    "shadow-smm-keeps-paging": Storm("table-churn", "vm_entries"),
    "shadow-switch-without-sync": Storm("table-churn", "guest_switches"),
    "shadow-sync-keeps-rights": _TABLES,
    "shadow-sync-without-protect-flush": _TABLES,
    "shadow-tracked-becomes-writable": Storm("table-churn", "vm_entries"),
    "shadow-unmap-without-flush": Storm("table-churn", "frames_freed"),
    "shadow-unsync-after-spte": _TABLES,
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

# Caught in some runs only, or after tens of seconds: too seldom for a test, which would fail now and then.
RARE: Final[dict[str, Storm]] = {
    # A fault on an MMIO SPTE walks without a lock, while the pages of the deleted slot's roots are freed.
    "reader-not-awaited": Storm("device-slots", "guest_invalidations", chaos=30),
    "reader-without-mode": Storm("device-slots", "guest_invalidations", chaos=30),
    "shadow-link-before-sync": Storm("table-churn", "guest_switches"),
    # A page that the host lets KVM only read must be a neighbour of one that a guest faults on.
    "shadow-prefetch-assumes-writable": Storm("shadow", "frames_freed", chaos=100),
    # A page must become a table between the loss of W, as logging begins, and the flush.
    "shadow-protect-forgets-mmu-writable": Storm("logged-tables", "guest_invalidations", chaos=30),
    "shadow-store-without-flush": Storm("huge-unmaps", "guest_invalidations"),
    # Another vCPU must use a page between the flush that protects its table and the sync that drops its SPTE:
    # some microseconds, without delays.
    "shadow-sync-without-flush": Storm("late-threads", "guest_invalidations", chaos=30),
}

# Mutants that no scenario has caught within a minute; a litmus test does.
MISSED: Final[dict[str, str]] = {
    "shadow-direct-page-stays": "No guest maps a huge page twice, with different rights.",
    "shadow-pcide-keeps-roots": "Guests set CR4.PCIDE once, as they boot.",
    "shadow-zap-flushes-accessed-only": "No scenario without EPT ages pages.",
    "shadow-wp-user-writes": "No guest's kernel writes to the pages of its processes.",
    "shadow-direct-shares-rights": "No guest maps a huge page twice, with different rights.",
}
