"""The omniscient bound: the costs that a policy with perfect knowledge would have had in a run.

`oracle-optimal` knows at each moment which cached translations KVM has revoked *and* which of those the pCPU
would use again.  It is computed from the counts of a run under some policy, and pays for exactly this:

* **Flushes**: the necessary flushes, that is, those that averted at least one use of a stale translation,
  each once, at the narrowest scope that drops the stale entries.  Guest-physical and combined mappings that
  KVM's SPTEs made stale take INVEPT single-context, for the SDM has nothing narrower.  Combined mappings that
  only the guest made stale take INVVPID individual-address.
* **Interruptions**: only of pCPUs that were in guest mode when they had to flush, and only for a necessary
  flush: one IPI sent, one received, one exit and entry.  Other flushes wait for an exit that comes anyway.
* **Refills**: only of the stale entries themselves, one walk for each averted use.  No valid entry is ever
  dropped: no collateral, no other refill.

It is not a lower bound over all policies, because the necessary flushes depend on the entries that a policy
lets live: a policy that flushes more often than it must leaves fewer entries to become stale.  So each run
has its own bound, and `cycles of flushing / cycles of the bound` is the distance of its policy from
perfection.
"""

from __future__ import annotations

from dataclasses import dataclass

from emulator.report.result import Snapshot
from emulator.scenario.costs import Costs, CycleLine, charge

NAME = "oracle-optimal"


@dataclass(frozen=True, slots=True)
class Bound:
    """The operations of `oracle-optimal` and their costs."""

    invept_single: int
    invvpid_address: int
    interruptions: int
    refills: int
    lines: tuple[CycleLine, ...]

    @property
    def flushes(self) -> int:
        return self.invept_single + self.invvpid_address

    @property
    def cycles(self) -> float:
        return sum(line.cycles for line in self.lines)


def oracle_optimal(snapshot: Snapshot, costs: Costs) -> Bound:
    """Return the bound of a finished run."""
    counters = snapshot.counters
    by_vpid = sum(flush.necessary for flush in snapshot.flushes if flush.scope.startswith("invvpid"))
    by_ept = snapshot.necessary - by_vpid
    # One interruption may have led to two necessary flushes and be counted for each, so cap the count.
    interruptions = min(counters["necessary_interruptions"], counters["interruptions"])
    refills = counters["averted"]
    references = counters["walk_references"] * refills // max(counters["l2_misses"], 1)
    entries = (
        ("invept_single", by_ept, "invept_single"),
        ("invvpid_address", by_vpid, "invvpid_address"),
        ("IPIs sent", interruptions, "ipi_send"),
        ("IPIs received", interruptions, "ipi_receive"),
        ("guests interrupted", interruptions, "vm_exit_entry"),
        ("refill walk references", references, "walk_reference"),
    )
    lines = tuple(charge(costs, item, "flush", events, entry) for item, events, entry in entries)
    return Bound(by_ept, by_vpid, interruptions, refills, lines)
