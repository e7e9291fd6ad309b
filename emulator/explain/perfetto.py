"""A Chrome trace (JSON array format with metadata): ui.perfetto.dev and chrome://tracing load it.

All events of the case are in it, not only the moments of the race: a thread per CPU, a slice for each stay in
guest mode, an instant for each flush, an arrow for each IPI to the exit that it caused.  Format: "Trace Event
Format", https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from emulator.explain.document import Case
from emulator.explain.events import Event
from emulator.explain.meanings import CULPRITS, FILL, USE
from emulator.explain.moments import Moment
from emulator.explain.phrases import phrases

_PCPUS = 1
_THREADS = 2
# Duration of a slice for an instant: long enough to be seen and clicked.
_SHORT_US = 0.2
_COLOURS = dict.fromkeys(CULPRITS, "bad") | {"revoke": "terrible", "use": "terrible"}


def perfetto(case: Case) -> str:
    return json.dumps({"traceEvents": list(_Trace(case).events()), "displayTimeUnit": "ns"}, indent=1) + "\n"


class _Trace:
    def __init__(self, case: Case) -> None:
        self.case = case
        self.all = sorted([*case.events, *_synthetic(case)], key=lambda event: event.time)
        self.moments = {id(m.event): m for m in case.moments}
        self.begin = min((event.time for event in self.all if event.time), default=0)
        self.cpus = sorted({event.cpu for event in self.all})

    def events(self) -> Iterator[dict[str, Any]]:
        yield from self._metadata()
        for cpu in self.cpus:
            yield from self._guest_mode(cpu)
        for event in self.all:
            yield from self._event(event)

    def _ts(self, event: Event) -> float:
        """Return an event's time in microseconds; without times, events are a microsecond apart."""
        since = max(event.time - self.begin, 0)
        return since / 1000 if self.case.timed else float(since)

    def _where(self, cpu: int) -> dict[str, int]:
        pcpu = self.case.label(cpu).startswith("CPU")
        return {"pid": _PCPUS if pcpu else _THREADS, "tid": cpu}

    def _metadata(self) -> Iterator[dict[str, Any]]:
        for pid, name in ((_PCPUS, "pCPUs"), (_THREADS, "KVM and host threads")):
            yield {"ph": "M", "ts": 0, "pid": pid, "tid": 0, "name": "process_name", "args": {"name": name}}
        for cpu in self.cpus:
            named = {"name": self.case.label(cpu)}
            yield {"ph": "M", "ts": 0, **self._where(cpu), "name": "thread_name", "args": named}

    def _guest_mode(self, cpu: int) -> Iterator[dict[str, Any]]:
        """Yield a slice for each stay in guest mode, from VM entry to VM exit.  If the rings have lost the
        exit, the slice ends at the CPU's next VM entry, VMCS load or VMCLEAR."""
        entered: Event | None = None
        for event in (e for e in self.all if e.cpu == cpu):
            if entered is not None and event.kind in ("entry", "exit", "load", "unload"):
                yield self._slice(_guest(entered), entered, self._ts(event) - self._ts(entered))
                entered = None
            if event.kind == "entry":
                entered = event
        if entered is not None:
            last = max(self._ts(event) for event in self.all)
            yield self._slice(_guest(entered), entered, last + 1 - self._ts(entered))

    def _slice(self, name: str, event: Event, duration: float, **more: Any) -> dict[str, Any]:
        return {
            "ph": "X",
            "ts": self._ts(event),
            "dur": max(duration, _SHORT_US),
            **self._where(event.cpu),
            "name": name,
            "cat": event.kind,
            **more,
        }

    def _event(self, event: Event) -> Iterator[dict[str, Any]]:
        moment = self.moments.get(id(event))
        name = ", ".join(phrases(moment or Moment(event.cpu, event), self.case.facts))
        if moment is not None and moment.meaning:
            name = f"[{moment.meaning}] {name}"
        if event.kind in ("flush", "elided") or (moment is not None and moment.meaning):
            mark = {"ts": self._ts(event), **self._where(event.cpu), "cat": event.kind}
            yield {"ph": "i", **mark, "name": name, "s": "t"}
        if event.kind != "entry":
            more: dict[str, Any] = (
                {"args": {"what": event.describe()}} if event.kind not in (FILL, USE) else {}
            )
            if moment is not None and moment.meaning in _COLOURS:
                more["cname"] = _COLOURS[moment.meaning]
            yield self._slice(name, event, _SHORT_US, **more)
        if event.kind == "ipi":
            yield from self._arrows(event)

    def _arrows(self, ipi: Event) -> Iterator[dict[str, Any]]:
        """Yield an arrow from an IPI to the next event of each pCPU that it called."""
        for target in ipi.targets:
            answer = next(
                (e for e in self.all if e.cpu == target and e.time >= ipi.time and e is not ipi), None
            )
            if answer is None:
                continue
            flow = {"id": f"{ipi.time}-{ipi.cpu}-{target}", "name": "IPI", "cat": "ipi"}
            yield {"ph": "s", "ts": self._ts(ipi), **self._where(ipi.cpu), **flow}
            yield {"ph": "f", "bp": "e", "ts": self._ts(answer), **self._where(target), **flow}


def _synthetic(case: Case) -> list[Event]:
    """Return the fill and the use, which are not in the rings."""
    return [moment.event for moment in case.moments if moment.event.kind in (FILL, USE)]


def _guest(entered: Event) -> str:
    nested = f", nested guest {entered.nested}" if entered.nested else ""
    return f"guest mode, vCPU {entered.a}{nested}"
