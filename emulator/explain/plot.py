"""From events to a plot: the few moments that the race is made of, and the part that each of them plays.

A translation is filled, a right is taken away and promised to be gone, a flush that should have come in
between did not or not in time, and the translation is used.  Whatever else happened is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from emulator.explain.events import NO_VM, Event, name_of
from native import EXIT_REASONS

# The parts of a plot, in the order in which they are explained.
FILL = "fill"
REVOKE = "revoke"
ELIDED = "elided"
LATE = "late"
NARROW = "narrow"
MISSED = "missed"
PROMISE = "promise"
USE = "use"
CULPRITS = (ELIDED, LATE, NARROW, MISSED)

_WRITE_PROMISES = ("dirty_log", "notifier_write")
_WITHOUT_ENTRY = {"lost-dirty", "ipi-stall", "rcu-stall", "deadlock"}
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
# KVM promised nothing: the guest did, or nobody.
_NO_PROMISE = {"guest-stale", "foreign-root"}
_ACCESS_VERBS = {"read": "reads", "write": "writes", "execute": "executes"}


@dataclass(frozen=True, slots=True)
class Facts:
    """What a report says about the use (emulator.story); -1: unknown."""

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
    promise_cpu: int = -1
    promise_time: int = 0
    filled_by: int = -1
    clock: int = -1
    page: int = -1
    root: int = -1

    @classmethod
    def of_report(cls, report: Mapping[str, Any]) -> Facts:
        entry = report.get("entry") or {}
        if str(report.get("kind", "")) in _WITHOUT_ENTRY or _WITHOUT_ENTRY & set(report.get("kinds", ())):
            entry = {}
        return cls(
            kinds=tuple(report.get("kinds") or (report.get("kind", "violation"),)),
            pcpu=report.get("pcpu", -1),
            vm=report.get("vm", -1),
            vcpu=report.get("vcpu", -1),
            access=report.get("access", "read"),
            gfn=report.get("gfn", -1),
            frame=report.get("frame", -1),
            walk_level=report.get("walk_level", 0),
            time=report.get("time_ns", 0),
            promise=str(report.get("promise", "none")).replace("-", "_"),
            promise_cpu=report.get("promise_cpu", -1),
            promise_time=report.get("promise_time_ns", 0),
            filled_by=entry.get("filled_by_vcpu", -1),
            clock=entry.get("clock", -1),
            page=entry.get("page", -1),
            root=entry.get("ep4ta", -1),
        )

    @property
    def kind(self) -> str:
        return self.kinds[0] if self.kinds else "violation"

    @property
    def is_use(self) -> bool:
        """Is it about an entry that was used?  Else about something that did not happen."""
        return self.filled_by >= 0

    def verb(self) -> str:
        return _ACCESS_VERBS.get(self.access, self.access)


@dataclass(frozen=True, slots=True)
class Moment:
    """Something that a CPU did, and what it means for the race ("": it only belongs to it)."""

    cpu: int
    event: Event
    part: str = ""

    @property
    def time(self) -> int:
        return self.event.time


class Plot:
    """The moments of one violation, in order."""

    def __init__(self, facts: Facts, events: Iterable[Event]) -> None:
        self.facts = facts
        self.events: Sequence[Event] = sorted(events, key=lambda event: event.time)
        self._parts: dict[int, str] = {}
        # A request that needed no interrupt.
        self._asked: int | None = None
        self._promised = self._last(self._is_promise) if facts.kind not in _NO_PROMISE else None
        self._start = self._fill()
        self._revoked = self._revocation()
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

    # --- looking for events ------------------------------------------------------------------------------

    def _last(
        self, wanted: Callable[[Event], bool], after: int | None = None, before: int | None = None
    ) -> int | None:
        start = -1 if after is None else after
        end = len(self.events) if before is None else before
        return next((i for i in range(end - 1, start, -1) if wanted(self.events[i])), None)

    def _first(
        self, wanted: Callable[[Event], bool], after: int | None = None, before: int | None = None
    ) -> int | None:
        start = -1 if after is None else after
        end = len(self.events) if before is None else before
        return next((i for i in range(start + 1, end) if wanted(self.events[i])), None)

    def _keep(self, i: int | None, part: str = "") -> int | None:
        if i is not None and (part or i not in self._parts):
            self._parts[i] = part
        return i

    def _mine(self, e: Event) -> bool:
        return e.vm in (self.facts.vm, NO_VM)

    def _is_load(self, vcpu: int, cpu: int | None = None) -> Callable[[Event], bool]:
        return lambda e: e.kind == "load" and e.a == vcpu and (cpu is None or e.cpu == cpu)

    def _is_request(self, by: int) -> Callable[[Event], bool]:
        return lambda e: e.kind == "request" and e.a == self.facts.vcpu and e.cpu == by

    def _is_elision(self, by: int) -> Callable[[Event], bool]:
        return lambda e: e.kind == "elided" and self._mine(e) and e.cpu == by

    def _is_promise(self, e: Event) -> bool:
        return e.kind == "promise" and self._mine(e) and e.covers(self.facts.gfn)

    def _takes_away(self, e: Event) -> bool:
        kinds = ("protect", "zap") if self.facts.promise in _WRITE_PROMISES else ("zap",)
        return e.kind in kinds and self._mine(e) and e.covers(self.facts.gfn)

    # --- the parts ---------------------------------------------------------------------------------------

    def _fill(self) -> int | None:
        """The VM entry after which the entry was filled."""
        facts = self.facts

        def before_fill(e: Event) -> bool:
            # The core keeps 32 bits of the guest's clock.
            age = (facts.clock - e.more) & 0xFFFFFFFF
            return e.kind == "entry" and e.cpu == facts.pcpu and e.a == facts.filled_by and age < 1 << 31

        if facts.clock < 0:
            return None
        # The clock stands still while the guest faults: the promise came later, whatever it says.
        before_promise = self._last(before_fill, before=self._promised)
        return self._last(before_fill) if before_promise is None else before_promise

    def _revocation(self) -> int | None:
        facts = self.facts
        if facts.kind == "guest-stale":
            return self._last(lambda e: e.kind == "guest_invalidate" and e.a == facts.vcpu, self._start)
        if facts.kind == "foreign-root":
            return self._last(lambda e: e.kind == "root_free" and e.a == facts.root, self._start)
        return self._last(self._takes_away, self._start, self._promised)

    def _choose(self) -> None:
        facts, revoked = self.facts, self._revoked
        self._keep(self._start)
        self._keep(revoked, REVOKE)
        self._keep(self._promised, PROMISE)
        if self._stale is not None:
            self._keep(self._last(lambda e: e.kind == "free" and e.a == facts.frame, self._stale))
        self._moves()
        self._requests()
        self._roots()
        if not self._late():
            self._elisions()
        self._flushes()

    def _moves(self) -> None:
        """Where the vCPU was meanwhile, and that it came back."""
        facts, stale = self.facts, self._stale
        if stale is None:
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
        if revoked is None:
            return
        by = self.events[revoked].cpu
        asked = self._keep(self._first(self._is_request(by), revoked, promised))
        sent = self._keep(self._first(lambda e: e.kind == "ipi" and e.cpu == by, revoked, promised))
        self._keep(self._first(lambda e: e.kind == "yield" and e.cpu == by and not e.b, revoked, promised))
        if sent is not None:
            self._unanswered(sent)
        self._asked = asked if sent is None else None

    def _unanswered(self, sent: int) -> None:
        """A kick that the promise did not wait for."""
        facts = self.facts
        exits = self._first(lambda e: e.kind == "exit" and e.cpu == facts.pcpu, sent, self._promised)
        if facts.pcpu in self.events[sent].targets and self._promised is not None and exits is None:
            self._keep(sent, LATE)

    def _unseen(self, asked: int) -> None:
        """A VM entry after the request, without the flush."""
        entered = self._entered(asked)
        if entered is not None and self._first(self._is_flush_here, asked, entered) is None:
            self._keep(entered, MISSED)

    def _roots(self) -> None:
        facts = self.facts
        if facts.kind == "foreign-root":
            self._keep(self._last(lambda e: e.kind == "root_load" and e.b == facts.root, self._stale))

    def _late(self) -> bool:
        """The flush that was asked for only after the promise."""
        promised = self._promised
        if LATE in self._parts.values():
            return True
        if promised is None or self._revoked is None:
            return False
        asked = self._is_request(self.events[promised].cpu)
        if self._first(asked, self._revoked, promised) is not None:
            return False
        return self._keep(self._first(asked, promised), LATE) is not None

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
            shown = {self.events[i].cpu for i in self._parts}
            self._keep(next((i for i in flushed if self.events[i].cpu in shown), None))
        # A flush of everything would have dropped the entry.
        if not {ELIDED, LATE, MISSED} & set(self._parts.values()):
            self._keep(self._last(self._is_flush_here, stale), NARROW)

    def _meanwhile(self, flush: int) -> None:
        """The vCPU itself flushed, on another pCPU: that is where it matters that it was."""
        self._keep(flush)
        load = self._keep(self._last(self._is_load(self.facts.vcpu), before=flush))
        for i in [i for i, part in self._parts.items() if not part and self.events[i].kind == "load"]:
            if load is not None and i < load and self.events[i].cpu != self.events[load].cpu:
                del self._parts[i]

    def _choose_without_use(self) -> None:
        """A lost dirty bit, or somebody who waits for ever: what is known of the page, or the last events."""
        self._keep(self._revoked, REVOKE)
        self._keep(self._promised, PROMISE)
        self._keep(self._last(lambda e: e.kind == "elided" and self._mine(e)), ELIDED)
        if not self._parts:
            for cpu in dict.fromkeys(e.cpu for e in self.events):
                for i in [i for i, e in enumerate(self.events) if e.cpu == cpu][-3:]:
                    self._keep(i)

    def _moments(self) -> list[Moment]:
        facts = self.facts
        chosen = [Moment(self.events[i].cpu, self.events[i], part) for i, part in sorted(self._parts.items())]
        if not facts.is_use:
            return chosen
        first = self.events[self._start].time if self._start is not None else 0
        fill = Event(first, FILL, facts.pcpu, facts.filled_by, facts.gfn, facts.vm)
        at = (
            0 if self._start is None else 1 + next(i for i, m in enumerate(chosen) if m.event.kind == "entry")
        )
        chosen.insert(at, Moment(facts.pcpu, fill, FILL))
        last = max([facts.time, *(event.time for event in self.events)])
        use = Event(facts.time or last, USE, facts.pcpu, facts.vcpu, facts.gfn, facts.vm)
        return [*chosen, Moment(facts.pcpu, use, USE)]


def phrases(moment: Moment, facts: Facts) -> list[str]:
    """A moment in the kernel's words: one line or two, the second one a detail."""
    e = moment.event
    words = _PHRASES.get(e.kind)
    return words(e, facts) if words else [e.describe()]


