"""A result for people (rich tables) and for programs (one JSON document)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from emulator.report.result import FlushCount, Histogram, Report, Result, Snapshot
from native import lib

DOCUMENT_VERSION = 1
# Violations shown in full; the JSON document has all that were kept.
SHOWN_REPORTS = 3
# VMs with a column of their own; the JSON document has all.
SHOWN_VMS = 8

_VERDICTS = {
    "clean": ("green", "clean: no translation was used after KVM promised that it was gone"),
    "violations": ("bold red", "VIOLATIONS"),
    "inconclusive": ("yellow", "inconclusive: no flush averted a use, so nothing was put to the test"),
}


def exit_status(result: Result) -> int:
    """Return the exit status: 0 clean (or inconclusive: nothing was found), 1 violations, 3 a failed run."""
    if result.failure:
        return 3
    return 1 if result.snapshot.violated else 0


def document(result: Result) -> dict[str, Any]:
    """Return the JSON document.  Its keys are stable; durations are in seconds."""
    snapshot = result.snapshot
    return {
        "flushlab": DOCUMENT_VERSION,
        "verdict": result.verdict,
        "exit_status": exit_status(result),
        "scenario": result.scenario,
        "policy": _policy(result),
        "seed": result.seed,
        "elapsed_seconds": round(snapshot.elapsed, 3),
        "interrupted": result.interrupted,
        "failure": result.failure,
        "totals": totals(snapshot),
        "activities": [asdict(activity) for activity in result.activities],
        "counters": dict(snapshot.counters),
        "vms": [dict(vm) for vm in snapshot.vms],
        "flushes": [_flush(flush) for flush in snapshot.flushes],
        "histograms": {name: _histogram(histogram) for name, histogram in snapshot.histograms.items()},
        "receivers": [asdict(group) for group in result.receivers],
        "violations": dict(snapshot.violations),
        "reports": [report_document(report) for report in result.reports],
        "preconditions": dict(result.preconditions),
        "custody_tag_rounds": result.tag_rounds,
        "cycles": {
            "flush": _cycles(result, "flush"),
            "work": _cycles(result, "work"),
            "lines": [
                {
                    "item": line.item,
                    "group": line.group,
                    "events": line.events,
                    "cycles_each": line.cycles_each,
                    "cycles": line.cycles,
                    "source": line.source,
                }
                for line in result.cycles
            ],
        },
    }


def report_document(report: Report) -> dict[str, Any]:
    """Return one violation for programs."""
    return {"kind": report.kind, "kinds": list(report.kinds), "text": report.text, **report.details}


def _policy(result: Result) -> dict[str, Any]:
    """Return the policy's answers.  `overridden` has the points that a user's class decides case by case;
    `decisions` has its base's answers for these."""
    return {
        "name": result.policy_name,
        "decisions": dict(result.policy),
        "overridden": {
            point: {"where": where, "answers": dict(result.policy_given.get(point, {}))}
            for point, where in result.policy_overrides.items()
        },
    }


def totals(snapshot: Snapshot) -> dict[str, int]:
    """Return the handful of sums that tell runs apart."""
    counters = snapshot.counters
    return {
        "guest_accesses": counters["accesses"],
        "pages_zapped": counters["sptes_zapped"],
        "pages_mapped": counters["sptes_mapped"],
        "frames_freed": counters["frames_freed"],
        "faults": snapshot.kvm("faults"),
        "migrations": snapshot.kvm("migrations"),
        "flushes": sum(flush.count for flush in snapshot.flushes),
        "necessary_flushes": snapshot.necessary,
        "flushes_elided": snapshot.kvm("flushes_elided"),
        "averted_uses": counters["averted"],
        "legal_stale_uses": counters["legal_stale"],
        "ipis": counters["ipis_sent"],
        "violations": snapshot.violated,
    }


