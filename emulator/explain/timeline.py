"""Events in the order of their times, and the selection of those that matter."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from emulator.explain.events import NO_VM, WHOLE, Event
from emulator.explain.facts import Facts
from emulator.kvm.kvm_host import KVM_REQ_LOAD_MMU_PGD, KVM_REQUEST_MASK
from emulator.machine.runtime import HPAGE_PMD_NR

_WRITE_PROMISES = ("dirty_log", "notifier_write")


Wanted = Callable[[Event], bool]


class Timeline:
    """Finds events between two indices (both exclusive), and keeps some with their meanings ("": context
    only)."""

    def __init__(self, facts: Facts, events: Sequence[Event]) -> None:
        self.facts = facts
        self.events = events
        self.meanings: dict[int, str] = {}

    def _last(self, wanted: Wanted, after: int | None = None, before: int | None = None) -> int | None:
        start = -1 if after is None else after
        end = len(self.events) if before is None else before
        return next((i for i in range(end - 1, start, -1) if wanted(self.events[i])), None)

    def _first(self, wanted: Wanted, after: int | None = None, before: int | None = None) -> int | None:
        start = -1 if after is None else after
        end = len(self.events) if before is None else before
        return next((i for i in range(start + 1, end) if wanted(self.events[i])), None)

    def _keep(self, i: int | None, meaning: str = "") -> int | None:
        if i is not None and (meaning or i not in self.meanings):
            self.meanings[i] = meaning
        return i

    def _mine(self, e: Event) -> bool:
        return e.vm in (self.facts.vm, NO_VM)

    def _is_load(self, vcpu: int, cpu: int | None = None) -> Wanted:
        return lambda e: e.kind == "load" and e.a == vcpu and (cpu is None or e.cpu == cpu)

    def _is_request(self, by: int) -> Wanted:
        """Match a request that CPU `by` makes of the vCPU; one to load a root asks for no flush."""
        vcpu, loads_root = self.facts.vcpu, KVM_REQ_LOAD_MMU_PGD & KVM_REQUEST_MASK
        return lambda e: e.kind == "request" and e.a == vcpu and e.cpu == by and e.b != loads_root

    def _is_elision(self, by: int) -> Wanted:
        return lambda e: e.kind == "elided" and self._mine(e) and e.cpu == by

    def _is_promise(self, e: Event) -> bool:
        return e.kind == "promise" and self._mine(e) and e.covers(self.facts.gfn)

    def _takes_away(self, e: Event) -> bool:
        kinds = ("protect", "zap") if self.facts.promise in _WRITE_PROMISES else ("zap",)
        return e.kind in kinds and self._mine(e) and e.covers(self.facts.gfn)

    def _unlinks(self, e: Event) -> bool:
        """Return whether a table that maps the page's neighbourhood is zapped or replaced by a huge leaf."""
        first, last = e.a >> 9, e.a + max(e.more, 1) - 1 >> 9
        kinds = e.kind == "zap" or (e.kind == "map" and e.more >= HPAGE_PMD_NR)
        return kinds and self._mine(e) and first <= self.facts.gfn >> 9 <= last

    def _is_guest_invalidation(self, e: Event) -> bool:
        mine = e.kind == "guest_invalidate" and e.a == self.facts.vcpu
        return mine and e.b in (self.facts.page, WHOLE)
