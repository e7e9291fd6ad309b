"""The diagram as text: its look, and that it fits into a commit message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emulator.explain.diagram import WIDTH, diagram
from emulator.explain.document import Case, load_cases
from emulator.explain.events import EVENT_KINDS, Event
from emulator.explain.explanation import Explanation, explain
from emulator.explain.facts import Facts
from native import VIOLATION_KINDS
from tests.emulator.explain.race import GFN, HOST, KVM, PAGE, VCPU, Race, flushed_mask

MASK = """\
use-after-free, stale-after-revoke under lkml-2025-cpu-flushed-mask
(migration-storm), VM 0

CPU0                    CPU1                    host0
----                    ----                    -----
vcpu_enter_guest(v1)
v1 uses gfn 0x105
  TLB entry is filled [1]
                        vmx_vcpu_load_vmcs(v1)
                                                zap gfn 0x105 [2]
                                                KVM_REQ_TLB_FLUSH to v1
                                                kick: IPI to CPU1
                                                invalidate_range_start()
                                                  returns
                        INVEPT global
                                                frame 0xb34 is freed
vmx_vcpu_load_vmcs(v1)
flush for migration
  ELIDED [3]
vcpu_enter_guest(v1)
v1 reads gfn 0x105
  by the stale entry [4]

[1] the entry that goes stale: 4K combined, page 0x5e39 to frame 0xb34,
    VPID 2, PCID 1, EP4TA 0x2
[2] the translation goes; v1 is on CPU1
[3] the flush that was elided (migration=cpu-flushed-mask)
[4] the access that uses the stale entry 12 us later: use-after-free,
    stale-after-revoke
"""

NOTIFIER = """\
use-after-free under linux-7.3+notifier_flush=none (main), VM 0

CPU0                                host0
----                                -----
vcpu_enter_guest(v1)
v1 uses gfn 0x105
  TLB entry is filled [1]
                                    zap gfn 0x105 [2]
                                    flush for remote_notifier
                                      ELIDED [3]
                                    invalidate_range_start()
                                      returns
                                    frame 0xb34 is freed
v1 reads gfn 0x105
  by the stale entry [4]

[1] the entry that goes stale: 4K combined, page 0x5e39 to frame 0xb34,
    VPID 2, PCID 1, EP4TA 0x2
