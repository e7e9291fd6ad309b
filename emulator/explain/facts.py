"""The facts of a violation report about the use of a translation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

DEADLOCK = "deadlock"
LEAK = "leak"
INCONSISTENT = "inconsistent"
LOST_DIRTY = "lost-dirty"
_WITHOUT_ENTRY = {LOST_DIRTY, "ipi-stall", "rcu-stall", DEADLOCK, LEAK, INCONSISTENT}
_ACCESS_VERBS = {"read": "reads", "write": "writes", "execute": "executes"}
# The core's number for "no vCPU".
NO_VCPU = 0xFFFFFFFF
# Kinds of violation in which the translation was wrong from its fill on, without a promise about it.
NO_PROMISE: Final = frozenset({"cross-guest", "apic-stale"})


@dataclass(frozen=True, slots=True)
class Facts:
    """A report's account of a use (emulator.report.violation); -1 is unknown.

    `live` counts the SPTEs that still mapped the page at the use.  linear: the entry was derived from the
    shadow MMU's tables.  custody_holds: the host has not taken the frame since the fault looked it up.
    """

    kinds: tuple[str, ...] = ()
    pcpu: int = -1
    vm: int = -1
    vcpu: int = -1
    access: str = "read"
    gfn: int = -1
    frame: int = -1
    walk_level: int = 0
    time: int = 0
    promise: str = "none"
    filled_by: int = -1
    clock: int = -1
    page: int = -1
    root: int = -1
    live: int = 0
    linear: bool = False
    custody_holds: bool = False

    @classmethod
    def of_report(cls, report: Mapping[str, Any]) -> Facts:
        entry = report.get("entry") or {}
        kinds = tuple(report.get("kinds") or (report.get("kind", "violation"),))
        if _WITHOUT_ENTRY & set(kinds) or report.get("vcpu", 0) == NO_VCPU:
            entry = {}
        return cls(
            kinds=kinds,
            pcpu=report.get("pcpu", -1),
            vm=report.get("vm", -1),
            vcpu=report.get("vcpu", -1),
            access=report.get("access", "read"),
            gfn=report.get("gfn", -1),
            frame=report.get("frame", -1),
            walk_level=report.get("walk_level", 0),
            time=report.get("time_ns", 0),
            promise=str(report.get("promise", "none")).replace("-", "_"),
            filled_by=entry.get("filled_by_vcpu", -1),
            clock=report.get("guest_clock", -1) if LOST_DIRTY in kinds else entry.get("clock", -1),
            page=entry.get("page", -1),
            root=entry.get("ep4ta", -1),
            live=report.get("live_sptes", 0),
            linear=entry.get("kind") == "linear",
            custody_holds=entry.get("custody_holds", False),
        )

    @property
    def kind(self) -> str:
        return self.kinds[0] if self.kinds else "violation"

    @property
    def is_use(self) -> bool:
        """Return whether the report is about a use.  Other reports are about an action that is missing: a
        mark in a dirty log, or the end of a wait."""
        return self.filled_by >= 0 or self.by_kvm

    @property
    def by_kvm(self) -> bool:
        """Return whether KVM itself is the user: it walked a freed table, or marked a freed page while
        zapping the page's SPTE."""
        return self.vcpu == NO_VCPU and not _WITHOUT_ENTRY & set(self.kinds)

    @property
    def marks_page(self) -> bool:
        """Return whether KVM marked a page dirty or accessed (decision zapped_pfn)."""
        return self.by_kvm and not self.about_table

    @property
    def about_table(self) -> bool:
        """Return whether a cached pointer to a table page was used, instead of a translation."""
        return self.kind == "walk-after-free"

    @property
    def about_root(self) -> bool:
        """Return whether the entry belongs to an earlier life of the root's page."""
        return "foreign-root" in self.kinds or "cross-vm" in self.kinds

    @property
    def promised(self) -> bool:
        """Return whether the use broke a promise of KVM, instead of the guest's own invalidation or RCU's
        grace period."""
        return not (self.about_table or self.about_root or self.about_guest or self.kind in NO_PROMISE)

    @property
    def about_guest(self) -> bool:
        """Return whether the guest had invalidated the entry, L1 or L2 itself or L1 for L2."""
        return self.kind in ("guest-stale", "l1-stale")

    def age(self, clock: int) -> int:
        """Return how far the guest's clock had advanced from an event to the access, modulo 2^32, since
        events keep 32 bits of it.  1 << 31 and more mean that the access came first."""
        return (self.clock - clock) & 0xFFFFFFFF

    def verb(self) -> str:
        return _ACCESS_VERBS.get(self.access, self.access)
