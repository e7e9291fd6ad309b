"""An event is told as its own operation's: a request, and a zap, which a report may lack."""

from __future__ import annotations

import json
from pathlib import Path

from emulator.explain.document import load_cases
from emulator.explain.meanings import EARLY, ELIDED, LATE, SKIPPED
from emulator.explore.results.verdict import Plan, explore_verdict
from emulator.litmus.loader import parse_test
from emulator.policy import preset
from tests.emulator.explain.race import GFN, HOST, Race, analysis, flushed_mask

# The page 0x20 is write-protected; then 0x10, which the host permits only to read, is used, and goes.
TEST = """
doc = "Two operations of the host."
source = "leaf_spte_change_needs_tlb_flush()"
init = ["v0: write 0x10", "v0: write 0x20", "mm: host-protect 0x10", "v0: read 0x10"]

[threads.v0]
vcpu = 0
ops = ["wait mm 1", "read 0x10", "wait mm 3", "read 0x10"]

[threads.mm]
ops = ["host-protect 0x20", "wait v0 2", "host-unmap 0x10"]

[expect]
needs = ["nothing"]
"""


def test_the_flush_of_another_operation_is_not_blamed(tmp_path: Path) -> None:
    test = parse_test(TEST, "two-operations", None)
    found = explore_verdict(test, preset("mutant:zap-flushes-writable-only"), Plan(executions=1))
    assert found.counterexample is not None
    path = tmp_path / "found.json"
    path.write_text(json.dumps(found.counterexample.document()))
    (case,) = load_cases(path)
    assert case.analysis.culprit is None
    assert case.analysis.moment(EARLY) is None
    # Without the other page's events the request would seem to be the zap's.
    events = [event for event in case.report["events"] if event["kind"] in ("zap", "protect", "promise")]
    assert any(event["a"] == 0x20 or event["b"] == 0x20 for event in events)


def test_no_zap_is_called_missing_that_is_recorded_or_may_be_lost() -> None:
    """The fault that installed the page again may not have written its event yet."""
    found = analysis(flushed_mask(), live_sptes=1)
    assert found.culprit is not None
    assert found.culprit.meaning == ELIDED
    lost = Race().enter(0, 100).add("lost", HOST, 70).leave(0, 160).promise(HOST).flush(0).enter(0, 160)
    assert analysis(lost, live_sptes=1).moment(SKIPPED) is None
    before = Race().add("lost", HOST, 70).enter(0, 100).leave(0, 160).promise(HOST).flush(0).enter(0, 160)
    assert analysis(before, live_sptes=1).moment(SKIPPED) is not None


def test_a_flush_after_the_promise_about_another_page() -> None:
    late = Race().enter(0, 100).zap(HOST).promise(HOST).request(HOST)
    assert analysis(late).moment(LATE) is not None
    other = Race().enter(0, 100).zap(HOST).promise(HOST).zap(HOST, GFN + 99).request(HOST)
    assert analysis(other).moment(LATE) is None
