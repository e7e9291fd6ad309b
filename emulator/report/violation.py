"""Violation reports as text and JSON.

A report names the stale translation and the vCPU that used it, the vCPU that filled it, the promise that it
was gone, and the flush that the policy left out in between.  The core keeps the reports, the first ones
together with the events that led to them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from emulator.explain.analysis import RaceAnalysis
from emulator.explain.events import PROMISED_BY, PROMISES, Event, EventTail, name_of
from emulator.explain.facts import Facts
from emulator.explain.meanings import (
    COPIED,
    EARLY,
    ELIDED,
    FORBIDDEN,
    LATE,
    LOST,
    MARKED_EARLY,
    MISSED,
    NARROW,
    OUTDATED,
    PROMISE,
    REFUSED,
    REOPENED,
    REVOKE,
    SKIPPED,
    UNNAMED,
    UNNOTIFIED,
    UNPROTECTED,
)
from emulator.explain.phrases import phrases
from emulator.report.result import Report
from native import VIOLATION_KINDS, ffi, lib
from native.types import ReportNumber

if TYPE_CHECKING:
    from native._native import MachinePtr, ViolationReport

__all__ = ["Event", "EventTail", "ReportCollector"]

_EVENTS_KEPT = 512
_ACCESSES = ("read", "write", "execute")
SIZES = ("4K", "2M", "1G")
MAPPINGS = ("linear", "guest-physical", "combined")

_CULPRITS = {
    ELIDED: "elided",
    LATE: "too late",
    NARROW: "too narrow",
    REFUSED: "refused by the processor",
    MISSED: "request not seen",
    OUTDATED: "looked up before the promise",
    FORBIDDEN: "permitted, though the host does not",
    EARLY: "too early",
    SKIPPED: "missing: the zap before",
    UNNOTIFIED: "missing: an mmu_notifier before",
}

_LOST_LINES = {
    COPIED: "copied last",
    ELIDED: "elided",
    UNPROTECTED: "not write-protected again",
    REOPENED: "write-protected before its mark was taken",
    MARKED_EARLY: "marked before the SPTE was writable",
    LOST: "written",
    UNNAMED: "should have been named",
}


class ReportCollector:
    """Collects a machine's reports. `poll` often; `finish` once, when its actors are gone."""

    def __init__(self, m: MachinePtr) -> None:
        self._m = m
        self._reports: list[tuple[ViolationReport, list[Event]]] = []
        self._buffer = ffi.new("struct violation_report[]", 64)
        self._events = ffi.new("struct event[]", _EVENTS_KEPT)

    def poll(self) -> int:
        """Take new reports; return how many there were."""
        before = len(self._reports)
        while n := lib.oracle_reports(self._m, ReportNumber(len(self._reports)), self._buffer, 64):
            for i in range(n):
                copy = ffi.new("struct violation_report *", self._buffer[i])
                self._reports.append((copy, self._events_of(ReportNumber(len(self._reports)))))
        return len(self._reports) - before

    def __len__(self) -> int:
        return len(self._reports)

    def kind(self, index: int) -> str:
        """Return the kind of a report that `poll` has taken."""
        return _kinds(self._reports[index][0])[0]

    def has_events(self, index: int) -> bool:
        return bool(self._reports[index][1])

    def report(self, index: int, names: dict[int, str], mutants: Iterable[str]) -> Report:
        """Return one report as `finish` does.  `names` are the actors by CPU number, `mutants` the answers of
        the policy that may be to blame."""
        report, events = self._reports[index]
        return _report(report, events, names, tuple(mutants))

    def _events_of(self, report: ReportNumber) -> list[Event]:
        n = lib.oracle_report_events(self._m, report, self._events, _EVENTS_KEPT)
        return sorted((Event.of_core(self._events[i]) for i in range(n)), key=lambda event: event.time)

    def finish(self, names: dict[int, str], mutants: Iterable[str]) -> tuple[Report, ...]:
        """Return all reports in the order in which they came."""
        self.poll()
        blame = tuple(mutants)
        return tuple(self.report(index, names, blame) for index in range(len(self)))


def _kinds(r: ViolationReport) -> tuple[str, ...]:
    return tuple(kind for i, kind in enumerate(VIOLATION_KINDS) if r.kinds >> i & 1) or ("deadlock",)