_SCOPES = {
    "invept_global": "INVEPT global",
    "invept_single": "INVEPT single",
    "invvpid_single": "INVVPID single",
    "invvpid_all": "INVVPID all",
    "invvpid_address": "INVVPID address",
}

_PROMISERS = {
    "notifier": "invalidate_range_start()",
    "notifier_write": "invalidate_range_start()",
    "memslot": "kvm_set_memslot()",
    "zap_range": "kvm_zap_gfn_range()",
    "dirty_log": "kvm_get_dirty_log()",
}


def _flush(e: Event, facts: Facts) -> list[str]:
    target = {"invept_single": " root {:#x}", "invvpid_single": " VPID {}", "invvpid_address": " page {:#x}"}
    return [_SCOPES.get(e.scope, e.scope) + target.get(e.scope, "").format(e.b)]


def _ipi(e: Event, facts: Facts) -> list[str]:
    to = f"CPU{e.targets[0]}" if e.b == 1 and e.targets else f"{e.b} CPUs"
    what = {"ack_kick": "kick", "vmcs_clear": "VMCLEAR"}.get(e.function, e.function.replace("_", " "))
    return [f"{what}: IPI to {to}"]


def _use(e: Event, facts: Facts) -> list[str]:
    what = (
        f"walk reads level {facts.walk_level}" if facts.walk_level else f"{facts.verb()} gfn {facts.gfn:#x}"
    )
    return [f"v{facts.vcpu} {what}", "by the stale entry"]


