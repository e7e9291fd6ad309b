"""The sums of a trace as text of 80 columns, and as JSON."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

from rich.table import Table
from rich.text import Text

from emulator.hosttrace.fields import VECTORS
from emulator.hosttrace.lines import Dialect, Reading
from emulator.hosttrace.missing import unanswered
from emulator.hosttrace.observed import UNKNOWN, Observed
from emulator.hosttrace.sums import Cause, Vcpu
from emulator.report.console import output_console

# Increased when a field changes its meaning or goes.
JSON_VERSION: Final = 1
_WIDTH: Final = 80
# Rows of a table, the busiest first; the JSON document has all.
_ROWS: Final = 12
# kvm_exit names the interrupt of this exit, on Intel.
_INTERRUPTED: Final = "EXTERNAL_INTERRUPT"
# Beyond this value an int is negative.
_INT_MAX: Final = (1 << 31) - 1


def print_report(name: str, reading: Reading, observed: Observed) -> None:
    """Print what was read, the vCPUs, the causes of flushes, the interrupts, and the open questions."""
    console = output_console(_WIDTH, highlight=False)
    for line in wrapped(_heading(name, reading, observed)):
        console.print(Text(line, style="bold"))
    for line in _read(reading, observed):
        console.print(Text(line))
    for title, table in _tables(observed):
        console.print()
        console.print(Text(title, style="bold"))
        console.print(table)
    for line in [*_notes(observed), *_open(observed)]:
        console.print(Text(line))


def as_dict(name: str, reading: Reading, observed: Observed) -> dict[str, Any]:
    """Return the sums as a JSON document.  Times are in seconds."""
    return {
        "hosttrace": JSON_VERSION,
        "file": name,
        "lines": reading.lines,
        "events": reading.events,
        "other_lines": reading.other,
        "lost_events": reading.lost,
        "lost_unknown": reading.lost_unknown,
        "dialects": {str(dialect): n for dialect, n in reading.dialects.items()},
        "seconds": observed.seconds,
        "cpus": sorted(observed.cpus),
        "kinds": dict(observed.kinds.most_common()),
        "unread": dict(observed.unread.most_common()),
        "calls": {name: observed.calls(name) for name in sorted({name for name, _ in observed.functions})},
        "vcpus": [_vcpu_dict(vcpu) for vcpu in observed.vcpus.values()],
        "causes": {name: _cause_dict(cause) for name, cause in observed.causes.items()},
        "senders": {name: vars(sender) for name, sender in observed.senders.items()},
        "host_flushes": dict(observed.host_flushes),
        "vmcs_clears": observed.vmcs_clears,
        "tables_zapped": observed.tables_zapped,
        "leaves_mapped": observed.mapped,
        "unanswered": [question.answer for question in unanswered(observed)],
    }


def _vcpu_dict(vcpu: Vcpu) -> dict[str, Any]:
    fields = vars(vcpu) | {"cpus": sorted(vcpu.cpus), "guest_time": vcpu.guest_time / 1e9}
    return fields | {"vectors": {f"{vector:#x}": n for vector, n in vcpu.vectors.items()}}


def _cause_dict(cause: Cause) -> dict[str, Any]:
    return dict(vars(cause))


# --- sentences ------------------------------------------------------------------------------------------


def wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _heading(name: str, reading: Reading, observed: Observed) -> str:
    text = f"{name}: {reading.events:,} events"
    if observed.seconds is not None:
        text += f" in {observed.seconds:.6f} s"
    if observed.cpus:
        text += f" on {len(observed.cpus)} CPUs"
    kinds = " and ".join(str(dialect) for dialect in Dialect if dialect in reading.dialects)
    return f"{text} ({kinds})" if kinds else text


def _read(reading: Reading, observed: Observed) -> Iterator[str]:
    if observed.first >= 0 and observed.seconds is None:
        yield from wrapped(
            "Its clock goes back by more than a second: several recordings in one file. No rates are given,"
            " and causes may be mixed up where the recordings meet."
        )
    if reading.lost or reading.lost_unknown:
        number = f"{reading.lost:,}" if reading.lost else "an unknown number of"
        yield from wrapped(f"The recording lost {number} events: counts are too low.")
    if reading.other:
        yield from wrapped(
            f"{reading.other:,} lines are no event of a known form, the first: "
            f"{reading.first_other[0].strip()!r}"
        )
    if observed.unread:
        kinds = ", ".join(f"{name} {n:,}" for name, n in observed.unread.most_common(_ROWS))
        rest = len(observed.unread) - _ROWS
        more = f" and {rest} more kinds" if rest > 0 else ""
        yield from wrapped(f"Not used: {kinds}{more}.")


def _notes(observed: Observed) -> Iterator[str]:
    lines = []
    calls = {name: observed.calls(name) for name, _ in observed.functions}
    if calls:
        busiest = ", ".join(f"{name} {n:,}" for name, n in Counter(calls).most_common(_ROWS))
        lines.append(f"Calls seen by probes: {busiest}.")
    if observed.vmcs_clears:
        lines.append(
            f"{observed.vmcs_clears:,} times a vCPU that had moved interrupted the CPU that it left"
            " (__loaded_vmcs_clear)."
        )
    if observed.host_flushes:
        kinds = ", ".join(f"{reason} {n:,}" for reason, n in observed.host_flushes.most_common())
        lines.append(f"The host's own flushes (tlb_flush): {kinds}.")
    if observed.mapped or observed.tables_zapped:
        lines.append(f"SPTEs: {observed.mapped:,} leaves mapped, {observed.tables_zapped:,} tables zapped.")
    lines += _samples(observed)
    for line in lines:
        yield ""
        yield from wrapped(line)


def _samples(observed: Observed) -> list[str]:
    samples = observed.invalidate
    if not samples.number:
        return []
    text = (
        f"{samples.number:,} samples of mmu_invalidate_seq, {samples.lowest:#x} to {samples.highest:#x}; an"
        f" invalidation was in progress in {samples.in_progress:,}. Ranges: {samples.ranges:,}, of"
        f" {samples.pages:,} pages in all."
    )
    if samples.highest > _INT_MAX:
        text += (
            " The sequence is beyond 2^31: a kernel that compares it as an int retries such a fault for ever"
            " (82d811ff5665)."
        )
    return [text]


def _open(observed: Observed) -> Iterator[str]:
    questions = unanswered(observed)
    if not questions:
        return
    yield ""
    yield from wrapped("Not in this trace, because it did not happen or was not recorded:")
    for question in questions:
        yield from wrapped(f"{question.answer}: {question.unknown}. Record {question.record}.", "  ")


# --- tables ---------------------------------------------------------------------------------------------


def _tables(observed: Observed) -> Iterator[tuple[str, Table]]:
    if observed.vcpus:
        yield _titled("vCPUs", len(observed.vcpus)), _vcpus(observed)
        yield "Exits of all vCPUs, by reason", _reasons(observed)
    causes = [(name, cause) for name, cause in observed.causes.items() if _matters(cause)]
    if causes:
        yield "Work by cause (the task's last event within 1 ms)", _causes(causes)
    if observed.senders:
        yield (
            _titled("Interrupts sent, by the function that sent them", len(observed.senders)),
            _senders(observed),
        )


def _titled(title: str, rows: int) -> str:
    return title if rows <= _ROWS else f"{title} (the busiest {_ROWS} of {rows})"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left", overflow="fold")
    return table


def _vcpus(observed: Observed) -> Table:
    table = _table("task", "vCPU", "exits", "per second", "in guest", "faults", "moves")
    seconds = observed.seconds
    for vcpu in sorted(observed.vcpus.values(), key=lambda vcpu: -vcpu.exits.total())[:_ROWS]:
        exits = vcpu.exits.total()
        table.add_row(
            vcpu.name,
            str(vcpu.number) if vcpu.number >= 0 else "?",
            f"{exits:,}",
            f"{exits / seconds:,.0f}" if seconds else "?",
            f"{vcpu.guest_time / 1e9 / seconds:.0%}" if seconds and exits and vcpu.entries else "?",
            f"{vcpu.faults:,}",
            f"{vcpu.moves:,}",
        )
    return table


def _reasons(observed: Observed) -> Table:
    reasons: Counter[str] = Counter()
    vectors: Counter[int] = Counter()
    for vcpu in observed.vcpus.values():
        reasons.update(vcpu.exits)
        vectors.update(vcpu.vectors)
    table = _table("reason", "exits", "share")
    for reason, number in reasons.most_common(_ROWS):
        table.add_row(reason, f"{number:,}", f"{number / reasons.total():.0%}")
        if reason == _INTERRUPTED:
            for vector, times in vectors.most_common():
                name = VECTORS.get(vector, "vector")
                table.add_row(f"  {name} ({vector:#x})", f"{times:,}", f"{times / reasons.total():.0%}")
    return table


def _matters(cause: Cause) -> bool:
    return bool(
        cause.ranges or cause.zapped or cause.protected or cause.flushes or cause.requests or cause.broadcasts
    )


def _causes(causes: list[tuple[str, Cause]]) -> Table:
    table = _table("cause", "events", "pages", "zapped", "protect", "flushes", "kicks", "CPUs", "in guest")
    order = sorted(causes, key=lambda entry: (entry[0] == UNKNOWN, -entry[1].flushes, -entry[1].events))
    for name, cause in order[:_ROWS]:
        numbers = (cause.pages, cause.zapped, cause.protected, cause.flushes, cause.broadcasts, cause.targets)
        events = f"{cause.events:,}" if cause.events else ""
        table.add_row(name, events, *(f"{n:,}" if n else "" for n in (*numbers, cause.in_guest)))
        for request, number in cause.requests.most_common():
            table.add_row(f"  {request}: {number:,}")
    return table


def _senders(observed: Observed) -> Table:
    columns = ["function", "calls", "CPUs", "in guest"]
    if observed.has_processes:
        columns.append("of another VM")
    table = _table(*columns)
    for name, sender in sorted(observed.senders.items(), key=lambda entry: -entry[1].targets)[:_ROWS]:
        numbers = [sender.calls, sender.targets, sender.in_guest]
        if observed.has_processes:
            numbers.append(sender.others)
        table.add_row(name, *(f"{n:,}" if n else "" for n in numbers))
    return table