def _report(r: ViolationReport, events: list[Event], names: dict[int, str], blame: tuple[str, ...]) -> Report:
    kinds = _kinds(r)
    details = _details(r, kinds, events, names, blame)
    analysis = RaceAnalysis(Facts.of_report(details), events)
    stall = kinds[0].endswith("stall") or kinds[0] == "deadlock"
    lines = [_stall_text(r, kinds, names)] if stall else _use_text(r, kinds, analysis, names)
    if blame:
        lines.append(f"  policy answers known to be unsafe: {', '.join(blame)}")
    if events:
        lines += _moments_text(r, analysis, names)
    return Report(kinds[0], kinds, "\n".join(lines), details)


def _moments_text(r: ViolationReport, analysis: RaceAnalysis, names: dict[int, str]) -> list[str]:
    lines = ["  events:"]
    for moment in analysis.moments:
        what = ", ".join(phrases(moment, analysis.facts))
        lines.append(f"    {_ago(moment.time, r):>13}  {_name(names, moment.cpu):>9}  {what}")
    return lines


def _name(names: Mapping[int, str], cpu: int) -> str:
    return names.get(cpu, f"CPU {cpu}")


def _ago(time: int, r: ViolationReport) -> str:
    return f"{(time - r.time) / 1000:+.1f} us" if time else "earlier"


def _stall_text(r: ViolationReport, kinds: tuple[str, ...], names: dict[int, str]) -> str:
    # The log has the details: the watchdog wrote them when it found the stall.
    return (
        f"{kinds[0]}: a CPU waits for ever for CPU {r.promise_cpu} ({names.get(r.promise_cpu, 'no thread')})"
    )


def _use_text(
    r: ViolationReport, kinds: tuple[str, ...], analysis: RaceAnalysis, names: dict[int, str]
) -> list[str]:
    if kinds[0] == "lost-dirty":
        return _lost_text(r, analysis, names)
    also = f" (also {', '.join(kinds[1:])})" if kinds[1:] else ""
    used = _kvm_text if analysis.facts.by_kvm else _access_text
    return [
        *used(r, kinds[0] + also, names),
        f"  revoked: {_promise_text(r, kinds[0], analysis, names)}",
        *_revocation_text(r, analysis, names),
        *([] if analysis.facts.marks_page else _flush_text(r, analysis, names)),
        *([] if analysis.culprit else [f"  missing: {_missing(kinds[0], r, analysis)}"]),
        *_unknown_text(r, analysis, names),
    ]


def _access_text(r: ViolationReport, what: str, names: dict[int, str]) -> list[str]:
    entry = r.entry
    where = f"reference of a walk at level {r.walk_level}" if r.walk_level else f"linear {r.linear:#x}"
    translation = f"{name_of(SIZES, entry.size)} {name_of(MAPPINGS, entry.kind)}, page {entry.page:#x}"
    ep4ta = "" if entry.kind == lib.KIND_LINEAR else f", EP4TA {entry.ep4ta:#x}"
    on = _name(names, r.cpu)
    age = f", {r.guest_clock - entry.clock} accesses ago" if entry.vcpu == r.vcpu else ""
    levels = r.nested or entry.nested
    by, filled = _level(r.nested, levels), _level(entry.nested, levels)
    return [
        f"{what}: {name_of(_ACCESSES, r.access)} by vCPU {r.vcpu} of VM {r.vm}{by} on {on}",
        f"  access: {where}, gfn {r.gfn:#x}, frame {r.hfn:#x}",
        f"  entry: {translation}, VPID {entry.vpid}, PCID {entry.pcid}{ep4ta}",
        f"  filled by: vCPU {entry.vcpu} of VM {entry.vm}{filled} on {on}{age}",
    ]


def _level(nested: int, told: int) -> str:
    """Name the guest of a vCPU: L1, or a nested one and its VPID; "" unless `told`."""
    if not told:
        return ""
    number, vpid = nested >> lib.NESTED_NUMBER_SHIFT, nested % lib.NESTED_VPIDS
    if not number:
        return " in L1"
    return f" in nested guest {number}" + (f" with VPID {vpid} of L1's" if vpid else "")


