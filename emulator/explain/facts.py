"""What a report says about the use of a translation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DEADLOCK = "deadlock"
LOST_DIRTY = "lost-dirty"
_WITHOUT_ENTRY = {LOST_DIRTY, "ipi-stall", "rcu-stall", DEADLOCK}
_ACCESS_VERBS = {"read": "reads", "write": "writes", "execute": "executes"}
# The core's number for no vCPU.
NO_VCPU = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Facts:
    """A report's account of a use (emulator.report.violation); -1: unknown.  live: SPTEs mapping it still."""

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
        )

    @property
    def kind(self) -> str:
        return self.kinds[0] if self.kinds else "violation"

    @property
    def is_use(self) -> bool:
        """Is it about an entry that was used?  Else about something that did not happen."""
        return self.filled_by >= 0 or self.by_kvm

    @property
    def by_kvm(self) -> bool:
        """Is it KVM's own use: a walk of tables that others free, or of a page as its SPTE is zapped?"""
        return self.vcpu == NO_VCPU and not _WITHOUT_ENTRY & set(self.kinds)

    @property
    def marks_page(self) -> bool:
        """KVM marked a page dirty or accessed (decision zapped_pfn)."""
        return self.by_kvm and not self.about_table

    @property
    def about_table(self) -> bool:
        """The cached pointer to a table page was used, not a translation."""
        return self.kind == "walk-after-free"

    @property
    def about_root(self) -> bool:
        """The entry is of an earlier life of the root's page."""
        return "foreign-root" in self.kinds or "cross-vm" in self.kinds

    @property
    def promised(self) -> bool:
        """Was it KVM's promise that was broken?  Not the guest's own, nor RCU's."""
        return not (self.about_table or self.about_root or self.kind == "guest-stale")

    def age(self, clock: int) -> int:
        """Return how much later than an event the access was by the guest's clock, of which events have 32
        bits; 1 << 31 and more: earlier."""
        return (self.clock - clock) & 0xFFFFFFFF

    def verb(self) -> str:
        return _ACCESS_VERBS.get(self.access, self.access)
