"""An event is the same event whichever tool printed it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emulator.hosttrace.lines import Dialect
from tests.emulator.hosttrace.made_up import Line, read

_WORDS = "abcXYZ019/-_.:<># "
_COMMS = st.text(_WORDS, min_size=1, max_size=15).filter(
    lambda comm: comm == comm.strip() and not comm.isdigit()
)
_FIELDS = st.sampled_from(
    (
        "vcpu 0, rip 0x10041",
        "vcpu 12 reason EPT_VIOLATION rip 0x0 info1 0x181",
        "prev_comm=a-7 [003] prev_pid=1 ==> next_comm=b next_pid=2",
        "(kvm_flush_remote_tlbs+0x4/0x50 [kvm]) kvm=0xffffc90000129000",
        "",
    )
)
_LINES = st.builds(
    Line,
    _COMMS,
    st.integers(0, 4_194_304),
    st.integers(0, 8191),
    st.integers(0, 10**12),
    st.sampled_from(("kvm_entry", "kvm_exit", "sched_switch", "p_hv_track_root_tdp_0")),
    _FIELDS,
)


def _same(text: str, line: Line, dialect: Dialect, tgid: int = -1) -> None:
    reading, found = read([text])
    assert reading.dialects == {dialect: 1}, text
    (event,) = found
    assert (event.comm, event.tid, event.cpu, event.tgid) == (line.comm, line.tid, line.cpu, tgid)
    assert event.time == line.micros * 1000
    assert (event.name, event.fields) == (line.name, line.fields)


@given(_LINES, st.sampled_from(("....", "d...", "dNh1", "d..1.", ".....", "D.s3.", "d..31", "bnZf2")))
def test_ftrace_with_any_flags(line: Line, flags: str) -> None:
    _same(line.ftrace(flags), line, Dialect.DASHED)


@given(_LINES, st.integers(0, 4_194_304))
def test_ftrace_with_processes(line: Line, tgid: int) -> None:
    _same(line.ftrace(tgid=str(tgid)), line, Dialect.DASHED, tgid)


@given(_LINES)
def test_ftrace_without_the_process(line: Line) -> None:
    _same(line.ftrace(tgid="-------"), line, Dialect.DASHED)


@given(_LINES)
def test_trace_cmd(line: Line) -> None:
    _same(line.trace_cmd(), line, Dialect.DASHED)


@given(_LINES)
def test_latency_format(line: Line) -> None:
    _same(line.latency(), line, Dialect.LATENCY)


@given(_LINES)
def test_perf(line: Line) -> None:
    _same(line.perf(), line, Dialect.PERF)


@given(_LINES, st.integers(0, 4_194_304))
def test_perf_with_processes(line: Line, tgid: int) -> None:
    _same(line.perf(str(tgid)), line, Dialect.PERF, tgid)


def test_flags_may_stand_before_the_cpu() -> None:
    text = "       CPU 0/KVM-7289    d..1. [023]  2925.640961: kvm_entry: vcpu 0\n"
    (event,) = read([text])[1]
    assert (event.comm, event.tid, event.cpu, event.fields) == ("CPU 0/KVM", 7289, 23, "vcpu 0")


def test_nanoseconds() -> None:
    (event,) = read(["  qemu-7  [001] d..1. 12.000000345: kvm_entry: vcpu 0\n"])[1]
    assert event.time == 12_000_000_345


def test_a_call_of_the_function_tracer_has_its_caller() -> None:
    (event,) = read(["  qemu-7  [001] d..1.    12.000001: kvm_mmu_load <-vcpu_enter_guest\n"])[1]
    assert (event.name, event.caller) == ("kvm_mmu_load", "vcpu_enter_guest")


def test_samples_without_a_task_and_a_time() -> None:
    reading, (event,) = read(["      2 ept[0] vcpu=ffff99 seq=80854227 inprog=1 start=1000 end=3000\n"])
    assert (event.tid, event.time, event.times) == (-1, -1, 2)
    assert reading.dialects == {Dialect.PAIRS: 1}


def test_dialects_may_alternate() -> None:
    line = Line("fc_vcpu 1", 599, 3, 5, "kvm_entry", "vcpu 1")
    reading, found = read([line.ftrace(), line.perf(), line.latency(), line.trace_cmd()] * 3)
    assert len(found) == 12
    assert {event.fields for event in found} == {"vcpu 1"}
    assert reading.dialects == {Dialect.DASHED: 6, Dialect.PERF: 3, Dialect.LATENCY: 3}


def test_headings_are_no_events_and_strange_lines_are_counted() -> None:
    reading, found = read(["# tracer: nop\n", "#\n", "\n", "cpus=8\n", "\tffffffff81 start_kernel\n"])
    assert not found
    assert (reading.lines, reading.other, reading.first_other[0]) == (5, 2, "cpus=8")


@pytest.mark.parametrize(
    ("line", "lost", "unknown"),
    [
        ("CPU:3 [LOST 17 EVENTS]\n", 17, False),
        ("CPU:2 [LOST EVENTS]\n", 0, True),
        ("Warning: LOST 5 events!\n", 5, False),
    ],
)
def test_lost_events_are_told(line: str, lost: int, unknown: bool) -> None:
    reading, _ = read([line])
    assert (reading.lost, reading.lost_unknown, reading.other) == (lost, unknown, 0)
