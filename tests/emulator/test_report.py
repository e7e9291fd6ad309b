"""The summary and the document of a result."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from rich.console import Console, RenderableType

from emulator.report.result import Histogram
from emulator.report.summary import (
    document,
    duration_text,
    exit_status,
    progress_line,
    short,
    summary,
    totals,
)
from emulator.scenario.costs import load_costs, modelled_cycles
from native import COUNTER_NAMES, HISTOGRAM_NAMES, VM_STAT_NAMES
from tests.emulator.canned import result, snapshot, violated


def rendered(renderable: RenderableType) -> str:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(renderable)
    return console.export_text()


def test_summary_has_everything_that_was_asked_for() -> None:
    text = rendered(summary(result()))
    for words in (
        "guest accesses",
        "TLB hits, first level",
        "invept global",
        "migration",
        "IPIs",
        "vcpu pause",
        "averted uses",
        "modelled cycles",
        "remote_tlb_flush_requests",
        "clean",
        "seed 1",
    ):
        assert words in text


def test_summary_of_violations() -> None:
    text = rendered(summary(violated()))
    assert "VIOLATIONS: use-after-free 5" in text
    # Brackets of a report are no markup.
    assert "use-after-free: [bold] vCPU 0" in text
    assert "4 not shown" in text


def test_tags_that_went_round_are_told() -> None:
    assert "went round" not in rendered(summary(result()))
    text = " ".join(rendered(summary(result(tag_rounds=3))).split())
    assert "tags went round 3 times: a use of a translation that is exactly 32,768 changes" in text
    assert document(result(tag_rounds=3))["custody_tag_rounds"] == 3


def test_a_failed_run_proves_nothing() -> None:
    failed = result(failure="PCpu 1 died")
    assert failed.verdict == "inconclusive"
    assert exit_status(failed) == 3
    assert "PCpu 1 died" in rendered(summary(failed))


def test_verdicts() -> None:
    assert result().verdict == "clean"
    assert violated().verdict == "violations"
    assert result(snapshot(flushes=())).verdict == "inconclusive"


def test_summary_of_a_run_without_anything() -> None:
    empty = snapshot(
        elapsed=0.0,
        counters=dict.fromkeys(COUNTER_NAMES, 0),
        vms=(),
        flushes=(),
        histograms={name: Histogram((0,) * 36, 0) for name in HISTOGRAM_NAMES},
    )
    assert "inconclusive" in rendered(summary(result(empty)))
    json.dumps(document(result(empty)), allow_nan=False)


def test_document_survives_json_and_agrees_with_the_result() -> None:
    whole = json.loads(json.dumps(document(violated()), allow_nan=False))
    assert whole["verdict"] == "violations"
    assert whole["exit_status"] == 1
    assert whole["policy"]["decisions"]["migration"] == "all-contexts"
    assert whole["reports"][0]["kind"] == "use-after-free"
    assert set(whole["counters"]) == set(COUNTER_NAMES)
    assert set(whole["histograms"]) == set(HISTOGRAM_NAMES)
    assert whole["cycles"]["flush"] == pytest.approx(
        sum(line["cycles"] for line in whole["cycles"]["lines"] if line["group"] == "flush")
    )
    assert whole["totals"]["flushes"] == 170
    assert whole["totals"]["necessary_flushes"] == 8


def test_progress_shows_rates() -> None:
    now = snapshot()
    later = replace(now, elapsed=3.0, counters={k: v + 2_000_000 for k, v in now.counters.items()})
    line = progress_line(now, later, 30.0).plain
    assert "3s/30s" in line
    assert "1M accesses/s" in line
    assert progress_line(None, None, None).plain == "booting"
    assert progress_line(now, replace(now), 30.0).plain


def test_percentiles_are_upper_bounds() -> None:
    histogram = Histogram((0, 0, 90, 0, 9, 1, 0), 500)
    assert histogram.count == 100
    assert histogram.percentile(50) == 4e-9
    assert histogram.percentile(90) == 4e-9
    assert histogram.percentile(99) == 16e-9
    assert histogram.longest == 32e-9
    assert histogram.mean == 5e-9
    assert Histogram((0,) * 7, 0).percentile(99) == 0.0


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1k"), (12345, "12.3k"), (1234567, "1.23M"), (5e12, "5T")],
)
def test_short(number: float, text: str) -> None:
    assert short(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 ns"), (1.28e-7, "128 ns"), (1.5e-5, "15 us"), (0.25, "250 ms"), (3, "3 s")]
)
def test_duration_text(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_each_event_is_charged_once() -> None:
    counters = dict.fromkeys(COUNTER_NAMES, 0) | {
        "vm_entries": 100,
        "no_vpid_exits": 7,
        "interruptions": 30,
        "csd_queued": 50,
        "ipis_sent": 40,
        "ipis_received": 40,
        "ipis_vmclear": 15,
        "interruptions_vmclear": 5,
        "walk_references": 1000,
        "l2_misses": 100,
        "l1_misses": 300,
        "refills": 10,
    }
    vm = dict.fromkeys(VM_STAT_NAMES, 0)
    lines = {line.item: line for line in modelled_cycles(load_costs(), counters, [vm], [])}
    assert lines["guests interrupted"].events == 25
    assert lines["guests interrupted"].events + lines["other exits"].events == 100
    assert [lines[f"IPIs {what}"].events for what in ("sent", "received", "for VMCLEAR")] == [25, 25, 15]
    assert lines["exits without a VPID"].events == 7
    assert lines["refill walk references"].events == 100
    assert lines["refill walk references"].events + lines["other walk references"].events == 1000
    assert lines["calls that rode along"].events == 10
    assert lines["second-level hits"].events == 200
    assert {line.group for line in lines.values()} == {"flush", "work"}


def test_totals_are_whole_numbers() -> None:
    assert all(isinstance(value, int) for value in totals(snapshot()).values())


def test_a_thousand_vms_do_not_get_a_column_each() -> None:
    one = snapshot().vms[0]
    many = result(snapshot(vms=(one,) * 1000))
    text = rendered(summary(many))
    assert "per VM: the first 8 of 1,000" in text
    assert "VM 7" in text
    assert "VM 8" not in text
    assert len(document(many)["vms"]) == 1000
