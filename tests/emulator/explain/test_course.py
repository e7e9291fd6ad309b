"""The course of an execution: each row where it belongs, on a terminal's lines, from any recording."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emulator.cli.main import main
from emulator.explain.course import GUEST_VERBS, course_of
from emulator.explain.dangers import DANGERS
from emulator.explain.diagram import diagram
from emulator.explain.document import course_case, load_cases
from emulator.explain.explanation import as_dict, explain
from emulator.explain.svg import svg
from emulator.litmus.guest_ops import GUEST_OPS
from emulator.litmus.model import Need
from native import FLUSH_REASONS, FLUSH_SCOPES
from tests.damaged import damage


def step(n: int, thread: str, cpu: int, kind: str, obj: str = "", **more: Any) -> dict[str, Any]:
    text = f"{kind} {obj}".strip()
    return {"n": n, "thread": thread, "cpu": cpu, "kind": kind, "object": obj, "text": text, **more}


def entry(cpu: int, page: int, frame: int) -> dict[str, Any]:
    return {
        "cpu": cpu,
        "page": page,
        "size": "4K",
        "kind": "guest-physical",
        "gfn": page,
        "frame": frame,
        "ep4ta": 1,
    }


READ = {"n": 1, "text": "read 0x10"}
UNMAP = {"n": 1, "text": "host-unmap 0x10"}
SCOPE = FLUSH_SCOPES.index("invept_global") << 32 | FLUSH_REASONS.index("migration")
FLUSH = {"kind": "flush", "cpu": 0, "vm": 0, "a": SCOPE, "b": 0, "more": 0, "text": "a flush"}
ZAP = {"kind": "zap", "cpu": 3, "vm": 0, "a": 0x10, "b": 1, "more": 1, "text": "zapped"}
STEPS = [
    step(0, "mm", 3, "mmu_lock", "0", did={"op": UNMAP}, events=[]),
    step(1, "mm", 3, "sptes", did={"op": UNMAP}, events=[ZAP]),
    step(2, "v0", 0, "requests", "0", did={"op": READ, "dropped": [entry(0, 0x10, 0x109)]}, events=[FLUSH]),
    step(
        3,
        "v0",
        0,
        "read",
        "0 16",
        did={
            "op": READ,
            "access": {"completed": False, "tlb": "miss", "exit": "ept_violation"},
            "dangers": {"averted": 1},
        },
    ),
    step(
        4,
        "v0",
        0,
        "read",
        "0 16",
        did={
            "op": READ,
            "done": [READ],
            "access": {"completed": True, "tlb": "miss", "frame": 0x10A},
            "filled": [entry(0, 0x10, 0x10A)],
        },
    ),
    step(5, "mm", 3, "acknowledgement", "0", did={"op": UNMAP, "done": [UNMAP]}, events=[]),
]
TRACE = {
    "init": ["v0: read 0x10"],
    "threads": {"v0": {"vcpu": 0, "home": 2}, "mm": {"vcpu": None, "home": 3}},
    "tlbs": [entry(0, 0x10, 0x109)],
    "final": [{"thread": "v0", "cpu": 0, "ops": ["read 0x10"], "events": []}],
    "tlbs_at_end": [entry(0, 0x10, 0x10A)],
    "needs": ["averted"],
    "evidence": {"averted": 1},
    "ended": "all operations are done",
}


def document(**other: Any) -> dict[str, Any]:
    whole: dict[str, Any] = {
        "format": 1,
        "test": "small",
        "policy": "linux-7.3",
        "schedule": [one["thread"] for one in STEPS],
        "actors": {"0": "pcpu0", "2": "v0", "3": "mm"},
        "steps": STEPS,
        "violation": None,
        "verdict": "safe",
        "trace": TRACE,
    }
    return {**whole, **other}


def test_rows_are_those_of_the_steps() -> None:
    drawn = diagram(explain(course_case(document())))
    assert drawn == (
        "small under linux-7.3: no violation in this execution of 6 steps\n"
        "init: v0: read 0x10\n"
        "TLB of CPU0 before: gfn 0x10 to frame 0x109\n"
        "\n"
        "step  CPU0                    mm\n"
        "----  ----                    --\n"
        "   0                          host-unmap 0x10\n"
        "   1                          zap gfn 0x10\n"
        "   2  INVEPT global\n"
        "        for migration\n"
        "        drops page 0x10\n"
        "   3  v0: read 0x10\n"
        "        TLB miss, EPT violation [1]\n"
        "   4  v0: read 0x10\n"
        "        TLB miss, filled: frame 0x10a\n"
        "   5                          acknowledged by CPU0\n"
        "                              host-unmap 0x10: done\n"
        "      final: v0: read 0x10\n"
        "\n"
        "[1] averted: a flush had removed the entry that this access would have used\n"
        "    wrongly (the test needs it)\n"
        "TLB of CPU0 after: gfn 0x10 to frame 0x10a\n"
        "ended: all operations are done\n"
        "precondition (averted): met at step 3\n"
    )


def test_every_step_has_a_row_on_demand() -> None:
    some, every = (course_of(document(), every_step=every).lines for every in (False, True))
    assert {line.step for line in every} >= set(range(len(STEPS)))
    assert next(line for line in every if line.step == 0).text == ("host-unmap 0x10",)
    assert len(some) <= len(every)


def test_rows_that_are_alike_are_one() -> None:
    again = [{**STEPS[1], "n": n} for n in range(1, 60)]
    course = course_of(document(steps=[STEPS[0], *again]))
    zaps = [line.text for line in course.lines if line.text[0].startswith("zap")]
    assert zaps == [("zap gfn 0x10", "59 times, to step 59")]


@pytest.mark.parametrize("cpus", [1, 3, 8, 40])
def test_lines_fit_a_terminal(cpus: int) -> None:
    steps = [{**STEPS[1], "n": n, "events": [{**ZAP, "cpu": n}]} for n in range(cpus)]
    actors = {str(n): f"pcpu{n}" for n in range(cpus)}
    drawn = diagram(explain(course_case(document(steps=steps, actors=actors))))
    assert max(map(len, drawn.splitlines())) <= 80
    assert all(f"CPU{n}" in drawn for n in range(cpus))
    assert drawn.count("zap gfn 0x10") == cpus


def test_a_precondition_that_is_not_met_says_so() -> None:
    steps = [{**one, "did": {**one["did"], "dangers": {}}} for one in STEPS]
    course = course_of(document(steps=steps, trace={**TRACE, "evidence": {}}))
    assert any("(averted): not met" in line for line in course.closing)
    violation = {"kind": "use-after-free", "text": "the report"}
    cut = course_of(document(steps=steps, trace={**TRACE, "evidence": {}}, violation=violation))
    assert not [line for line in cut.closing if line.startswith("precondition")]
    nothing = course_of(document(trace={**TRACE, "needs": ["nothing"]}))
    assert not [line for line in nothing.closing if line.startswith("precondition")]


def test_a_violation_is_marked_where_it_ends() -> None:
    violation = {"kind": "use-after-free", "kinds": ["use-after-free"], "text": "the report"}
    explanation = explain(
        course_case(document(violation=violation, verdict="violations", trace={**TRACE, "final": []}))
    )
    assert explanation.rows[-1].mark
    assert explanation.notes[-1].text == "use-after-free"
    assert "use-after-free in this execution" in explanation.title


def test_every_danger_has_its_sentence() -> None:
    assert set(DANGERS) == set(get_args(Need)) - {"nothing"}


def test_all_forms_draw_a_recording_without_violation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "safe.json"
    path.write_text(json.dumps(document()))
    (case,) = load_cases(path)
    said = as_dict(explain(case))
    assert said["moments"][0]["step"] == 0
    assert said["closing"][-1] == "precondition (averted): met at step 3"
    picture = svg(explain(case))
    assert "TLB miss, EPT violation" in picture
    assert "precondition (averted): met at step 3" in picture
    for form in ("text", "svg", "json", "perfetto"):
        assert main(["explain", str(path), "--format", form]) == 0
        assert "host-unmap 0x10" in capsys.readouterr().out


def test_guests_operations_have_their_row_where_they_are_executed() -> None:
    assert {op.verb for op in GUEST_OPS} | {"wait"} == GUEST_VERBS


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_operation_without_a_word(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.json"
    nameless = {**STEPS[0], "did": {"op": {"n": 1, "text": text}}}
    path.write_text(json.dumps(document(steps=[nameless, *STEPS[1:]])))
    assert main(["explain", str(path)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "steps[0].did.op.text: found" in err


@pytest.mark.slow
@pytest.mark.parametrize("form", ["text", "svg", "json", "perfetto"])
@settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_no_damage_ends_in_a_traceback(data: st.DataObject, form: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(damage(document(), data)))
    said = io.StringIO()
    with redirect_stderr(said), redirect_stdout(io.StringIO()):
        status = main(["explain", str(path), "--format", form])
    assert status in (0, 2)
    assert said.getvalue().count("\n") == (status == 2), said.getvalue()
