"""From events to a plot: the few moments that the race is made of, and the part that each of them plays.

A translation is filled, a right is taken away and promised to be gone, a flush that should have come in
between did not or not in time, and the translation is used.  Whatever else happened is left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from emulator.explain.events import Event
from emulator.explain.facts import LOST_DIRTY, Facts
from emulator.explain.lost import lost_parts, with_store
from emulator.explain.parts import (
    CULPRITS,
    EARLY,
    ELIDED,
    FILL,
    LATE,
    MISSED,
    NARROW,
    OUTDATED,
    PROMISE,
    REVOKE,
    SKIPPED,
    UNNOTIFIED,
    USE,
)
from emulator.explain.processor import processor_moves
from emulator.explain.timeline import Timeline

# The decision behind a flush, by the flush's reason.
_DECISIONS = {
    "remote_zap": "zap",
    "remote_notifier": "notifier_flush",
    "remote_protect": "write_protect",
    "remote_replace": "map_replace",
    "remote_recover": "huge_recovery",
    "migration": "migration",
    "root_load": "root_load",
}


@dataclass(frozen=True, slots=True)
class Moment:
    """Something that a CPU did, and what it means for the race ("": it only belongs to it)."""

    cpu: int
    event: Event
    part: str = ""

    @property
    def time(self) -> int:
        return self.event.time


class Plot(Timeline):
    """The moments of one violation, in order."""

    def __init__(self, facts: Facts, events: Iterable[Event]) -> None:
        ordered = sorted(events, key=lambda event: event.time)
        super().__init__(facts, with_store(facts, ordered) if facts.kind == LOST_DIRTY else ordered)
        # A request that the promise has waited for, and whether it came with a kick of this pCPU.
        self._asked: int | None = None
        self._kicked = False
        self._promised = self._last(self._is_promise) if facts.promised else None
        # A mapping of what the fault had looked up before the promise.
        self._outdated = self._remapped = self._outdated_map()
        self._start = self._fill()
        self._revoked = self._revocation() if self._outdated is None else None
        # From here on the entry should not have been used: the best that is known.
        self._stale = self._revoked if self._revoked is not None else self._promised
        if facts.is_use:
            self._choose()
        else:
            self._choose_without_use()
        self.moments = self._moments()

    def part(self, name: str) -> Moment | None:
        return next((moment for moment in self.moments if moment.part == name), None)

    @property
    def culprit(self) -> Moment | None:
        """The flush that did not do it, if it is known."""
        return next((moment for moment in self.moments if moment.part in CULPRITS), None)

    def decision(self, moment: Moment) -> str:
        """The decision point behind a flush that was elided; "" if it is not known."""
        following = (e for e in self.events if e.cpu == moment.cpu and e.time > moment.time)
        after = next(following, None)
        if after is not None and after.kind == "yield" and not after.b:
            return "zap_yield"
        if moment.event.reason == "migration" and self.facts.kind == "guest-stale":
            return "migration_vpid"
        return _DECISIONS.get(moment.event.reason, "")

    @property
    def revoked_on(self) -> int:
        """The pCPU that the vCPU was on when the right went away, -1 if nobody knows."""
        return self._whereabouts(self._stale) if self._stale is not None else -1

    def flushed_on(self) -> tuple[int, ...]:
        """The pCPUs on which somebody flushed for the VM between the revocation and the use."""
        start = self._stale if self._stale is not None else len(self.events)
        flushed = [e.cpu for e in self.events[start:] if e.kind == "flush" and e.vm == self.facts.vm]
        return tuple(dict.fromkeys(flushed))

    # --- the parts ---------------------------------------------------------------------------------------

    def _fill(self) -> int | None:
        """The VM entry after which the entry was filled."""
        facts = self.facts

        def before_fill(e: Event) -> bool:
            mine = e.kind == "entry" and e.cpu == facts.pcpu and e.a == facts.filled_by
            return mine and facts.age(e.more) < 1 << 31

        if facts.clock < 0:
            return None
        # The clock stands still while the guest faults: the promise came later, whatever it says.
        if self._outdated is not None:
            after = self._last(before_fill, self._outdated)
            if after is not None:
                return after
            # The entry is older: somebody faulted the page in again.
            self._outdated = None
        before_promise = self._last(before_fill, before=self._promised)
        return self._last(before_fill) if before_promise is None else before_promise

    def _outdated_map(self) -> int | None:
        facts = self.facts
        if self._promised is None or facts.about_table:
            return None

        def maps_it(e: Event) -> bool:
            return (
                e.kind == "map"
                and self._mine(e)
                and e.covers(facts.gfn)
                and e.b + facts.gfn - e.a == facts.frame
            )

        return self._last(maps_it, self._promised)

    def _revocation(self) -> int | None:
        facts = self.facts
        if facts.kind == "guest-stale":
            return self._last(self._is_guest_invalidation, self._start)
        if facts.about_root:
            return self._last(lambda e: e.kind == "root_free" and e.a == facts.root, self._start)
        if facts.about_table:
            return self._last(self._unlinks, self._start)
        return self._last(self._takes_away, self._start, self._promised)

    def _choose(self) -> None:
        facts, revoked = self.facts, self._revoked
        self._keep(self._start)
        for i in processor_moves(facts, self.events, self._start, revoked):
            self._keep(i, FILL if self.events[i].kind == "speculate" else "")
        self._keep(revoked, REVOKE)
        self._keep(self._promised, PROMISE)
        if self._outdated is not None:
            self._keep(self._outdated, OUTDATED)
            faulted = self._last(lambda e: e.kind == "exit" and e.a == facts.vcpu, before=self._promised)
            self._keep(faulted)
        if self._stale is not None:
            self._keep(self._last(lambda e: e.kind == "free" and e.a == facts.frame, self._stale))
        self._moves()
        self._requests()
        self._roots()
        if not (self._unnotified() or self._skipped() or self._late()):
            self._elisions()
        self._flushes()
        self._unknown()

    def _moves(self) -> None:
        """Where the vCPU was meanwhile, and that it came back."""
        facts, stale = self.facts, self._stale
        if stale is None:
            self._round_trip()
            return
        # Another vCPU may have filled the entry while this one was elsewhere already.
        since = self._start if facts.filled_by == facts.vcpu else None
        away = self._last(self._is_load(facts.vcpu), since, stale)
        if away is not None and self.events[away].cpu != facts.pcpu:
            self._keep(away)
        back = self._back()
        entered = self._entered(back)
        if back is not None and entered is not None:
            self._keep(back)
            self._keep(entered)

    def _round_trip(self) -> None:
        """It is not known what took the right away, but the vCPU was elsewhere and came back."""
        facts = self.facts
        back = self._last(self._is_load(facts.vcpu, facts.pcpu), self._start)
        if self._start is not None and back is not None:
            self._keep(self._last(self._is_load(facts.vcpu), self._start, back))
            self._keep(back)

    def _back(self) -> int | None:
        """When the vCPU came to the pCPU of the access, if that was after the right had gone."""
        return self._last(self._is_load(self.facts.vcpu, self.facts.pcpu), self._stale)

    def _entered(self, after: int | None) -> int | None:
        """The VM entry before the use."""
        facts = self.facts
        return self._last(lambda e: e.kind == "entry" and e.a == facts.vcpu and e.cpu == facts.pcpu, after)

    def _requests(self) -> None:
        """What the one who took the right away asked of others, before it promised."""
        revoked, promised = self._revoked, self._promised
        if revoked is None and promised is None:
            return
        # If it is not known what was taken away, whoever promised did it.
        by = self.events[revoked if revoked is not None else promised or 0].cpu
        since = revoked if revoked is not None else self._start
        find = self._first if revoked is not None else self._last
        asked = self._keep(find(self._is_request(by), since, promised))
        sent = None if asked is None else self._keep(self._kick(by, asked))
        self._keep(self._first(lambda e: e.kind == "yield" and e.cpu == by and not e.b, since, promised))
        self._kicked = sent is not None and self.facts.pcpu in self.events[sent].targets
        answered = sent is None or not self._unanswered(sent)
        self._asked = asked if answered else None

    def _kick(self, by: int, asked: int) -> int | None:
        """The kick that went to the pCPU of the access, or the first of those that went elsewhere."""
        kicks = [
            i
            for i in range(asked + 1, len(self.events) if self._promised is None else self._promised)
            if self.events[i].kind == "ipi" and self.events[i].cpu == by
        ]
        here = (i for i in kicks if self.facts.pcpu in self.events[i].targets)
        return next(here, kicks[0] if kicks else None)

    def _unanswered(self, sent: int) -> bool:
        """Whether the promise did not wait for a pCPU that was kicked out of the guest.  One that was not in
        the guest answers without a VM exit, and of exits only some are told."""
        pcpu, promised = self.facts.pcpu, self._promised
        kick = self.events[sent]
        if kick.waits or pcpu not in kick.targets or promised is None or not self._is_inside(sent):
            return False
        exits = self._first(lambda e: e.kind == "exit" and e.cpu == pcpu, sent, promised)
        return exits is None and self._keep(sent, LATE) is not None

    def _is_inside(self, before: int) -> bool:
        """Whether the vCPU was in the guest on the pCPU of the access then."""
        facts = self.facts
        last = self._last(lambda e: e.kind in ("entry", "exit") and e.cpu == facts.pcpu, before=before)
        return last is not None and self.events[last].kind == "entry" and self.events[last].a == facts.vcpu

    def _unseen(self, asked: int) -> None:
        """A VM entry after the request, without the flush; or no interrupt for a vCPU in the guest."""
        entered = self._entered(asked)
        if entered is not None:
            if self._first(self._is_flush_here, asked, entered) is None:
                self._keep(entered, MISSED)
            return
        if self._is_inside(asked) and not self._kicked:
            self._keep(asked, MISSED)

    def _roots(self) -> None:
        facts = self.facts
        if facts.about_root:
            self._keep(self._last(lambda e: e.kind == "root_load" and e.b == facts.root, self._stale))
        if facts.root >= 0:
            self._keep(self._last(lambda e: e.kind == "root_invalid" and e.a == facts.root, self._start))

    def _unnotified(self) -> bool:
        """Whether the host has freed the frame of a page that nothing had been promised of."""
        facts = self.facts
        promised = facts.promise != "none" or self._promised is not None
        if promised or "use-after-free" not in facts.kinds:
            return False
        freed = self._last(lambda e: e.kind == "free" and e.a == facts.frame, self._start)
        return self._keep(freed, UNNOTIFIED) is not None

    def _skipped(self) -> bool:
        """Whether the promise was made although an SPTE maps the page still, and none was installed later."""
        if not self.facts.live or self._promised is None or self._remapped is not None:
            return False
        return self._keep(self._promised, SKIPPED) is not None

    def _late(self) -> bool:
        """The flush that was asked for only after the promise."""
        promised = self._promised
        if {LATE, OUTDATED} & set(self.parts.values()):
            return True
        if promised is None or self._revoked is None:
            return False
        asked = self._is_request(self.events[promised].cpu)
        if self._first(asked, self._revoked, promised) is not None:
            return False
        if self._keep(self._first(asked, promised), LATE) is not None:
            return True
        return self._too_early(self._revoked, promised)

    def _too_early(self, revoked: int, promised: int) -> bool:
        """Whether the operation asked for its flush before it took the right away.  What it asks for when it
        yields is for what it has done so far."""
        by = self.events[revoked].cpu
        if by != self.events[promised].cpu:
            return False
        since = self._last(lambda e: e.kind in ("promise", "yield") and e.cpu == by, before=revoked)
        asked = self._last(self._is_request(by), since, revoked)
        if asked is None or self._first(self._is_elision(by), asked, promised) is not None:
            return False
        return self._keep(asked, EARLY) is not None

    def _unknown(self) -> None:
        """What the rings have lost, where the race begins before that."""
        if (
            self._start is None
            and not self.facts.by_kvm
            and not any(e.kind == "speculate" for e in self.events)
        ):
            self._keep(self._last(lambda e: e.kind == "lost" and e.cpu == self.facts.pcpu))
        if self.facts.promised and self.facts.promise != "none" and self._promised is None:
            self._keep(self._last(lambda e: e.kind == "lost"))

    def _elisions(self) -> None:
        """The flush that was left out: where the entry is, since the vCPU is back; or by who revoked."""
        facts, stale = self.facts, self._stale
        back = self._back()
        here = self._last(self._is_elision(facts.pcpu), stale if back is None else back)
        if here is None and self._revoked is not None:
            here = self._first(self._is_elision(self.events[self._revoked].cpu), self._revoked)
        elif here is None and self._promised is not None:
            by = self.events[self._promised].cpu
            here = self._last(self._is_elision(by), self._start, self._promised)
        self._keep(here, ELIDED)
        if here is None and self._asked is not None and back is None:
            self._unseen(self._asked)

    def _is_flush_elsewhere(self, e: Event) -> bool:
        return e.kind == "flush" and e.vm == self.facts.vm and e.cpu != self.facts.pcpu

    def _whereabouts(self, i: int) -> int:
        """The pCPU that the vCPU was loaded on at an event; -1: not known."""
        load = self._last(self._is_load(self.facts.vcpu), before=i)
        return self.events[load].cpu if load is not None else -1

    def _is_flush_here(self, e: Event) -> bool:
        return e.kind == "flush" and e.cpu == self.facts.pcpu

    def _flushes(self) -> None:
        """Flushes that did happen: elsewhere, for the request; and on the pCPU itself, if too narrow."""
        stale = self._stale
        if stale is None:
            return
        flushed = [i for i in range(stale + 1, len(self.events)) if self._is_flush_elsewhere(self.events[i])]
        own = [i for i in flushed if self.events[i].cpu == self._whereabouts(i)]
        if own:
            # Rather the one that was asked for than that of a migration on the way.
            asked = (i for i in own if self.events[i].reason.startswith("remote"))
            self._meanwhile(next(asked, own[0]))
        else:
            # Somebody else's, if it needs no column of its own.
            shown = {self.events[i].cpu for i in self.parts}
            self._keep(next((i for i in flushed if self.events[i].cpu in shown), None))
        # A flush of everything would have dropped the entry.
        if not set(CULPRITS) & set(self.parts.values()):
            here = [i for i in range(stale + 1, len(self.events)) if self._is_flush_here(self.events[i])]
            # What was due is INVEPT; what a vCPU does besides, as when its root changes, counts less.
            here.sort(key=lambda i: (self.events[i].scope.startswith("invept"), i))
            self._keep(here[-1] if here else None, NARROW)

    def _meanwhile(self, flush: int) -> None:
        """The vCPU itself flushed, on another pCPU: that is where it matters that it was."""
        self._keep(flush)
        load = self._keep(self._last(self._is_load(self.facts.vcpu), before=flush))
        for i in [i for i, part in self.parts.items() if not part and self.events[i].kind == "load"]:
            if load is not None and i < load and self.events[i].cpu != self.events[load].cpu:
                del self.parts[i]

    def _choose_without_use(self) -> None:
        """A lost dirty bit, or somebody who waits for ever: what is known of the page, or the last events."""
        if self.facts.kind == LOST_DIRTY:
            self.parts = lost_parts(self.facts, self.events)
        if self.parts:
            return
        self._keep(self._revoked, REVOKE)
        self._keep(self._promised, PROMISE)
        self._keep(self._last(lambda e: e.kind == "elided" and self._mine(e)), ELIDED)
        if not self.parts:
            for cpu in dict.fromkeys(e.cpu for e in self.events):
                for i in [i for i, e in enumerate(self.events) if e.cpu == cpu][-3:]:
                    self._keep(i)

    def _moments(self) -> list[Moment]:
        facts = self.facts
        chosen = [Moment(self.events[i].cpu, self.events[i], part) for i, part in sorted(self.parts.items())]
        if not facts.is_use:
            return chosen
        last = max([facts.time, *(event.time for event in self.events)])
        use = Event(facts.time or last, USE, facts.pcpu, facts.vcpu, facts.gfn, facts.vm)
        if facts.by_kvm:
            return [*chosen, Moment(facts.pcpu, use, USE)]
        if any(moment.part == FILL for moment in chosen):
            return [*chosen, Moment(facts.pcpu, use, USE)]
        first = self.events[self._start].time if self._start is not None else 0
        fill = Event(first, FILL, facts.pcpu, facts.filled_by, facts.gfn, facts.vm)
        at = (
            0 if self._start is None else 1 + next(i for i, m in enumerate(chosen) if m.event.kind == "entry")
        )
        chosen.insert(at, Moment(facts.pcpu, fill, FILL))
        return [*chosen, Moment(facts.pcpu, use, USE)]
