"""The state before a step of a recording: tasks, requests, TLBs and custody as they are there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from emulator.cli.explore_trace import state_text
from emulator.errors import BadInput
from emulator.explore.engine.scheduler import Divergence
from emulator.explore.results.record import Recording
from emulator.explore.results.replay import Stored
from emulator.explore.results.state import state_before
from emulator.explore.results.trace import Trace, numbered, traced
from emulator.explore.results.verdict import Plan
from emulator.litmus.loader import parse_test
from emulator.litmus.policies import named_policy

SMALL = """
doc = "The host takes a page away between two reads of it."
source = "here"
[threads.v0]
vcpu = 0
ops = ["read 0x10", "wait mm 2", "read 0x10"]
[threads.mm]
ops = ["wait v0 1", "host-unmap 0x10"]
"""


def recorded(policy: str = "linux-7.3", text: str = SMALL) -> Recording:
    found = traced(parse_test(text, "small", None), named_policy(policy), Plan(), numbered(1))
    assert isinstance(found, Trace)
    return found.recording


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    recording, path = recorded(), tmp_path / "trace.json"
    recording.write(path)
    return Stored.load(path)


def after(document: dict[str, Any], event: str) -> int:
    """Return the step behind the last one with an event of this kind."""
    told = [step["n"] for step in document["steps"] if any(one["kind"] == event for one in step["events"])]
    return int(told[-1]) + 1


def one(state: dict[str, Any], key: str) -> dict[str, Any]:
    (found,) = state[key]
    assert isinstance(found, dict)
    return found


def task(state: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [task for task in state["tasks"] if task["name"] == name]
    assert isinstance(found, dict)
    return found


def test_at_the_beginning_nothing_is_there(stored: Stored) -> None:
    state = state_before(stored, 0)
    assert (state["step"], state["steps"]) == (0, len(stored.document["steps"]))
    assert state["next"] == stored.document["steps"][0]["text"]
    assert task(state, "v0")["operation"] == {"n": 1, "of": 3, "text": "read 0x10"}
    mm = task(state, "mm")
    assert (mm["can_go_on"], mm["waits_for"]) == (False, "operation 1 of v0")
    assert [tlb["entries"] for tlb in state["tlbs"]] == [[], []]
    assert state["rights"] == []


def test_behind_the_zap_the_entry_may_still_be_used(stored: Stored) -> None:
    state = state_before(stored, after(stored.document, "zap"))
    (entry,) = state["tlbs"][0]["entries"]
    assert entry["page"] == 0x10
    assert entry["now"] == "zapped, not promised to be gone: a use is allowed"
    assert one(state, "vcpus")["mode"] == "IN_GUEST_MODE"
    assert one(state, "vcpus")["requests"] == []
    assert task(state, "mm")["function"]
    lock = one(state, "locks")
    assert (lock["held_by"], lock["for"]) == (["mm"], "write")
    requested = state_before(stored, after(stored.document, "request"))
    assert one(requested, "vcpus")["requests"] == ["KVM_REQ_TLB_FLUSH"]


def test_an_ipi_on_its_way_is_a_task_and_its_sender_waits(stored: Stored) -> None:
    state = state_before(stored, after(stored.document, "ipi"))
    assert task(state, "irq0")["can_go_on"]
    assert task(state, "mm")["waits_for"] == "an acknowledgement by pCPU 0"
    assert task(state, "mm")["function"] == "kvm_kick_many_cpus"


def test_behind_the_promise_a_use_would_be_a_violation(tmp_path: Path) -> None:
    recording, path = recorded("notifier_flush=none"), tmp_path / "bad.json"
    assert recording.verdict == "violations"
    recording.write(path)
    state = state_before(Stored.load(path), len(recording.steps) - 1)
    (entry,) = state["tlbs"][0]["entries"]
    assert entry["now"] == "revoked: a use would be a violation"
    right = one(state, "rights")
    assert (right["gfn"], right["now"]) == (0x10, "revoked: a use would be a violation")
    assert not right["host_has_it"]


@pytest.mark.slow
def test_every_step_has_a_state_that_fits_a_terminal(stored: Stored) -> None:
    for step in stored.document["steps"]:
        state = state_before(stored, step["n"])
        assert (state["thread"], state["next"]) == (step["thread"], step["text"])
        assert task(state, step["thread"])["next"] == step["text"]
        assert task(state, step["thread"])["can_go_on"]
        text = state_text(state)
        assert max(map(len, text.splitlines())) <= 80
        assert f"before step {step['n']} of " in text


def test_a_step_that_does_not_exist(stored: Stored) -> None:
    last = len(stored.document["steps"]) - 1
    with pytest.raises(BadInput, match=f"--stop-at: found {last + 1}; expected 0 to {last}"):
        state_before(stored, last + 1)


def test_a_recording_without_steps_has_no_state(tmp_path: Path) -> None:
    """The violation is in init."""
    init = 'init = ["v0: read 0x10", "mm: host-unmap 0x10", "v0: read 0x10"]\n[threads.v0]'
    recording = recorded("notifier_flush=none", SMALL.replace("[threads.v0]", init))
    assert (recording.verdict, recording.steps) == ("violations", [])
    recording.write(tmp_path / "init.json")
    with pytest.raises(BadInput, match=r"--stop-at: found 0; expected a step in .*, which has none"):
        state_before(Stored.load(tmp_path / "init.json"), 0)


def test_what_has_changed_since_is_no_state_of_the_recording(stored: Stored) -> None:
    stored.document["steps"][3]["text"] = "another"
    state_before(stored, 3)
    with pytest.raises(Divergence, match="step 3 of v0: text is"):
        state_before(stored, 4)