[2] the translation goes
[3] the flush that was elided (decision notifier_flush)
[4] the access that uses the stale entry 4 us later: use-after-free
"""


def explained(race: Race, policy: str, where: str = "main", timed: bool = True, **report: Any) -> Explanation:
    whole = race.report(**report)
    names = {int(cpu): name for cpu, name in whole["actors"].items()}
    return explain(Case(where, policy, whole, Facts.of_report(whole), tuple(race.events), names, timed))


def mask() -> Explanation:
    return explained(
        flushed_mask(),
        "lkml-2025-cpu-flushed-mask",
        "migration-storm",
        kinds=("use-after-free", "stale-after-revoke"),
        unsafe_answers=["migration=cpu-flushed-mask"],
    )


def test_the_flushed_mask() -> None:
    assert diagram(mask()) == MASK


def test_a_notifier() -> None:
    race = Race().enter(0, 100).zap(HOST).elided(HOST, "remote_notifier").promise(HOST).free(HOST)
    assert diagram(explained(race, "linux-7.3+notifier_flush=none")) == NOTIFIER


def test_times_are_a_column() -> None:
    lines = diagram(mask(), times=True).splitlines()
    assert lines[3].startswith("            CPU0")
    assert lines[5].startswith("-17.0us     vcpu_enter_guest(v1)")
    assert any(line.startswith("+0.0us      v1 reads gfn 0x105") for line in lines)
    assert max(map(len, lines)) <= WIDTH


@pytest.mark.parametrize("width", [None, 68, 80])
def test_with_times_all_words_are_whole(width: int | None) -> None:
    words = set(diagram(mask(), width=400).split())
    assert "invalidate_range_start()" in words
    narrow = diagram(mask(), width=width, times=True)
    assert {word for word in narrow.split() if not word.endswith("us")} <= words
    assert max(map(len, narrow.splitlines())) <= (width or WIDTH)


def test_without_times_there_is_no_such_column() -> None:
    race = flushed_mask()
    explanation = explained(race, "p", timed=False)
    assert diagram(explanation, times=True) == diagram(explanation)
    assert "us later" not in diagram(explanation)


def test_four_cpus_need_more_room() -> None:
    race = flushed_mask()
    race.events.insert(6, Event(race.events[6].time - 1, "load", 3, VCPU, 1, 0))
    race.events.insert(7, Event(race.events[7].time - 1, "free", KVM, 0xB34, 1, 0))
    race.events[-3:-3] = [Event(race.events[-3].time - 1, "free", KVM, 0xB34, 1, 0)]
    lines = diagram(explained(race, "p")).splitlines()
    columns = lines[2].split()
    assert len(columns) == 4
    assert WIDTH < max(map(len, lines)) <= 24 * 4
    narrow = diagram(explained(race, "p"), width=72).splitlines()
    assert max(map(len, narrow)) <= 72


def test_what_the_legend_says_of_other_races() -> None:
    late = Race().enter(0, 100).zap(HOST).promise(HOST).request(HOST)
    assert "[3] the flush comes too late: the promise has been given" in diagram(explained(late, "p"))
    unanswered = Race().enter(0, 100).zap(HOST).request(HOST).kick(HOST, 0).promise(HOST)
    drawn = " ".join(diagram(explained(unanswered, "p")).split())
    assert "[3] the sender does not wait for the answer: CPU0 is still in the guest" in drawn
    unseen = Race().enter(0, 100).leave(0, 160).zap(HOST).request(HOST).promise(HOST).enter(0, 160)
    assert "enters without having seen the request" in diagram(explained(unseen, "p"))
    promised = Race().enter(0, 100).zap(HOST).promise(HOST)
    assert "[3] KVM's promise, and CPU0 has not flushed" in diagram(explained(promised, "p"))
    guest = Race().enter(0, 100).load(1, 0).add("guest_invalidate", 1, VCPU, PAGE).load(0, 1).elided(0)
    text = diagram(explained(guest, "p", kinds=("guest-stale",)))
    assert "v1: page 0x5e39\n" in text
    assert "  the guest invalidates [2]" in text
    assert "the guest invalidates it here, but CPU0 keeps its entry" in text
    fault = Race().leave(0, 100, "ept_violation").promise(HOST).map(0).enter(0, 100)
    text = diagram(explained(fault, "p", unsafe_answers=["fault_retry=none"]))
    assert "map gfn 0x105" in text
    assert "[1] a frame that was looked up before the promise (fault_retry=none)" in text
    walk = Race().enter(0, 100).zap(HOST, GFN & ~511, 512)
    text = diagram(explained(walk, "p", kinds=("walk-after-free",)))
    assert "[1] a cached pointer to the table in frame 0xb34" in text
    assert "[2] the table goes" in text
    assert "through the freed table [3]" in text
    by_kvm = Race().zap(HOST, GFN & ~511, 512)
    text = diagram(explained(by_kvm, "p", kinds=("walk-after-free",), vcpu=0xFFFFFFFF))
    assert "v4294967295" not in text
    assert "KVM walks, gfn 0x105" in text
    quiet = Race().enter(0, 100).zap(HOST).request(HOST).promise(HOST)
    assert "no pCPU is interrupted, though v1 is in the guest" in diagram(explained(quiet, "p"))
    protect = Race().enter(0, 100).add("protect", KVM, GFN, 1, 1).promise(KVM, "dirty_log")
    text = diagram(explained(protect, "p", promise="dirty-log", access="write"))
    assert "[2] write access goes" in text
    assert "kvm_get_dirty_log()" in text


EVENTS = st.builds(
    Event,
    time=st.integers(1, 1 << 40),
    kind=st.sampled_from(EVENT_KINDS),
    cpu=st.integers(0, 2),
    a=st.sampled_from([0, 1, GFN, PAGE, (1 << 64) - 1]) | st.integers(0, (1 << 64) - 1),
    b=st.sampled_from([0, 1, GFN, PAGE]) | st.integers(0, (1 << 64) - 1),
    vm=st.sampled_from([0, 1, 0xFFFF]),
    more=st.integers(0, (1 << 32) - 1),
)


@pytest.mark.slow
@given(
    st.lists(EVENTS, max_size=30),
    st.sampled_from(VIOLATION_KINDS),
    st.booleans(),
    st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]), max_size=90),
)
def test_three_cpus_fit_whatever_they_do(events: list[Event], kind: str, times: bool, policy: str) -> None:
    race = Race()
    race.events = events
    text = diagram(explained(race, policy, kinds=(kind,)), times=times)
    assert max((len(line) for line in text.splitlines()), default=0) <= WIDTH
    assert all(line == line.rstrip() for line in text.splitlines())


def test_plain_ascii() -> None:
    assert diagram(mask()).isascii()


def test_the_example_is_a_file_that_can_be_explained(tmp_path: Path) -> None:
    race = flushed_mask()
    path = tmp_path / "v.json"
    report = {
        "kinds": ("use-after-free", "stale-after-revoke"),
        "unsafe_answers": ["migration=cpu-flushed-mask"],
    }
    document = race.document("lkml-2025-cpu-flushed-mask", **report) | {"scenario": "migration-storm"}
    path.write_text(json.dumps(document))
    (case,) = load_cases(path)
    assert diagram(explain(case)) == MASK


@pytest.mark.parametrize("width", [40, 55, 100])
def test_a_width_of_ones_own(width: int) -> None:
    assert max(map(len, diagram(mask(), width=width).splitlines())) <= width


@pytest.mark.parametrize("width", range(40, 60))
def test_where_the_columns_need_more_than_there_is(width: int) -> None:
    race = flushed_mask()
    race.events.insert(-3, Event(race.events[-3].time - 1, "free", KVM, 0xB34, 1, 0))
    for explanation in (mask(), explained(race, "p")):
        text = diagram(explanation, width=width, times=True)
        assert "[4]" in text
        assert max(map(len, text.splitlines())) <= width + 36


def nested_race() -> Race:
    """L1 runs on two pCPUs, its nested guest on the first one, where it uses an entry that a zap has left."""
    race = Race().load(0, 1 << 32).enter(0, 100).leave(0, 200).enter(0, 200, nested=2).leave(0, 300)
    race.load(1, 0).enter(1, 300).leave(1, 350).zap(HOST).promise(HOST).free(HOST)
    return race.load(0, 1).elided(0).enter(0, 400, nested=2)


def test_columns_name_the_levels_that_ran_there(tmp_path: Path) -> None:
    path = tmp_path / "nested.json"
    path.write_text(json.dumps(nested_race().document()))
    (case,) = load_cases(path)
    text = diagram(explain(case))
    header = next(line for line in text.splitlines() if line.startswith("CPU0"))
    assert header.split("  ")[0] == "CPU0 (L1, L2)"
    assert "to L2, guest 2" in text
    assert "VM entry of vCPU 1 to nested guest 2, root 0x2" in [event.describe() for event in case.events]
    (plain,) = _cases(tmp_path, flushed_mask())
    assert explain(plain).labels() == ["CPU0", "CPU1", "host0"]


def _cases(tmp_path: Path, race: Race) -> list[Case]:
    path = tmp_path / "plain.json"
    path.write_text(json.dumps(race.document()))
    return load_cases(path)