def progress_line(earlier: Snapshot | None, now: Snapshot | None, duration: float | None) -> Text:
    """Return one line of live rates."""
    if now is None:
        return Text("booting")
    span = now.elapsed - earlier.elapsed if earlier is not None else now.elapsed
    before = totals(earlier) if earlier is not None else {}
    current = totals(now)
    text = Text(f"{now.elapsed:5.0f}s" + (f"/{duration:.0f}s" if duration else ""))
    text.append(f" {now.phase:<6}", style="dim")
    rates = (
        ("guest_accesses", "accesses/s"),
        ("faults", "faults/s"),
        ("pages_zapped", "zaps/s"),
        ("migrations", "migrations/s"),
        ("flushes", "flushes/s"),
        ("ipis", "IPIs/s"),
    )
    for key, label in rates:
        rate = (current[key] - before.get(key, 0)) / span if span > 0 else 0
        text.append(f"  {short(rate)}", style="bold")
        text.append(f" {label}")
    text.append(f"  averted {short(current['averted_uses'])}")
    text.append(f"  violations {current['violations']}", style="bold red" if current["violations"] else "")
    return text


def summary(result: Result) -> RenderableType:
    """Return the summary that `flushlab run` prints at its end."""
    snapshot = result.snapshot
    parts: list[RenderableType] = [
        _header(result),
        _numbers(snapshot),
        *_activity_tables(result),
        _flush_table(snapshot),
        _pause_table(snapshot),
        _vm_table(snapshot),
    ]
    if result.cycles:
        parts.append(_cycle_table(result))
    parts += [Text(report.text) for report in _examples(result.reports)]
    parts.append(_verdict(result))
    return Group(*(part for pair in ((part, Text()) for part in parts) for part in pair))


def short(number: float) -> str:
    """Return a number with three digits and a suffix: 1234567 -> 1.23M

    >>> short(1234567), short(999), short(12345)
    ('1.23M', '999', '12.3k')
    """
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g}{unit}"
    return f"{number:.3g}"


def duration_text(seconds: float) -> str:
    """Return a duration with its unit: 0.00000123 -> 1.23 us"""
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def _examples(reports: tuple[Report, ...]) -> list[Report]:
    """Return the first report of each kind.  A run may have thousands that differ in numbers only."""
    first: dict[str, Report] = {}
    for report in reports:
        first.setdefault(report.kind, report)
    return list(first.values())[:SHOWN_REPORTS]


def _header(result: Result) -> Text:
    ending = ", interrupted" if result.interrupted else ""
    elapsed = f"{result.snapshot.elapsed:.1f}s{ending}"
    head = f"{result.scenario} under {result.policy_name}, seed {result.seed}, {elapsed}"
    text = Text(head, style="bold")
    for point, where in result.policy_overrides.items():
        given = result.policy_given.get(point, {})
        answers = ", ".join(f"{alternative} {n:,}" for alternative, n in given.items())
        text.append(f"\n{point} decided by {where}: {answers or 'never asked'}", style="not bold")
    return text


def _numbers(snapshot: Snapshot) -> Table:
    counters, sums = snapshot.counters, totals(snapshot)
    elapsed = max(snapshot.elapsed, 1e-9)
    table = _table("", "total", "per second", title="events")
    rows = (
        ("guest accesses", sums["guest_accesses"]),
        ("faults", sums["faults"]),
        ("pages zapped", sums["pages_zapped"]),
        ("frames freed", sums["frames_freed"]),
        ("migrations", sums["migrations"]),
        ("IPIs", sums["ipis"]),
        ("guests interrupted", counters["interruptions"]),
        ("of those bystanders", counters["bystander"]),
        ("flushes", sums["flushes"]),
        ("flushes elided", sums["flushes_elided"]),
        ("refills caused by flushes", counters["refills"]),
        ("averted uses", sums["averted_uses"]),
        ("legal stale uses", sums["legal_stale_uses"]),
    )
    for name, number in rows:
        table.add_row(name, f"{number:,}", short(number / elapsed))
    l1 = _hit_rate(counters["lookups"], counters["l1_misses"])
    l2 = _hit_rate(counters["l1_misses"], counters["l2_misses"])
    table.add_row("TLB hits, first level", l1, "")
    table.add_row("TLB hits, second level", l2, "")
    return table


def _hit_rate(lookups: int, misses: int) -> str:
    return f"{100 * (lookups - misses) / lookups:.2f}%" if lookups else "-"


def _activity_tables(result: Result) -> list[Table]:
    """Return a table of the rates that the scenario asks for beside those reached, or none without rates."""
    if not result.activities or not result.worked:
        return []
    table = _table("activity", "asked", "reached", "", title="rates per second")
    for activity in result.activities:
        asked, begun = activity.asked / result.worked, activity.begun / result.worked
        share = f"{begun / asked:.0%}" if asked else "-"
        table.add_row(activity.name.replace("_", " "), short(asked), short(begun), share)
    return [table]


