"""From the events of a violation to its race: the few moments that matter, and the meaning of each.

A translation is filled; KVM takes a right away and promises that it is gone; the flush that was due between
the two is missing, late or too narrow; and the stale translation is used.  All other events are left out.
"""

from __future__ import annotations

from collections.abc import Iterable

from emulator.explain.events import Event
from emulator.explain.facts import LOST_DIRTY, Facts
from emulator.explain.lost import lost_meanings, with_store
from emulator.explain.meanings import (
    CULPRITS,
    EARLY,
    ELIDED,
    FILL,
    FORBIDDEN,
    LATE,
    MISSED,
    NARROW,
    OUTDATED,
    PROMISE,
    REFUSED,
    REVOKE,
    SKIPPED,
    UNNOTIFIED,
)
from emulator.explain.moments import Moment, decision_behind, moments_of
from emulator.explain.processor import processor_moves
from emulator.explain.timeline import Timeline


class RaceAnalysis(Timeline):
    """The moments of one violation, in order."""

    def __init__(self, facts: Facts, events: Iterable[Event]) -> None:
        ordered = sorted(events, key=lambda event: event.time)
        super().__init__(facts, with_store(facts, ordered) if facts.kind == LOST_DIRTY else ordered)
        # A request that the promise has waited for, and whether the pCPU of the access was kicked for it.
        self._asked: int | None = None
        self._kicked = False
        self._promised = self._last(self._is_promise) if facts.promised else None
        # A mapping to the frame that the fault had looked up before the promise, or that permits more than
        # the host does.
        self._outdated = self._remapped = self._outdated_map()
        self._start = self._fill()
        self._revoked = self._revocation() if self._outdated is None else None
        # The entry is stale from here on: at the revocation, or at the promise if the revocation is unknown.
        self._stale = self._revoked if self._revoked is not None else self._promised
        if facts.is_use:
            self._choose()
        else:
            self._choose_without_use()
        self.moments = moments_of(facts, self.events, self.meanings, self._start)

    def moment(self, meaning: str) -> Moment | None:
        return next((moment for moment in self.moments if moment.meaning == meaning), None)

    @property
    def culprit(self) -> Moment | None:
        """Return the moment that is to blame, such as an elided or late flush, if it is known."""
        return next((moment for moment in self.moments if moment.meaning in CULPRITS), None)

    def decision(self, moment: Moment) -> str:
        """Return the decision point behind a flush that was elided; "" if it is not known."""
        following = (e for e in self.events if e.cpu == moment.cpu and e.time > moment.time)
        return decision_behind(moment.event, self.facts, next(following, None))

    @property
    def revoked_on(self) -> int:
        """Return the pCPU on which the vCPU was loaded when the entry became stale; -1 if it is not known."""
        return self._whereabouts(self._stale) if self._stale is not None else -1

    def flushed_on(self) -> tuple[int, ...]:
        """Return the pCPUs that flushed for the VM between the revocation and the use."""
        start = self._stale if self._stale is not None else len(self.events)
        flushed = [e.cpu for e in self.events[start:] if e.kind == "flush" and e.vm == self.facts.vm]
        return tuple(dict.fromkeys(flushed))

    # --- meanings ----------------------------------------------------------------------------------------

    def _fill(self) -> int | None:
        """Return the index of the VM entry after which the TLB entry was filled."""
        facts = self.facts

        def before_fill(e: Event) -> bool:
            mine = e.kind == "entry" and e.cpu == facts.pcpu and e.a == facts.filled_by
            return mine and facts.age(e.more) < 1 << 31

        if facts.clock < 0:
            return None
        # The guest's clock stands still while the guest faults, so it cannot tell whether the fill came
        # before the promise or after the outdated mapping.  Prefer the VM entry after the mapping.
        if self._outdated is not None:
            after = self._last(before_fill, self._outdated)
            if after is not None:
                return after
            # The entry is older than this mapping, so the mapping belongs to a later fault.
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
        if facts.about_guest:
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
            self._keep(self._outdated, FORBIDDEN if facts.custody_holds else OUTDATED)
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
        """Keep the vCPU's move to another pCPU while the entry went stale, and its return."""
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
        """Keep the vCPU's move to another pCPU and its return; neither revocation nor promise is known."""
        facts = self.facts
        back = self._last(self._is_load(facts.vcpu, facts.pcpu), self._start)
        if self._start is not None and back is not None:
            self._keep(self._last(self._is_load(facts.vcpu), self._start, back))
            self._keep(back)

    def _back(self) -> int | None:
        """Return the vCPU's load on the pCPU of the access, if it came after the entry had become stale."""
        return self._last(self._is_load(self.facts.vcpu, self.facts.pcpu), self._stale)

    def _entered(self, after: int | None) -> int | None:
        """Return the VM entry before the use."""
        facts = self.facts
        return self._last(lambda e: e.kind == "entry" and e.a == facts.vcpu and e.cpu == facts.pcpu, after)

    def _requests(self) -> None:
        """Keep the request and the kick that the revoking CPU sent to the vCPU before its promise."""
        revoked, promised = self._revoked, self._promised
        if revoked is None and promised is None:
            return
        # Without a known revocation, assume that the promising CPU revoked.
        by = self.events[revoked if revoked is not None else promised or 0].cpu
        since = revoked if revoked is not None else self._start
        find = self._first if revoked is not None else self._last
        asked = self._keep(find(self._is_request(by), since, promised))
        sent = None if asked is None else self._keep(self._kick(by, asked))
        self._keep(self._first(lambda e: e.kind == "yield" and e.cpu == by and not e.b, since, promised))
        self._kicked = sent is not None and self.facts.pcpu in self.events[sent].targets
        if promised is not None and self.events[promised].cpu != by:
            return  # the promising CPU neither made this request nor waits for its kick
        answered = sent is None or not self._unanswered(sent)
        self._asked = asked if answered else None

    def _kick(self, by: int, asked: int) -> int | None:
        """Return the kick to the pCPU of the access, or else the first kick to any other pCPU."""
        kicks = [
            i
            for i in range(asked + 1, len(self.events) if self._promised is None else self._promised)
            if self.events[i].kind == "ipi" and self.events[i].cpu == by
        ]
        here = (i for i in kicks if self.facts.pcpu in self.events[i].targets)
        return next(here, kicks[0] if kicks else None)

    def _unanswered(self, sent: int) -> bool:
        """Return whether the promise was made before a kicked pCPU had left the guest; mark the kick late.

        Only a pCPU in the guest counts: outside of it a pCPU answers without a VM exit, and the rings do not
        hold every exit.
        """
        pcpu, promised = self.facts.pcpu, self._promised
        kick = self.events[sent]
        if kick.waits or pcpu not in kick.targets or promised is None or not self._is_inside(sent):
            return False
        exits = self._first(lambda e: e.kind == "exit" and e.cpu == pcpu, sent, promised)
        return exits is None and self._keep(sent, LATE) is not None

    def _is_inside(self, before: int) -> bool:
        """Return whether the vCPU was in the guest on the pCPU of the access at that event."""
        facts = self.facts
        last = self._last(lambda e: e.kind in ("entry", "exit") and e.cpu == facts.pcpu, before=before)
        return last is not None and self.events[last].kind == "entry" and self.events[last].a == facts.vcpu

    def _unseen(self, asked: int) -> None:
        """Mark a request as missed: the vCPU entered the guest without the flush that was requested, or was
        in the guest and its pCPU got no interrupt."""
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
        """Return whether the host freed the frame without any promise of KVM's about the page; mark the free
        then."""
        facts = self.facts
        promised = facts.promise != "none" or self._promised is not None
        if promised or "use-after-free" not in facts.kinds:
            return False
        freed = self._last(lambda e: e.kind == "free" and e.a == facts.frame, self._start)
        return self._keep(freed, UNNOTIFIED) is not None

    def _skipped(self) -> bool:
        """Return whether an SPTE still mapped the page at the promise, instead of being installed later; mark
        the promise then."""
        if not self.facts.live or self._promised is None or self._remapped is not None:
            return False
        if self._revoked is not None or self._has_lost(self.events[self._promised].cpu, self._start):
            return False  # the zap is recorded, or may be among the lost events: a later fault made the SPTE
        return self._keep(self._promised, SKIPPED) is not None

    def _has_lost(self, cpu: int, after: int | None) -> bool:
        """Return whether a CPU's ring has lost events between one event and the promise."""
        return self._last(lambda e: e.kind == "lost" and e.cpu == cpu, after, self._promised) is not None

    def _late(self) -> bool:
        """Return whether wrong timing explains the race.

        A late kick or an outdated mapping may be marked already.  Otherwise look for a request for the flush
        after the promise, or before the revocation, and mark it.
        """
        promised = self._promised
        if {LATE, OUTDATED, FORBIDDEN} & set(self.meanings.values()):
            return True
        if promised is None or self._revoked is None:
            return False
        asked = self._is_request(self.events[promised].cpu)
        if self._first(asked, self._revoked, promised) is not None:
            return False
        late = self._first(asked, promised)
        if late is not None and not self._took_away(self.events[promised].cpu, promised, late):
            return self._keep(late, LATE) is not None
        return self._too_early(self._revoked, promised)

    def _took_away(self, by: int, after: int | None, before: int) -> bool:
        """Return whether a CPU took any page's translation or a right in between: a request that follows is
        for that page."""
        return self._first(lambda e: e.kind in ("zap", "protect") and e.cpu == by, after, before) is not None

    def _too_early(self, revoked: int, promised: int) -> bool:
        """Return whether the operation requested its flush before it took the right away; mark the request.

        A request before a yield does not count: it is for the rights that the operation has revoked by then.
        """
        by = self.events[revoked].cpu
        if by != self.events[promised].cpu:
            return False
        since = self._last(lambda e: e.kind in ("promise", "yield") and e.cpu == by, before=revoked)
        asked = self._last(self._is_request(by), since, revoked)
        if asked is None or self._first(self._is_elision(by), asked, promised) is not None:
            return False
        if self._took_away(by, since, asked) or (since is None and self._has_lost(by, None)):
            return False
        return self._keep(asked, EARLY) is not None

    def _unknown(self) -> None:
        """Keep the event that the rings have lost older ones, if the race began among those."""
        if (
            self._start is None
            and not self.facts.by_kvm
            and not any(e.kind == "speculate" for e in self.events)
        ):
            self._keep(self._last(lambda e: e.kind == "lost" and e.cpu == self.facts.pcpu))
        if self.facts.promised and self.facts.promise != "none" and self._promised is None:
            self._keep(self._last(lambda e: e.kind == "lost"))

    def _elisions(self) -> None:
        """Mark the flush that was elided: on the pCPU of the access since the vCPU's return, or else by the
        CPU that revoked or promised."""
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
        """Return the pCPU on which the vCPU was loaded at an event; -1 if it is not known."""
        load = self._last(self._is_load(self.facts.vcpu), before=i)
        return self.events[load].cpu if load is not None else -1

    def _is_flush_here(self, e: Event) -> bool:
        return e.kind == "flush" and e.cpu == self.facts.pcpu

    def _is_vmfail_here(self, e: Event) -> bool:
        return e.kind == "vmfail" and e.cpu == self.facts.pcpu

    def _flushes(self) -> None:
        """Keep flushes that were done: on other pCPUs for the request, and a flush on the pCPU of the access
        that was too narrow."""
        stale = self._stale
        if stale is None:
            return
        flushed = [i for i in range(stale + 1, len(self.events)) if self._is_flush_elsewhere(self.events[i])]
        own = [i for i in flushed if self.events[i].cpu == self._whereabouts(i)]
        if own:
            # Prefer the requested flush to the flush of a migration on the way.
            asked = (i for i in own if self.events[i].reason.startswith("remote"))
            self._meanwhile(next(asked, own[0]))
        else:
            # Show another vCPU's flush only if it needs no column of its own.
            shown = {self.events[i].cpu for i in self.meanings}
            self._keep(next((i for i in flushed if self.events[i].cpu in shown), None))
        # An instruction that failed would have dropped the entry.
        self._keep(self._last(self._is_vmfail_here, stale), REFUSED)
        # A flush of everything would have dropped the entry; KVM's own walk uses none.
        if not self.facts.by_kvm and not set(CULPRITS) & set(self.meanings.values()):
            here = [i for i in range(stale + 1, len(self.events)) if self._is_flush_here(self.events[i])]
            # INVEPT was due, so prefer it to other flushes, such as the vCPU's own when its root changes.
            here.sort(key=lambda i: (self.events[i].scope.startswith("invept"), i))
            self._keep(here[-1] if here else None, NARROW)

    def _meanwhile(self, flush: int) -> None:
        """Keep a flush of the vCPU on another pCPU and its load there; drop earlier loads on other pCPUs."""
        self._keep(flush)
        load = self._keep(self._last(self._is_load(self.facts.vcpu), before=flush))
        for i in [i for i, meaning in self.meanings.items() if not meaning and self.events[i].kind == "load"]:
            if load is not None and i < load and self.events[i].cpu != self.events[load].cpu:
                del self.meanings[i]

    def _choose_without_use(self) -> None:
        """Keep the moments of a lost dirty bit or an endless wait: its own analysis (lost.py), or
        revocation, promise and elided flush, or else the last three events of each CPU."""
        if self.facts.kind == LOST_DIRTY:
            self.meanings = lost_meanings(self.facts, self.events)
        if self.meanings:
            return
        self._keep(self._revoked, REVOKE)
        self._keep(self._promised, PROMISE)
        self._keep(self._last(lambda e: e.kind == "elided" and self._mine(e)), ELIDED)
        if not self.meanings:
            for cpu in dict.fromkeys(e.cpu for e in self.events):
                for i in [i for i, e in enumerate(self.events) if e.cpu == cpu][-3:]:
                    self._keep(i)
