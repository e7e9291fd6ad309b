"""What a violation report says to people: who used what, who filled it, who promised that it was gone, and
what the policy did not do in between.

The core keeps the reports, the first ones together with the events that led to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from emulator.result import Report
from native import EXIT_REASONS, FLUSH_REASONS, FLUSH_SCOPES, VIOLATION_KINDS, enum_names, ffi, lib

EVENTS_SHOWN = 24
_EVENTS_KEPT = 512

_EVENT_KINDS = enum_names("event_kind", "EVENT_", count="EVENTS")
_PROMISES = enum_names("promise", "PROMISE_", count="PROMISES")
_ACCESSES = ("read", "write", "execute")
_SIZES = ("4K", "2M", "1G")
_MAPPINGS = ("linear", "guest-physical", "combined")

_PROMISED_BY = {
    "none": "nothing",
    "notifier": "an mmu_notifier's invalidate_range_start returned",
    "notifier_write": "an mmu_notifier's invalidate_range_start returned (write access only)",
    "memslot": "the memslot was deleted",
    "zap_range": "kvm_zap_gfn_range returned",
    "dirty_log": "the dirty log's ioctl returned (write access only)",
    "free": "the page was freed",
    "guest": "the guest itself invalidated it on this vCPU",
}


@dataclass(frozen=True, slots=True)
class Event:
    time: int
    kind: str
    cpu: int
    a: int
    b: int

    def describe(self) -> str:
        text = _EVENT_TEXTS.get(self.kind)
        return text(self) if text else f"{self.kind} {self.a:#x} {self.b:#x}"


def _name(names: tuple[str, ...], index: int) -> str:
    return names[index] if index < len(names) else str(index)


_EVENT_TEXTS: dict[str, Callable[[Event], str]] = {
    "entry": lambda e: f"VM entry of vCPU {e.a}, root {e.b:#x}",
    "exit": lambda e: f"VM exit of vCPU {e.a}: {_name(EXIT_REASONS, e.b)}",
    "load": lambda e: f"VMCS of vCPU {e.a} loaded" + ("" if e.b >= 1 << 31 else f", was on pCPU {e.b}"),
    "flush": lambda e: f"{_name(FLUSH_SCOPES, e.a >> 32)} for {_name(FLUSH_REASONS, e.a & 0xFFFF)}",
    "elided": lambda e: f"flush for {_name(FLUSH_REASONS, e.a)} ELIDED by the policy",
    "zap": lambda e: f"zapped {e.b} pages from gfn {e.a:#x} on",
    "protect": lambda e: f"write-protected {e.b} pages from gfn {e.a:#x} on",
    "map": lambda e: f"mapped gfn {e.a:#x} to frame {e.b:#x}",
    "request": lambda e: f"request {e.b} to vCPU {e.a}",
    "ipi": lambda e: f"IPI to {e.a} pCPUs",
    "promise": lambda e: f"promise: {_PROMISED_BY[_name(_PROMISES, e.a)]}, gfn {e.b:#x}",
    "free": lambda e: f"frame {e.a:#x} freed",
    "root_load": lambda e: f"vCPU {e.a} loads root {e.b:#x}",
    "root_free": lambda e: f"root {e.a:#x} freed",
    "guest_invalidate": lambda e: f"guest of vCPU {e.a} invalidates page {e.b:#x}",
    "unload": lambda e: f"VMCLEAR of vCPU {e.a}, which is loaded elsewhere",
    "yield": lambda e: f"zap of VM {e.a} yields, {'flushed' if e.b else 'not flushed'}",
}


class Stories:
    """Collects a machine's reports. `poll` often; `finish` once, when its actors are gone."""

    def __init__(self, m: Any) -> None:
        self._m = m
        self._reports: list[tuple[Any, list[Event]]] = []
        self._buffer = ffi.new("struct violation_report[]", 64)
        self._events = ffi.new("struct event[]", _EVENTS_KEPT)

    def poll(self) -> int:
        """Take new reports; returns how many."""
        before = len(self._reports)
        while n := lib.oracle_reports(self._m, len(self._reports), self._buffer, 64):
            for i in range(n):
                copy = ffi.new("struct violation_report *", self._buffer[i])
                self._reports.append((copy, self._events_of(len(self._reports))))
        return len(self._reports) - before

    def _events_of(self, report: int) -> list[Event]:
        events = []
        for i in range(lib.oracle_report_events(self._m, report, self._events, _EVENTS_KEPT)):
            e = self._events[i]
            events.append(Event(e.time, _name(_EVENT_KINDS, e.kind), e.cpu, e.a, e.b))
        return sorted(events, key=lambda event: event.time)

    def finish(self, names: dict[int, str], mutants: Iterable[str]) -> tuple[Report, ...]:
        """All reports, most telling first: the events' owners by CPU number, the answers that may be to
        blame."""
        self.poll()
        blame = tuple(mutants)
        return tuple(_report(report, events, names, blame) for report, events in self._reports)