def _flush_table(snapshot: Snapshot) -> Table:
    table = _table("scope", "reason", "flushes", "necessary", "", title="flushes", left=2)
    for (scope, reason), (count, necessary) in sorted(_by_scope_and_reason(snapshot.flushes).items()):
        share = f"{100 * necessary / count:.2f}%" if count else "-"
        table.add_row(
            scope.replace("_", " "), reason.replace("_", " "), f"{count:,}", f"{necessary:,}", share
        )
    return table


def _by_scope_and_reason(flushes: Iterable[FlushCount]) -> dict[tuple[str, str], tuple[int, int]]:
    sums: dict[tuple[str, str], tuple[int, int]] = {}
    for flush in flushes:
        count, necessary = sums.get((flush.scope, flush.reason), (0, 0))
        sums[flush.scope, flush.reason] = (count + flush.count, necessary + flush.necessary)
    return sums


def _pause_table(snapshot: Snapshot) -> Table:
    table = _table("duration, at most", "samples", "mean", "p50", "p99", "longest", title="waits and pauses")
    for name, histogram in snapshot.histograms.items():
        values = (histogram.mean, histogram.percentile(50), histogram.percentile(99), histogram.longest)
        shown = [duration_text(v) for v in values] if histogram.count else ["-"] * 4
        table.add_row(name.replace("_", " "), f"{histogram.count:,}", *shown)
    return table


def _vm_table(snapshot: Snapshot) -> Table:
    shown = snapshot.vms[:SHOWN_VMS]
    left_out = f": the first {len(shown)} of {len(snapshot.vms):,}" if len(shown) < len(snapshot.vms) else ""
    table = _table("KVM statistic", *(f"VM {vm}" for vm in range(len(shown))), title=f"per VM{left_out}")
    for stat in snapshot.vms[0] if snapshot.vms else ():
        table.add_row(stat, *(f"{vm[stat]:,}" for vm in shown))
    return table


def _cycle_table(result: Result) -> Table:
    elapsed = max(result.snapshot.elapsed, 1e-9)
    table = _table(
        "modelled cycles", "group", "events", "each", "cycles", "per second", title="costs", left=2
    )
    for line in result.cycles:
        if line.events:
            rate = short(line.cycles / elapsed)
            cells = (f"{line.events:,}", f"{line.cycles_each:g}", short(line.cycles), rate)
            table.add_row(line.item.replace("_", " "), line.group, *cells)
    for group in ("flush", "work"):
        cycles = _cycles(result, group)
        table.add_row(f"all of {group}", "", "", "", short(cycles), short(cycles / elapsed), style="bold")
    return table


def _verdict(result: Result) -> Text:
    style, sentence = _VERDICTS[result.verdict]
    # A failure makes a run inconclusive, even if its flushes have averted uses.
    text = Text("inconclusive" if result.failure and not result.snapshot.violated else sentence, style=style)
    if result.snapshot.violations:
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in result.snapshot.violations.items())
        text.append(f": {kinds}")
        hidden = result.snapshot.violated - len(_examples(result.reports))
        if hidden > 0:
            text.append(f" ({hidden:,} not shown; --json has those that were kept)")
    if result.tag_rounds:
        text.append(
            f"\nframes' tags went round {result.tag_rounds:,} times: a use of a translation that is exactly "
            f"{lib.FRAME_TAG_MASK + 1:,} changes of its frame old would not be seen",
            style="yellow",
        )
    if result.failure:
        text.append(f"\nthe run failed and proves nothing: {result.failure}", style="bold red")
    return text


def _table(*columns: str, title: str, left: int = 1) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < left else "right", no_wrap=True)
    return table


def _cycles(result: Result, group: str) -> float:
    return sum(line.cycles for line in result.cycles if line.group == group)


def _flush(flush: FlushCount) -> Mapping[str, Any]:
    return {
        "vm": flush.vm,
        "scope": flush.scope,
        "reason": flush.reason,
        "count": flush.count,
        "necessary": flush.necessary,
    }


def _histogram(histogram: Histogram) -> Mapping[str, Any]:
    return {
        "count": histogram.count,
        "mean": histogram.mean,
        "p50": histogram.percentile(50),
        "p90": histogram.percentile(90),
        "p99": histogram.percentile(99),
        "longest": histogram.longest,
    }
