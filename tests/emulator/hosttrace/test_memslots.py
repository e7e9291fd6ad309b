"""Memslots, given or inferred, and the guest pages of notifier ranges."""

from __future__ import annotations

from pathlib import Path

import pytest

from emulator.cli.main import main
from emulator.errors import BadInput
from emulator.hosttrace.builder import Builder
from emulator.hosttrace.memslots import RULE, Memslot, parsed_memslot
from emulator.hosttrace.workload import Workload
from emulator.hosttrace.workload_file import read_workload, text_of
from tests.emulator.hosttrace.made_up import observe, read, unmap
from tests.emulator.replay.recording import HOST, PRESENT, Recording

_HVA = 0x7F58_9C00_0000


def built(recording: Recording, *memslots: Memslot) -> Workload:
    builder = Builder(memslots)
    for event in read(recording.text())[1]:
        builder.add(event)
    return builder.workload("made up", observe(recording.text()))


def ranges(*spans: tuple[int, int], sptes: bool = True, first: int = 0x100) -> Recording:
    """Return a recording in which the host unmaps pages from `first` on, and their SPTEs are seen or not."""
    recording = Recording()
    recording.enter(0)
    for page, number in spans:
        start = _HVA + (page << 12)
        recording.lines.append(unmap(HOST, 0, recording.tick(), start, start + (number << 12)))
        for gfn in range(first + page, first + page + number) if sptes else ():
            recording.spte(HOST, gfn, PRESENT, 0)
        recording.flush()
    return recording


def test_two_ranges_that_agree_make_a_memslot() -> None:
    assert built(ranges((0, 4), (16, 8))).memslots == [Memslot(0, 0x100, 24, _HVA, 2)]
    assert built(ranges((0, 4))).memslots == []


def test_a_range_with_a_gap_says_nothing() -> None:
    recording = ranges((0, 4), (16, 8))
    recording.lines = [line for line in recording.lines if "gfn 101 " not in line.fields]
    assert built(recording).memslots == []


def test_given_memslots_tell_the_pages_of_a_trace_without_sptes() -> None:
    recording = ranges((0, 4), (16, 8), (900, 2), sptes=False)
    found = built(recording, Memslot(0, 0x100, 20, _HVA))
    spans = [(step.start, step.end) for step in found.steps if step.verb == "unmap"]
    # The second range is cut at the memslot's end, and the third is outside of it.
    assert spans == [(0x100, 0x104), (0x110, 0x114)]
    assert found.mapped == [[*range(0x100, 0x104), *range(0x110, 0x114)]]
    assert [step.verb for step in built(recording).steps].count("unmap") == 0


def test_pages_that_a_fault_has_mapped_were_not_mapped_before() -> None:
    recording = Recording()
    recording.enter(0)
    recording.write(0, 0x101)
    recording.lines = [line for line in recording.lines if line.name != "kvm_tdp_mmu_spte_changed"]
    recording.lines.append(unmap(HOST, 0, recording.tick(), _HVA, _HVA + 0x3000))
    found = built(recording, Memslot(0, 0x100, 512, _HVA))
    assert found.mapped == [[0x100, 0x102]]


def test_zaps_are_more_exact_than_memslots() -> None:
    recording = ranges((0, 4), (16, 8))
    recording.lines.append(unmap(HOST, 0, recording.tick(), _HVA, _HVA + 0x1000))
    recording.lines.append(unmap(HOST, 0, recording.tick(), 0x1000, 0x2000))
    given = built(recording, Memslot(0, 0x100, 512, _HVA))
    assert given.steps == built(recording).steps
    assert given.left_out == {
        "notifier ranges in memslots, of which no page was mapped": 1,
        "notifier ranges of which no page was mapped, in no known memslot": 1,
    }


def test_the_file_and_the_report_name_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, path = tmp_path / "kvm.trace", tmp_path / "kvm.workload"
    recording = ranges((0, 4), (16, 8))
    trace.write_text("".join(recording.text()))
    assert main(["import", str(trace), "--workload", str(path)]) == 0
    out = capsys.readouterr().out
    assert f"Memslot of VM 0: guest pages 0x100 to 0x118 at {_HVA:#x}, inferred from 2 ranges." in out
    assert " ".join(out.split()).endswith(RULE)
    workload = read_workload(path)
    assert workload.memslots == built(recording).memslots
    assert text_of(workload) == path.read_text()
    line = ["import", str(trace), "--workload", str(path), "--memslot"]
    assert main([*line, f"0x100,512,{_HVA:#x}"]) == 0
    assert ", given." in capsys.readouterr().out


@pytest.mark.parametrize(
    "text", ["", "1,2", "0:1,2,x", "a:1,2,0x1000", "1,0,0x1000", "1,2,0x1001", "-1:1,2,0x1000"]
)
def test_a_memslot_that_is_none(text: str) -> None:
    with pytest.raises(BadInput, match=r"^--memslot: found .*; expected GFN,PAGES,HVA"):
        parsed_memslot(text)


def test_memslots_without_a_workload(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", str(tmp_path / "kvm.trace"), "--memslot", "1,2,0x1000"]) == 2
    assert "found no --workload" in capsys.readouterr().err