def _kvm_text(r: ViolationReport, what: str, names: dict[int, str]) -> list[str]:
    """Describe a use by KVM itself, of a table or of a page, which has no vCPU and no TLB entry."""
    use = (
        f"walk at level {r.walk_level}" if r.walk_level else "marking the page of a zapped SPTE (zapped_pfn)"
    )
    return [
        f"{what}: by KVM for VM {r.vm} on {_name(names, r.cpu)}",
        f"  access: {use}, gfn {r.gfn:#x}, frame {r.hfn:#x}",
    ]


def _lost_text(r: ViolationReport, analysis: RaceAnalysis, names: dict[int, str]) -> list[str]:
    lines = [f"lost-dirty: VM {r.vm} page {r.gfn:#x} differs from the image copied by the dirty log"]
    for meaning, what in _LOST_LINES.items():
        moment = analysis.moment(meaning)
        if moment is not None:
            phrase = ", ".join(phrases(moment, analysis.facts))
            where = f"{_name(names, moment.cpu)}, {_ago(moment.time, r)}"
            lines.append(f"  {what}: {phrase} on {where}")
    return lines


def _by_ept12(r: ViolationReport) -> bool:
    """Return whether the entry was derived from an EPT that L1 has for the nested guest."""
    return r.entry.kind == lib.KIND_GUEST_PHYSICAL or r.entry.ept12_delta != 0


def _promise_text(r: ViolationReport, kind: str, analysis: RaceAnalysis, names: dict[int, str]) -> str:
    if kind == "guest-stale":
        return PROMISED_BY["guest"]
    if kind == "l1-stale":
        return PROMISED_BY["l1-ept" if _by_ept12(r) else "l1"]
    if kind == "cross-guest":
        return "never this guest's"
    if kind == "apic-stale":
        return "the APIC-access page of the VMCS is another one than at the fill, or than KVM has mapped"
    promised = analysis.moment(PROMISE)
    if r.promise == lib.PROMISE_NONE and promised is not None:
        # No SPTE mapped the page at the promise, because the fault that mapped it was still under way.
        where = f"{_name(names, promised.cpu)}, {_ago(promised.time, r)}"
        return f"{PROMISED_BY[promised.event.promise]} on {where}"
    promise = PROMISED_BY[name_of(PROMISES, r.promise)]
    # A report about a freed table has no time of the promise.
    if not r.promise_time:
        return promise
    return f"{promise} on {_name(names, r.promise_cpu)}, {(r.time - r.promise_time) / 1000:.1f} us before"


def _revocation_text(r: ViolationReport, analysis: RaceAnalysis, names: dict[int, str]) -> list[str]:
    revoked = analysis.moment(REVOKE)
    if revoked is None:
        return []
    where = _name(names, revoked.cpu)
    lines = [f"  taken away: {phrases(revoked, analysis.facts)[0]} on {where}, {_ago(revoked.time, r)}"]
    if analysis.revoked_on not in (-1, r.cpu):
        lines[0] += f"; vCPU {r.vcpu} was on {_name(names, analysis.revoked_on)} then"
    return lines


def _flush_text(r: ViolationReport, analysis: RaceAnalysis, names: dict[int, str]) -> list[str]:
    """Describe the flushes between revocation and use, and the one that was missing."""
    lines = []
    flushed = [_name(names, cpu) for cpu in analysis.flushed_on()]
    if flushed:
        lines.append(f"  flushed since: {', '.join(flushed)}")
    culprit = analysis.culprit
    if culprit is not None:
        decision = analysis.decision(culprit) if culprit.meaning == ELIDED else ""
        asked = f" (decision {decision})" if decision else ""
        what = phrases(culprit, analysis.facts)[0]
        where = _name(names, culprit.cpu)
        lines.append(f"  {_CULPRITS[culprit.meaning]}: {what} on {where}, {_ago(culprit.time, r)}{asked}")
    return lines


def _unknown_text(r: ViolationReport, analysis: RaceAnalysis, names: dict[int, str]) -> list[str]:
    """Name the CPUs that have lost a part of the race from their rings."""
    return [
        f"  not known: events of {_name(names, e.cpu)} before {_ago(e.time, r)} ({e.a} are lost)"
        for e in (moment.event for moment in analysis.moments)
        if e.kind == "lost"
    ]