_PHRASES: dict[str, Callable[[Event, Facts], list[str]]] = {
    FILL: lambda e, f: [f"v{e.a} uses gfn {f.gfn:#x}", "TLB entry is filled"],
    USE: _use,
    "entry": lambda e, f: [f"vcpu_enter_guest(v{e.a})"],
    "exit": lambda e, f: [f"VM exit ({name_of(EXIT_REASONS, e.b).replace('_', ' ')})"],
    "load": lambda e, f: [f"vmx_vcpu_load_vmcs(v{e.a})"],
    "flush": _flush,
    "elided": lambda e, f: [f"flush for {e.reason}", "ELIDED"],
    "zap": lambda e, f: [f"zap gfn {f.gfn if e.covers(f.gfn) else e.a:#x}"],
    "protect": lambda e, f: [f"write-protect gfn {f.gfn if e.covers(f.gfn) else e.a:#x}"],
    "map": lambda e, f: [f"map gfn {e.a:#x} to {e.b:#x}"],
    "request": lambda e, f: [f"{e.request} to v{e.a}"],
    "ipi": _ipi,
    "promise": lambda e, f: [_PROMISERS.get(e.promise, e.promise), "returns"],
    "free": lambda e, f: [f"frame {e.a:#x} is freed"],
    "root_load": lambda e, f: [f"kvm_mmu_load(v{e.a})", f"root {e.b:#x}"],
    "root_free": lambda e, f: [f"root {e.a:#x} is freed"],
    "guest_invalidate": lambda e, f: [f"v{e.a}: INVLPG page {e.b:#x}"],
    "unload": lambda e, f: [f"VMCLEAR v{e.a}"],
    "yield": lambda e, f: ["yields mmu_lock", "flushed" if e.b else "not flushed"],
}
