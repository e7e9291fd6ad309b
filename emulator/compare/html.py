"""A comparison as one self-contained page: verdicts, plots, every figure, and the sources of the costs."""

from __future__ import annotations

import base64
import json
import platform
import shlex
from collections.abc import Iterator, Sequence
from datetime import datetime
from html import escape
from importlib import resources
from pathlib import Path

from emulator import __version__
from emulator.compare.bound import NAME
from emulator.compare.document import comparison_document
from emulator.compare.measure import Measurement
from emulator.compare.plots import plots
from emulator.compare.rows import Row, Spread, bound_values, sections, spread_of, text_of
from emulator.compare.runner import Comparison
from emulator.compare.sensitivity import sensitivity, sentences
from emulator.compare.table import better, change
from emulator.output import write_file
from emulator.report.summary import short

_NOTHING = Spread(0, 0, 0)
_BETTER = " better"
_WAYS = {True: _BETTER, False: " worse", None: ""}


def write_page(comparison: Comparison, path: Path) -> None:
    write_file("--html", path, "\n".join(_page(comparison)) + "\n")


def _page(comparison: Comparison) -> Iterator[str]:
    scenario = comparison.plan.scenario
    style = resources.files("emulator.compare").joinpath("page.css").read_text("utf-8")
    yield "<!doctype html>"
    yield '<html lang="en"><head><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>flushlab compare: {escape(scenario.name)}</title>"
    yield f"<style>{style}</style></head><body>"
    yield f"<h1>{escape(scenario.title or scenario.name)}</h1>"
    yield f'<p class="muted">{escape(_subtitle(comparison))}</p>'
    if not comparison.columns:
        yield "<p>No run was finished.</p></body></html>"
        return
    yield '<div class="cards">'
    yield from _cards(comparison)
    yield "</div>"
    yield '<h2>At a glance</h2><div class="plots">'
    for plot in plots(comparison):
        yield (
            f'<figure><h3>{escape(plot.title)}</h3><p class="note">{escape(plot.note)}</p>{plot.svg}</figure>'
        )
    yield "</div><h2>All figures</h2>"
    yield from _table(comparison)
    yield from _violations(comparison)
    yield from _decisions(comparison)
    yield from _sensitivity(comparison)
    yield from _costs(comparison)
    yield "<h2>How to run it again</h2>"
    yield f"<pre>{escape(command_line(comparison))}</pre>"
    yield f'<p class="note">{escape(origin())} {_download(comparison)}</p></body></html>'


def origin() -> str:
    """Return where and when the page was made."""
    now = datetime.now().astimezone()
    return f"flushlab {__version__}, {now:%Y-%m-%d %H:%M %Z}, {platform.node()}, Linux {platform.release()}."


def _download(comparison: Comparison) -> str:
    """Return a link to the figures as the JSON document of --json, which the page holds."""
    document = json.dumps(comparison_document(comparison), allow_nan=False).encode()
    data = base64.b64encode(document).decode()
    return f'<a download="comparison.json" href="data:application/json;base64,{data}">All figures as JSON</a>'


def _subtitle(comparison: Comparison) -> str:
    plan = comparison.plan
    scenario = plan.scenario
    machine = f"{scenario.machine.pcpus} pCPUs, {scenario.vms} VMs, {scenario.vcpus} vCPUs"
    length = plan.length + (", so that all meet the same work" if scenario.pace else "")
    interrupted = " Interrupted." if comparison.interrupted else ""
    runs = f"{plan.repeat} run{'s' if plan.repeat > 1 else ''} per policy"
    return f"Scenario {scenario.name}: {machine}; {length}; {runs}, seed {plan.seed}.{interrupted}"


def _cards(comparison: Comparison) -> Iterator[str]:
    suffix, per = comparison.plan.per
    base = spread_of(comparison.columns[0][1], f"flush cycles{suffix}") or _NOTHING
    for number, (name, runs) in enumerate(comparison.columns):
        verdict = "failed" if any(m.result.failure for m in runs) else comparison.verdict(name)
        cycles = spread_of(runs, f"flush cycles{suffix}") or _NOTHING
        bound = spread_of(runs, "times the bound") or _NOTHING
        delta = ""
        if number:
            way = "better" if cycles.median < base.median else "worse"
            # A policy that lets stale translations be used saves nothing.
            if cycles.median == base.median or (way == "better" and verdict in ("violations", "failed")):
                way = ""
            delta = (
                f'<span class="{way}">{escape(change(cycles.median, base.median))}</span> against the first, '
            )
        yield (
            f'<div class="card"><h3>{escape(name)}</h3><span class="chip {verdict}">{verdict}</span>'
            f'<div class="big">{short(cycles.median)}</div><p class="note">modelled cycles of flushing per '
            f"{per}; {delta}{bound.median:.3g} times {NAME}</p></div>"
        )