_MISSING: Final[dict[str, str]] = {
    "walk-after-free": "the flush between unlinking the table and freeing it (map_replace, zap_yield, RCU)",
    "missed-guest-write": (
        "the write-protection of the table in each SPTE that maps it, and the flush after that"
    ),
    "l1-stale": "the flush of the nested guest's VPID for L1's invalidation",
    "apic-stale": "the reload of the APIC-access page (KVM_REQ_APIC_PAGE_RELOAD), or the flush after it",
    "cross-guest": "tags that tell L1 and L2 apart (role.guest_mode, vpid02), or the flush between them",
}


def _missing(kind: str, r: ViolationReport, analysis: RaceAnalysis) -> str:
    """Name the flush that should have removed the entry."""
    promise = name_of(PROMISES, r.promise)
    if analysis.facts.marks_page:
        return "the zap of this SPTE before the host freed the page"
    if analysis.facts.by_kvm:
        return (
            "a reference on the root, rcu_read_lock() or READING_SHADOW_PAGE_TABLES, "
            "or a new start of the walk after a yield"
        )
    if kind == "l1-stale" and _by_ept12(r):
        return "the sync of KVM's tables with the EPT that L1 changed, or the flush for L1's invalidation"
    if kind in _MISSING:
        return _MISSING[kind]
    if kind == "foreign-root" and r.entry.kind == lib.KIND_LINEAR:
        return "the flush when the VPID's new vCPU first ran on this pCPU (loading of its VMCS)"
    if kind == "guest-stale" and r.entry.kind == lib.KIND_LINEAR:
        return "the synchronization of KVM's table, or the INVVPID, for the guest's invalidation"
    if kind == "foreign-root":
        return "the flush when a root page was loaded again (root_load), or that of the migration"
    if kind == "guest-stale" and analysis.revoked_on == r.cpu:
        return "the flush of the guest's VPID for its invalidation, which KVM emulates"
    if kind == "guest-stale":
        return "the VPID's flush when the vCPU came to this pCPU (migration_vpid)"
    if analysis.revoked_on not in (-1, r.cpu):
        return "the flush when the vCPU came to this pCPU (migration)"
    if promise == "dirty_log":
        return "the flush after write-protecting (write_protect)"
    return "the remote flush before the promise"


def _details(
    r: ViolationReport,
    kinds: tuple[str, ...],
    events: list[Event],
    names: dict[int, str],
    blame: tuple[str, ...],
) -> dict[str, Any]:
    """Return the report for programs, such as `flushlab explain`."""
    entry = r.entry
    return {
        "kinds": list(kinds),
        "pcpu": r.cpu,
        "vm": r.vm,
        "vcpu": r.vcpu,
        "access": name_of(_ACCESSES, r.access),
        "linear": r.linear,
        "gfn": r.gfn,
        "frame": r.hfn,
        "walk_level": r.walk_level,
        "time_ns": r.time,
        "promise": name_of(PROMISES, r.promise).replace("_", "-"),
        "promise_cpu": r.promise_cpu,
        "promise_time_ns": r.promise_time,
        "guest_clock": r.guest_clock,
        "live_sptes": r.live,
        **({"nested": r.nested} if r.nested or entry.nested else {}),
        "entry": {
            "kind": name_of(MAPPINGS, entry.kind),
            "size": name_of(SIZES, entry.size),
            "page": entry.page,
            "frame": entry.hfn,
            "ep4ta": entry.ep4ta,
            "vpid": entry.vpid,
            "pcid": entry.pcid,
            "filled_by_vm": entry.vm,
            "filled_by_vcpu": entry.vcpu,
            "clock": entry.clock,
            "custody": entry.custody,
            # A huge page's custody is that of many frames, and says nothing of one.
            "custody_holds": entry.size == 0 and entry.custody == r.tag_now,
            **({"nested": entry.nested} if r.nested or entry.nested else {}),
        },
        "unsafe_answers": list(blame),
        "actors": {str(cpu): names[cpu] for cpu in sorted({e.cpu for e in events} | {r.cpu}) if cpu in names},
        "events": [event.as_dict(timed=True) for event in events],
    }
