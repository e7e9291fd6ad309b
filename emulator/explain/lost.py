"""The analysis of a lost dirty bit: the guest has written a page, and no dirty log has named it since.

User space copied the page when a log had named it, or when logging began.  From then on the page should have
been write-protected, so that the next write faults and marks it.  It was writable, and a write left no mark.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from emulator.explain.events import Event
from emulator.explain.facts import Facts
from emulator.explain.meanings import COPIED, ELIDED, LOST, MARKED_EARLY, REOPENED, UNNAMED, UNPROTECTED
from emulator.explain.timeline import Timeline
from native import EXIT_REASONS

_FAULTS = (EXIT_REASONS.index("ept_violation"), EXIT_REASONS.index("exception"))
# Events that user space records when an ioctl on a log has returned.
_LOG = ("log_arm", "log_get", "log_clear", "log_end")
_WORD = 64


def copies(e: Event, page: int) -> bool:
    """Return whether user space copies this page at that event."""
    word = e.kind == "copy" and 0 <= page - e.a < _WORD and e.b >> (page - e.a) & 1
    return e.kind == "log_arm" or bool(word)


def with_store(facts: Facts, events: Sequence[Event]) -> list[Event]:
    """Return the events, with the lost write among them.

    The rings hold the writes of guest programs only.  Another guest has stored its clock in the page, which
    tells in which stay in guest mode it wrote; the write is inserted there.
    """
    if facts.vcpu < 0 or any(e.kind == "store" and e.b == facts.gfn for e in events):
        return list(events)
    stays = [e for e in events if e.kind == "entry" and e.a == facts.vcpu and facts.age(e.more) < 1 << 31]
    if not stays:
        return list(events)
    entry = stays[-1]
    copied = [e.time for e in events if copies(e, facts.gfn) and e.time > entry.time]
    at = max([entry.time, *copied[-1:]])
    store = replace(entry, kind="store", b=facts.gfn, time=at, more=facts.clock & 0xFFFFFFFF)
    return sorted([*events, store], key=lambda e: e.time)


def lost_meanings(facts: Facts, events: Sequence[Event]) -> dict[int, str]:
    """Return the indices of the events to show, with their meanings ("": context only)."""
    return _Lost(facts, events).meanings


class _Lost(Timeline):
    def __init__(self, facts: Facts, events: Sequence[Event]) -> None:
        super().__init__(facts, events)
        gfn = facts.gfn
        copied = self._last(lambda e: copies(e, gfn), before=self._last(self._stores))
        written = self._first(self._stores, copied)
        self._keep(copied, COPIED)
        self._keep(written, LOST)
        if written is None:
            self._keep(self._last(lambda e: e.kind in _LOG), UNNAMED)
            return
        self._keep(self._first(lambda e: e.kind in ("log_get", "log_end"), written), UNNAMED)
        if copied is not None:
            self._explain(copied, written)

    def _explain(self, copied: int, written: int) -> None:
        """Keep the events that explain why the page was writable after its last copy."""
        by = self.events[copied].cpu
        ioctl = self._last(lambda e: e.cpu == by and e.kind in _LOG, before=copied + 1)
        if ioctl is None:
            return
        self._keep(ioctl)
        since = self._last(lambda e: e.cpu == by and e.kind in _LOG, before=ioctl)
        protected = self._keep(self._last(self._protects, since, ioctl))
        elided = self._last(self._elides(by), protected if protected is not None else since, ioctl)
        fault = self._last(self._is_write_fault, before=ioctl)
        if elided is not None:
            self._keep(elided, ELIDED)
        elif fault is not None and self._is_under_way(fault, ioctl, written):
            self._keep(fault, MARKED_EARLY)
        elif protected is None:
            self._keep(ioctl, UNPROTECTED)
        elif fault is not None and fault > protected:
            self._keep(protected, REOPENED)
            self._keep(fault)

    def _is_under_way(self, fault: int, ioctl: int, written: int) -> bool:
        """Return whether the vCPU returns from a fault after the log was read and before the write."""
        vcpu = self.events[fault].a
        entered = self._first(lambda e: e.kind == "entry" and e.a == vcpu, fault)
        if entered is None or not ioctl < entered < written:
            return False
        self._keep(entered)
        return True

    def _stores(self, e: Event) -> bool:
        return e.kind == "store" and e.b == self.facts.gfn

    def _elides(self, by: int) -> Callable[[Event], bool]:
        return lambda e: e.kind == "elided" and e.cpu == by and e.reason == "remote_protect"

    def _protects(self, e: Event) -> bool:
        return e.kind == "protect" and e.vm == self.facts.vm and e.covers(self.facts.gfn)

    def _is_write_fault(self, e: Event) -> bool:
        return e.kind == "exit" and e.vm == self.facts.vm and e.b in _FAULTS