def _table(comparison: Comparison) -> Iterator[str]:
    columns = comparison.columns
    bound = comparison.bound
    first = columns[0][1][0]
    reference = bound_values(bound, first.values["accesses"], first.values.get("units", 0)) if bound else {}
    heads = "".join(f"<th>{escape(name).replace('+', '<br>+')}</th>" for name, _ in columns)
    yield from _table_head(f'<th></th>{heads}<th class="bound">{NAME}</th>')
    for section in sections((runs for _, runs in columns), comparison.plan.scenario.unit):
        title = f"<span>{escape(section.title)}</span>"
        yield f'<tr class="section"><td colspan="{len(columns) + 2}">{title}</td></tr>'
        for row in section.rows:
            cells = "".join(_cells(row, columns))
            optimal = text_of(row, reference[row.key]) if row.key in reference else ""
            label = escape(row.label.strip())
            indent = "&emsp;" if row.label.startswith(" ") else ""
            head = ' class="head"' if row.head else ""
            yield f'<tr{head}><td>{indent}{label}</td>{cells}<td class="bound">{escape(optimal)}</td></tr>'
    yield "</tbody></table></div>"
    yield (
        f'<p class="note">Percentages compare with the first column. {NAME}: the cost of a policy with '
        "perfect knowledge in the first run of the first column: necessary flushes only, at "
        "the narrowest scope, no refill but of stale entries, no interruption but of a pCPU that had to "
        "flush.</p>"
    )


def _cells(row: Row, columns: Sequence[tuple[str, Sequence[Measurement]]]) -> Iterator[str]:
    base = spread_of(columns[0][1], row.key) or _NOTHING
    refuted = [any(m.result.snapshot.violated for m in runs) for _, runs in columns]
    for number, (_, runs) in enumerate(columns):
        own = spread_of(runs, row.key) or _NOTHING
        text = escape(text_of(row, own.median))
        if row.spread and own.least != own.most:
            text += f" <small>{escape(text_of(row, own.least))} to {escape(text_of(row, own.most))}</small>"
        if number:
            way = _WAYS[better(row, own.median, base.median)]
            if way == _BETTER and refuted[number]:
                way = ""
            text += f' <span class="delta{way}">{escape(change(own.median, base.median))}</span>'
        yield f"<td>{text}</td>"


def _violations(comparison: Comparison) -> Iterator[str]:
    for name, runs in comparison.columns:
        report = next((report for m in runs for report in m.result.reports), None)
        if report is not None:
            yield f"<h2>First violation under {escape(name)}</h2><pre>{escape(report.text)}</pre>"
        for m in runs:
            if m.result.failure:
                yield f"<h2>{escape(name)} failed</h2><pre>{escape(m.result.failure)}</pre>"


def _decisions(comparison: Comparison) -> Iterator[str]:
    """Yield the decision points on which the policies differ."""
    answers = {name: runs[0].result.policy for name, runs in comparison.columns}
    points = [
        point
        for point in next(iter(answers.values()))
        if len({policy.get(point) for policy in answers.values()}) > 1
    ]
    if not points:
        return
    heads = "".join(f"<th>{escape(name)}</th>" for name in answers)
    yield "<h2>Where the policies differ</h2>"
    yield from _table_head(f"<th></th>{heads}", "left")
    for point in points:
        cells = "".join(
            f"<td><code>{escape(policy.get(point, '-'))}</code></td>" for policy in answers.values()
        )
        yield f"<tr><td>{escape(point)}</td>{cells}</tr>"
    yield "</tbody></table></div>"


def _sensitivity(comparison: Comparison) -> Iterator[str]:
    if comparison.plan.sensitivity:
        yield "<h2>Costs and the order of the policies</h2><ul>"
        yield from (f"<li>{escape(text)}</li>" for text in sentences(sensitivity(comparison)))
        yield "</ul>"


def _costs(comparison: Comparison) -> Iterator[str]:
    table = comparison.plan.scenario.cost_table
    yield "<details><summary>The table of costs behind the modelled cycles</summary>"
    yield from _table_head("<th>event</th><th>cycles</th><th>range</th><th>source</th>", "left")
    for item in type(table).model_fields:
        cost = getattr(table, item)
        name = escape(item.replace("_", " "))
        span = f"{cost.least:g} to {cost.most:g}" if cost.range else ""
        yield f"<tr><td>{name}</td><td>{cost.cycles:g}</td><td>{span}</td>"
        yield f"<td>{escape(cost.source)}</td></tr>"
    yield "</tbody></table></div></details>"


def _table_head(cells: str, kind: str = "") -> Iterator[str]:
    yield f'<div class="scroll"><table class="{kind}"><thead><tr>{cells}</tr></thead><tbody>'


def command_line(comparison: Comparison) -> str:
    plan = comparison.plan
    scenario, policies = plan.named or (plan.scenario.name, tuple(policy.name for policy in plan.policies))
    words = ["flushlab", "compare", scenario]
    for policy in policies:
        words += ["--policy", policy]
    words += ["--pcpus", str(plan.scenario.machine.pcpus), "--duration", f"{plan.duration:g}s"]
    words += ["--ept" if plan.scenario.machine.ept else "--no-ept"]
    words += ["--repeat", str(plan.repeat), "--seed", str(plan.seed)]
    if plan.units is not None:
        words += ["--units", str(plan.units)]
    if plan.costs is not None:
        words += ["--costs", str(plan.costs)]
    if plan.sensitivity:
        words.append("--sensitivity")
    if plan.chaos:
        words += ["--chaos", str(plan.chaos)]
    if plan.unbounded:
        words += ["--geometry", "unbounded"]
    return shlex.join(words)
