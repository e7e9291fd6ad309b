"""Traces: the very execution of the search that was asked for, with all that it did."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from emulator.errors import BadInput
from emulator.explain.course import OPERATION, course_of
from emulator.explore.engine.scheduler import Divergence, Execution
from emulator.explore.machine.program import LitmusProgram
from emulator.explore.results.record import Recording
from emulator.explore.results.replay import replay
from emulator.explore.results.trace import Goal, Trace, goal_of, numbered, traced
from emulator.explore.results.verdict import Plan, Verdict, explore_verdict
from emulator.litmus.loader import load_test, parse_test
from emulator.litmus.model import LitmusTest
from emulator.litmus.policies import named_policy
from tests.emulator.small_race import IN_ORDER, RACE

BLOCKED = """
doc = "A lock that is never given back."
source = "here"
[threads.a]
ops = ["notifier-start 0x10", "wait b 1", "notifier-end 0x10"]
[threads.b]
ops = ["slot-delete"]
"""
# No root page is left for the vCPU's root in SMM.
FAILS = """
doc = "A machine with too few pages for roots."
source = "here"
init = ["v0: read 0x10", "v1: read 0x10"]
[machine]
root_frames = 2
[[vm]]
vcpus = 2
tdp_levels = [4, 5]
smm_slots = true
[threads.v0]
vcpu = 0
ops = ["smi", "read 0x10"]
[threads.v1]
vcpu = 1
"""


def small(text: str = IN_ORDER) -> LitmusTest:
    return parse_test(text, "small", None)


def found(test: LitmusTest, goal: Goal, policy: str = "linux-7.3", **plan: Any) -> Recording:
    result = traced(test, named_policy(policy), Plan(**plan), goal)
    assert isinstance(result, Trace)
    return result.recording


def rows(recording: Recording, *kinds: str) -> list[tuple[int, tuple[str, ...]]]:
    return [
        (line.cpu, line.text) for line in course_of(recording.document()).lines if line.event.kind in kinds
    ]


def test_a_small_test_does_its_operations_in_order() -> None:
    recording = found(small(), numbered(1))
    mm = next(int(cpu) for cpu, name in recording.actors.items() if name == "mm")
    frame = recording.trace and recording.trace["tlbs_at_end"][0]["frame"]
    assert rows(recording, OPERATION) == [
        (0, ("v0: read 0x10", "TLB miss, EPT violation")),
        (0, ("v0: read 0x10", f"TLB miss, filled: frame {frame:#x}")),
        (0, ("v0: read 0x10", f"TLB hit: frame {frame:#x}")),
        (mm, ("wait v0 2",)),
        (mm, ("host-unmap 0x10",)),
        (0, ("v0: wait mm 2", "interrupted")),
        (mm, ("host-unmap 0x10: done",)),
        (0, ("v0: wait mm 2",)),
        (0, ("v0: read 0x10", "TLB miss, EPT violation")),
        (0, ("v0: read 0x10", f"TLB miss, filled: frame {frame:#x}")),
    ]
    assert recording.verdict == "safe"
    assert recording.violation is None
    assert recording.trace is not None
    assert recording.trace["met"]
    assert recording.trace["ended"] == "all operations are done"


def test_events_stand_where_they_belong() -> None:
    recording = found(small(), numbered(1))
    told = [
        text[0] for _, text in rows(recording, OPERATION, "zap", "request", "ipi", "flush", "promise", "free")
    ]
    zap = told.index("zap gfn 0x10")
    assert told[zap - 1 : zap + 3] == [
        "host-unmap 0x10",
        "zap gfn 0x10",
        "KVM_REQ_TLB_FLUSH to v0",
        "kick: IPI to CPU0",
    ]
    promise = told.index("invalidate_range_start()")
    assert told[zap:promise].count("INVEPT global") == 1
    assert told[promise + 1].endswith("is freed")
    (flush,) = [text for _, text in rows(recording, "flush") if "for remote notifier" in text]
    assert flush[-1] == "drops page 0x10"


class _Counted(LitmusProgram):
    """Keeps the schedule of each execution that ends."""

    def __init__(self, into: list[tuple[str, ...]], *args: Any, **options: Any) -> None:
        self.into = into
        super().__init__(*args, **options)

    def finish(self, execution: Execution) -> str:
        outcome = super().finish(execution)
        schedule = execution.strategy.schedule()  # type: ignore[attr-defined]
        self.into.append(tuple(execution.tasks[index].name for index in schedule))
        return outcome


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["exhaustive", "pct", "random"])
def test_a_number_is_that_of_the_search(strategy: str) -> None:
    test, plan = small(RACE), Plan(strategy, executions=400)
    schedules: list[tuple[str, ...]] = []
    verdict = explore_verdict(test, named_policy("linux-7.3"), plan, build=partial(_Counted, schedules))
    assert len(schedules) == verdict.executions
    assert len(set(schedules)) > 3
    # The probes, the search as a whole, and its parts.
    for number in {1, 61, 300, verdict.executions}:
        if number > verdict.executions:
            continue
        recording = found(test, numbered(number), strategy=strategy, executions=400)
        assert tuple(recording.schedule) == schedules[number - 1], number


@pytest.mark.slow
def test_no_number_is_beyond_the_search() -> None:
    plan, policy = Plan(executions=700), named_policy("linux-7.3")
    verdict = explore_verdict(small(RACE), policy, plan)
    result = traced(small(RACE), policy, plan, numbered(verdict.executions + 1))
    assert isinstance(result, Verdict)
    assert (result.executions, result.verdict) == (verdict.executions, verdict.verdict)


def test_the_violation_of_a_search_is_its_last_execution() -> None:
    test, policy, plan = load_test("fault-races-unmap"), named_policy("mutant:P15"), Plan()
    verdict = explore_verdict(test, policy, plan)
    assert verdict.counterexample is not None
    last = found(test, numbered(verdict.executions), "mutant:P15")
    assert last.verdict == "violations"
    assert set(last.kinds) == set(verdict.kinds)
    assert verdict.executions > 1
    assert found(test, numbered(verdict.executions - 1), "mutant:P15").verdict == "safe"
    assert isinstance(traced(test, policy, plan, numbered(verdict.executions + 1)), Verdict)


@pytest.mark.parametrize("goal", ["needs", "retries"])
def test_a_window_is_reached(goal: str) -> None:
    test = load_test("fault-races-unmap")
    first = found(test, numbered(1))
    assert first.trace is not None
    assert not first.trace["met"]
    reached = found(test, goal_of(test, goal))
    assert reached.trace is not None
    assert reached.trace["met"]
    assert reached.trace["evidence"]["retries"]
    marked = [line for line in course_of(reached.document()).lines if line.danger == "retries"]
    assert [line.text for line in marked] == [("the fault is retried",)] * len(marked)
    assert marked


def test_an_operation_is_reached() -> None:
    test = load_test("fault-races-unmap")
    assert found(test, goal_of(test, "mm: host-unmap 16")).verdict == "safe"
    assert found(test, goal_of(test, "mm host-unmap 0x10")).verdict == "safe"
    assert found(test, goal_of(test, "mm 1")).verdict == "safe"


def test_an_operation_behind_the_violation_is_not_reached() -> None:
    """Under this policy every execution ends with the stale read, before the operation behind it."""
    test = small(IN_ORDER.replace('"read 0x10"]', '"read 0x10", "write 0x12"]'))
    result = traced(test, named_policy("notifier_flush=none"), Plan(), goal_of(test, "v0: write 0x12"))
    assert isinstance(result, Verdict)
    assert result.counterexample is not None
    assert isinstance(traced(test, named_policy("linux-7.3"), Plan(), goal_of(test, "v0 5")), Trace)


def test_a_danger_that_cannot_arise_is_not_reached() -> None:
    result = traced(small(), named_policy("linux-7.3"), Plan(), goal_of(small(), "slot-retries"))
    assert isinstance(result, Verdict)
    assert result.complete


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("retrie", "did you mean retries?"),
        ("v1: read 0x10", "did you mean v0: read 0x10?"),
        ("v0: raed 0x10", "did you mean v0: read 0x10?"),
        ("v0: read 0x11", "did you mean v0: read 0x10?"),
        ("v0: host-unmap 0x10", "one of v0: read 0x10"),
        ("v0 5", "a number from 1 to 4"),
        ("v0 0", "a number from 1 to 4"),
        ("v0 " + "9" * 5000, "a number from 1 to 4"),
        ("v0", "one of v0: read 0x10"),
        ("", "one of needs"),
        ("nothing", "one of needs"),
    ],
)
def test_goals_that_do_not_exist(text: str, words: str) -> None:
    with pytest.raises(BadInput) as error:
        goal_of(small(), text)
    assert str(error.value).startswith("--reach: ")
    assert words in str(error.value)


def test_the_last_of_equal_operations_is_meant() -> None:
    assert goal_of(small(), "v0: read 0x10").text == "v0: read 0x10 (operation 4)"
    assert goal_of(small(), "v0 2").text == "v0: read 0x10 (operation 2)"


def test_what_blocks_for_ever_says_where() -> None:
    recording = found(small(BLOCKED), numbered(1), executions=50)
    assert recording.verdict == "violations"
    assert recording.kinds == ("deadlock",)
    assert recording.trace is not None
    assert recording.trace["ended"].startswith("blocked for ever: ")
    assert "wait" in recording.trace["ended"]


def test_what_cannot_go_on_is_traced_up_to_there() -> None:
    recording = found(small(FAILS), numbered(1))
    assert recording.verdict == "failed"
    assert recording.trace is not None
    assert recording.trace["ended"].startswith("it cannot go on: v0: no-memory at 0x0 in 'read 0x10'")
    assert rows(recording, OPERATION)[0][1] == ("v0: smi",)


def test_a_failure_in_final_is_traced_up_to_there() -> None:
    final = 'final = ["mm: host-protect 1", "v0: write 1"]\n[threads.v0]'
    recording = found(small(IN_ORDER.replace("[threads.v0]", final)), numbered(1))
    assert recording.verdict == "failed"
    assert recording.trace is not None
    assert (
        recording.trace["ended"] == "it cannot go on: v0: 'write 1' is refused for ever: no other thread runs"
    )
    assert rows(recording, OPERATION)[-1][1] == ("final: mm: host-protect 1",)


def test_a_trace_is_replayed_from_its_file(tmp_path: Path) -> None:
    test = load_test("fault-races-unmap")
    recording, path = found(test, goal_of(test, "needs")), tmp_path / "trace.json"
    recording.write(path)
    again = replay(path)
    assert again.document() == recording.document()
    document = recording.document()
    for other, words in (
        ({"steps": [{**document["steps"][0], "did": {}}, *document["steps"][1:]]}, "did is"),
        ({"trace": {**document["trace"], "met": False}}, "trace differs from the recording"),
        ({"verdict": "violations"}, "verdict differs from the recording"),
    ):
        path.write_text(json.dumps({**document, **other}))
        with pytest.raises(Divergence, match=words):
            replay(path)


def test_a_store_and_an_invalidation_are_told_once() -> None:
    ops = '"map 0x100 0x10", "write 0x100", "write 0x100", "invlpg 0x100", "read 0x100"'
    text = f"""
        doc = "d"
        source = "s"
        [[vm]]
        paging = true
        [threads.v0]
        vcpu = 0
        ops = [{ops}]
        [threads.k]
        ops = ["log-arm"]
    """
    recording = found(small(text), numbered(1))
    events = [event["kind"] for step in recording.steps for event in step["events"]]
    assert {"store", "guest_invalidate"} <= set(events)
    assert not rows(recording, "store", "guest_invalidate")
    told = [text for _, text in rows(recording, OPERATION)]
    assert ("v0: invlpg 0x100", "drops page 0x100") in told
    assert [text[0] for text in told if text[0] == "v0: write 0x100"]


def test_the_guest_is_left_before_the_next_operation_begins() -> None:
    test = small(IN_ORDER.replace('"wait mm 2"', '"wait mm 2", "migrate 1"'))
    told = [text[0] for _, text in rows(found(test, numbered(1)), OPERATION, "exit", "load")]
    moves = told.index("v0: migrate 1")
    assert told[moves - 1] == "VM exit (program end)"
    assert told[moves + 1] == "vmx_vcpu_load_vmcs(v0)"


def test_observation_changes_nothing() -> None:
    """A trace has the steps of the same execution without it."""
    test, policy = load_test("return-zap"), named_policy("migration=none")
    verdict = explore_verdict(test, policy, Plan(minimize=False))
    assert verdict.counterexample is not None
    recording = found(test, numbered(verdict.executions), "migration=none")
    steps = [{key: step[key] for key in step if key != "did"} for step in recording.steps]
    assert steps == verdict.counterexample.steps
    assert recording.violation == verdict.counterexample.violation
