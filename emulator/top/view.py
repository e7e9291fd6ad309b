"""The view: rates of the last interval, per VM and pCPU, flushes by reason and scope, pauses, violations."""

from __future__ import annotations

from collections import deque
from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from emulator.report.summary import duration_text, short
from emulator.top.sample import Interval

# Violations that are kept on the screen, the newest first.
_SHOWN: Final = 5
_TOTALS: Final = (
    ("guest accesses", "guest_accesses_total"),
    ("VM entries", "vm_entries_total"),
    ("flushes", "tlb_flushes_total"),
    ("elided", "tlb_flushes_elided_total"),
    ("refills", "tlb_refills_total"),
    ("IPIs", "ipis_sent_total"),
    ("guests interrupted", "vcpu_interruptions_total"),
    ("uses averted", "averted_uses_total"),
)
_PER_VM: Final = (
    ("flushes", "tlb_flushes_total"),
    ("elided", "tlb_flushes_elided_total"),
    ("requests", "remote_tlb_flush_requests_total"),
    ("faults", "page_faults_fixed_total"),
    ("moves", "vcpu_migrations_total"),
    ("zaps", "zaps_total"),
)
_PER_CPU: Final = (
    ("IPIs", "pcpu_ipis_received_total"),
    ("interrupted", "pcpu_interruptions_total"),
    ("walks", "pcpu_tlb_walks_total"),
)
_PAUSES: Final = (
    ("pause of a vCPU", "vcpu_pause_seconds"),
    ("remote flush", "remote_tlb_flush_seconds"),
    ("wait of an IPI's sender", "ipi_wait_seconds"),
)


class View:
    """Draws intervals.  It remembers the violations that it has seen."""

    def __init__(self) -> None:
        self._found: deque[str] = deque(maxlen=_SHOWN)

    def draw(self, interval: Interval, *, lines: int = 0) -> RenderableType:
        """Return the view.  lines: the lines of the screen, which limit the rows of VMs and pCPUs; 0: all."""
        self._note(interval)
        rows = max(4, (lines - 24) // 2) if lines else 1 << 20
        return Group(
            self._head(interval),
            self._violations(interval),
            Text(),
            _totals(interval),
            Text(),
            _per(interval, "vm", "VM", _PER_VM, rows),
            Text(),
            _flushes(interval),
            Text(),
            _pauses(interval),
            *_cpus(interval, rows),
        )

    def _note(self, interval: Interval) -> None:
        for (kind,), new in sorted(interval.grown("violations_total", "kind").items()):
            if new:
                self._found.appendleft(f"{new:.0f} {kind}")

    def _head(self, interval: Interval) -> Text:
        info = interval.now.info()
        text = Text(info.get("scenario", "?"), style="bold")
        text.append(f" under {info.get('policy', '?')}", style="cyan")
        more = [f"{info[key]} {label}" for key, label in (("pcpus", "pCPUs"), ("vms", "VMs")) if key in info]
        more += [f"{key} {info[key]}" for key in ("seed", "version") if key in info]
        return text.append(f"  {', '.join(more)}", style="dim")

    def _violations(self, interval: Interval) -> Text:
        kinds = {kind: n for (kind,), n in interval.now.by("violations_total", "kind").items() if n}
        if not kinds:
            return Text("no violations", style="green")
        text = Text("violations: ", style="bold red")
        text.append(", ".join(f"{n:.0f} {kind}" for kind, n in sorted(kinds.items())))
        if self._found:
            text.append(f"\nnew, the latest first: {'; '.join(self._found)}", style="red")
        return text


def _table(*heads: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i else "left", no_wrap=True)
    return table


def _totals(interval: Interval) -> Table:
    table = _table("per second", "", "", "")
    cells = [(label, short(interval.rate(name))) for label, name in _TOTALS]
    for left, right in zip(cells[::2], cells[1::2], strict=True):
        table.add_row(left[0], left[1], right[0], right[1])
    return table


def _per(interval: Interval, label: str, head: str, columns: tuple[tuple[str, str], ...], rows: int) -> Table:
    table = _table(f"{head}, per second", *(name for name, _ in columns))
    rates = [interval.rates(metric, label) for _, metric in columns]
    keys = sorted({key for each in rates for key in each}, key=lambda key: (len(key[0]), key))
    for key in keys[:rows]:
        table.add_row(key[0], *(short(each.get(key, 0.0)) for each in rates))
    if len(keys) > rows:
        table.add_row(f"and {len(keys) - rows} more")
    return table


def _flushes(interval: Interval) -> Table:
    table = _table("flushes per second", "for", "flushes", "necessary")
    rates = interval.rates("tlb_flushes_total", "scope", "reason")
    necessary = interval.rates("tlb_flushes_necessary_total", "scope", "reason")
    for key, rate in sorted(rates.items(), key=lambda item: -item[1]):
        if rate:
            # A flush counts as necessary at the use that it averts, which may be in a later interval.
            share = f"{min(100 * necessary.get(key, 0.0) / rate, 100):.0f} %"
            table.add_row(*(part.replace("_", " ") for part in key), short(rate), share)
    if not any(rates.values()):
        table.add_row("none")
    return table


def _pauses(interval: Interval) -> Table:
    table = _table("at most", "median", "99 %")
    for label, histogram in _PAUSES:
        values = [interval.percentile(histogram, percent) for percent in (50, 99)]
        table.add_row(label, *("-" if value is None else _bound(value) for value in values))
    return table


def _bound(seconds: float) -> str:
    return "more" if seconds == float("inf") else duration_text(seconds)


def _cpus(interval: Interval, rows: int) -> list[RenderableType]:
    if not interval.now.by("pcpu_ipis_received_total", "cpu"):
        return [Text("\nno pCPUs: the service runs without --metrics-per-cpu", style="dim")]
    return [Text(), _per(interval, "cpu", "pCPU", _PER_CPU, rows)]
