"""Races made of events, for tests of their analysis: pCPUs 0 to 3, kvm0 is CPU 4, host0 is CPU 5."""

from __future__ import annotations

import itertools
from typing import Any

from emulator.explain.analysis import RaceAnalysis
from emulator.explain.events import EVENT_KINDS, PROMISES, Event
from emulator.explain.facts import Facts
from native import EXIT_REASONS, FLUSH_REASONS, FLUSH_SCOPES

NAMES = {"0": "pcpu0", "1": "pcpu1", "2": "pcpu2", "3": "pcpu3", "4": "kvm0", "5": "host0"}
KVM, HOST = 4, 5
GFN, FRAME, ROOT, VCPU, VM = 0x105, 0xB34, 0x2, 1, 0
PAGE = 0x5E39


class Race:
    """Writes events down one after the other, a microsecond apart."""

    def __init__(self) -> None:
        self._time = itertools.count(1_000_000, 1000)
        self.events: list[Event] = []

    def add(self, kind: str, cpu: int, a: int, b: int = 0, more: int = 0, vm: int = VM) -> Race:
        assert kind in EVENT_KINDS
        self.events.append(Event(next(self._time), kind, cpu, a, b, vm, more))
        return self

    def enter(self, cpu: int, clock: int, vcpu: int = VCPU, nested: int = 0) -> Race:
        return self.add("entry", cpu, vcpu, ROOT | nested << 32, clock)

    def leave(self, cpu: int, clock: int, reason: str = "interrupt", vcpu: int = VCPU) -> Race:
        return self.add("exit", cpu, vcpu, EXIT_REASONS.index(reason), clock)

    def load(self, cpu: int, before: int, vcpu: int = VCPU) -> Race:
        return self.add("load", cpu, vcpu, before)

    def zap(self, cpu: int, gfn: int = GFN, pages: int = 1) -> Race:
        return self.add("zap", cpu, gfn, pages, pages)

    def map(self, cpu: int) -> Race:
        return self.add("map", cpu, GFN - 2, FRAME - 2, 4)

    def promise(self, cpu: int, name: str = "notifier") -> Race:
        return self.add("promise", cpu, PROMISES.index(name), GFN - 3, 8)

    def request(self, cpu: int, vcpu: int = VCPU) -> Race:
        return self.add("request", cpu, vcpu, 0)

    def kick(self, cpu: int, *targets: int) -> Race:
        return self.add("ipi", cpu, sum(1 << target for target in targets), len(targets))

    def flush(self, cpu: int, scope: str = "invept_global", reason: str = "remote_notifier") -> Race:
        kind = FLUSH_SCOPES.index(scope) << 32 | FLUSH_REASONS.index(reason)
        return self.add("flush", cpu, kind, ROOT)

    def elided(self, cpu: int, reason: str = "migration") -> Race:
        return self.add("elided", cpu, FLUSH_REASONS.index(reason), VCPU)

    def free(self, cpu: int) -> Race:
        return self.add("free", cpu, FRAME, 1)

    def report(
        self, pcpu: int = 0, kinds: tuple[str, ...] = ("use-after-free",), **more: Any
    ) -> dict[str, Any]:
        """Return a report of this race; the entry was filled at clock 150."""
        entry = {
            "kind": "combined",
            "size": "4K",
            "page": PAGE,
            "frame": FRAME,
            "ep4ta": ROOT,
            "vpid": 2,
            "pcid": 1,
            "filled_by_vm": VM,
            "filled_by_vcpu": VCPU,
            "clock": 150,
            "custody": 7,
        }
        whole = {
            "kind": kinds[0],
            "kinds": list(kinds),
            "text": "",
            "pcpu": pcpu,
            "vm": VM,
            "vcpu": VCPU,
            "access": "read",
            "linear": PAGE << 12,
            "gfn": GFN,
            "frame": FRAME,
            "walk_level": 0,
            "time_ns": next(self._time),
            "promise": "notifier",
            "promise_cpu": HOST,
            "promise_time_ns": 1_000_000,
            "guest_clock": 900,
            "entry": entry,
            "unsafe_answers": [],
            "actors": NAMES,
            "events": [event.as_dict(timed=True) for event in self.events],
        }
        return whole | more

    def document(self, policy: str = "linux-7.3", **report: Any) -> dict[str, Any]:
        """As `flushlab run --json` prints it."""
        return {
            "flushlab": 1,
            "scenario": "main",
            "policy": {"name": policy, "decisions": {}},
            "reports": [self.report(**report)],
        }


def analysis(race: Race, **report: Any) -> RaceAnalysis:
    return RaceAnalysis(Facts.of_report(race.report(**report)), race.events)


def flushed_mask() -> Race:
    """The hole of the cpu_flushed_mask: zapped while the vCPU is away, it flushes there, and comes back."""
    race = Race().load(0, 1 << 32).flush(0, "invept_single", "migration").enter(0, 100).leave(0, 200)
    race.load(1, 0).flush(1, "invept_single", "migration").enter(1, 200)
    race.zap(HOST).request(HOST).kick(HOST, 1).leave(1, 300).promise(HOST)
    race.flush(1).enter(1, 300).free(HOST).leave(1, 400, "message")
    return race.load(0, 1).elided(0).enter(0, 400)


def noisy(race: Race) -> Race:
    """Return the race among events that have nothing to do with it."""
    noise = Race()
    for event in race.events:
        noise.events.append(event)
        at = event.time + 100
        noise.events += [
            Event(at, "zap", 4, GFN + 0x200, 4, VM, 4),
            Event(at + 1, "request", 4, 3, 0, VM),
            Event(at + 2, "flush", 3, 0, 0, VM + 1),
            Event(at + 3, "load", 3, 2, 2, VM),
            Event(at + 4, "elided", 3, FLUSH_REASONS.index("migration"), 2, VM + 1),
            Event(at + 5, "map", 2, GFN + 9, 3, VM, 2),
            Event(at + 6, "promise", 4, PROMISES.index("zap_range"), GFN + 0x200, VM, 8),
        ]
    noise._time = race._time
    return noise