def _report(r: Any, events: list[Event], names: dict[int, str], blame: tuple[str, ...]) -> Report:
    kinds = tuple(kind for i, kind in enumerate(VIOLATION_KINDS) if r.kinds >> i & 1) or ("deadlock",)
    story = events[-EVENTS_SHOWN:]
    text = _stall_text(r, kinds, names) if kinds[0].endswith("stall") or kinds[0] == "deadlock" else None
    lines = [text] if text else _use_text(r, kinds, names)
    if blame:
        lines.append(f"  policy answers known to be unsafe: {', '.join(blame)}")
    if story:
        lines.append("  last events:")
        lines += [
            f"    {(event.time - r.time) / 1000:+11.1f} us  {names.get(event.cpu, str(event.cpu)):>9}  "
            f"{event.describe()}"
            for event in story
        ]
    return Report(kinds[0], kinds, "\n".join(lines), _details(r, story))


def _stall_text(r: Any, kinds: tuple[str, ...], names: dict[int, str]) -> str:
    # What exactly, the log said when the watchdog found it.
    return (
        f"{kinds[0]}: somebody waits for ever for CPU {r.promise_cpu} ({names.get(r.promise_cpu, 'nobody')})"
    )


def _use_text(r: Any, kinds: tuple[str, ...], names: dict[int, str]) -> list[str]:
    if kinds[0] == "lost-dirty":
        return [f"lost-dirty: VM {r.vm} page {r.gfn:#x} differs from the image copied by the dirty log"]
    entry = r.entry
    where = f"reference of a walk at level {r.walk_level}" if r.walk_level else f"linear {r.linear:#x}"
    also = f" (also {', '.join(kinds[1:])})" if kinds[1:] else ""
    translation = f"{_name(_SIZES, entry.size)} {_name(_MAPPINGS, entry.kind)}, page {entry.page:#x}"
    who = names.get(r.cpu, str(r.cpu))
    promised_on = names.get(r.promise_cpu, str(r.promise_cpu))
    promise = _PROMISED_BY[_name(_PROMISES, r.promise)]
    age = f", {r.guest_clock - entry.clock} accesses ago" if entry.vcpu == r.vcpu else ""
    # A freed table does not say when.
    when = f" on {promised_on}, {(r.time - r.promise_time) / 1000:.1f} us before" if r.promise_time else ""
    lines = (
        f"{kinds[0]}{also}: {_name(_ACCESSES, r.access)} by vCPU {r.vcpu} of VM {r.vm} on {who}",
        f"  access: {where}, gfn {r.gfn:#x}, frame {r.hfn:#x}",
        f"  entry: {translation}, VPID {entry.vpid}, PCID {entry.pcid}, EP4TA {entry.ep4ta:#x}",
        f"  filled by: vCPU {entry.vcpu} of VM {entry.vm}{age}",
        f"  revoked: {promise}{when}",
        f"  missing: {_missing(kinds[0], r)}",
    )
    return list(lines)


def _missing(kind: str, r: Any) -> str:
    """The flush that should have removed the entry."""
    promise = _name(_PROMISES, r.promise)
    if kind == "foreign-root":
        return "the flush when a root page was loaded again (root_load), or that of the migration"
    if kind == "walk-after-free":
        return "the flush between unlinking the table and freeing it (map_replace, zap_yield, RCU)"
    if kind == "guest-stale":
        return "the VPID's flush when the vCPU came to this pCPU (migration_vpid)"
    if promise == "dirty_log":
        return "the flush after write-protecting (write_protect)"
    return "the remote flush before the promise, or the flush when the vCPU came to this pCPU (migration)"


def _details(r: Any, story: list[Event]) -> dict[str, Any]:
    entry = r.entry
    return {
        "pcpu": r.cpu,
        "vm": r.vm,
        "vcpu": r.vcpu,
        "access": _name(_ACCESSES, r.access),
        "linear": r.linear,
        "gfn": r.gfn,
        "frame": r.hfn,
        "walk_level": r.walk_level,
        "time_ns": r.time,
        "promise": _name(_PROMISES, r.promise).replace("_", "-"),
        "promise_cpu": r.promise_cpu,
        "promise_time_ns": r.promise_time,
        "entry": {
            "kind": _name(_MAPPINGS, entry.kind),
            "size": _name(_SIZES, entry.size),
            "page": entry.page,
            "frame": entry.hfn,
            "ep4ta": entry.ep4ta,
            "vpid": entry.vpid,
            "pcid": entry.pcid,
            "filled_by_vm": entry.vm,
            "filled_by_vcpu": entry.vcpu,
            "custody": entry.custody,
        },
        "events": [
            {"time_ns": e.time, "cpu": e.cpu, "kind": e.kind, "a": e.a, "b": e.b, "text": e.describe()}
            for e in story
        ],
    }
