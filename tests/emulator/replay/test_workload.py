"""A workload made from a trace, and its file."""

from __future__ import annotations

from pathlib import Path

import pytest

from emulator.errors import BadInput
from emulator.hosttrace.workload import BLOCK, Step, Workload
from emulator.hosttrace.workload_file import read_workload, text_of
from tests.emulator.hosttrace.made_up import probe, unmap
from tests.emulator.replay.recording import (
    HOST,
    PRESENT,
    TABLE,
    TASKS,
    Recording,
    whole,
    workload_of,
)


def verbs(workload: Workload) -> list[str]:
    return [step.verb for step in workload.steps]


def test_each_kind_of_event_is_there_once_and_in_order() -> None:
    workload = workload_of(whole())
    assert (workload.pcpus, workload.vms) == (3, [2])
    assert [verb for verb in verbs(workload) if verb not in ("enter", "write")] == [
        "unmap", "unmap", "log", "log", "zap-all",
    ]  # fmt: skip
    assert verbs(workload).count("write") == 16 + 8 + 2
    # Pages are numbered anew, those of two far ranges next to each other.
    assert workload.pages == [2 * BLOCK]
    first, second = (step for step in workload.steps if step.verb == "unmap")
    assert (first.start, first.end, second.start, second.end) == (0, 16, BLOCK, BLOCK + 3)
    assert workload.mapped == [[BLOCK, BLOCK + 1, BLOCK + 2]]
    assert workload.left_out == {
        "zapped SPTEs outside of a notifier's range": 8,
        "notifier ranges of which no page was mapped, in no known memslot": 1,
    }
    assert workload.recorded == {
        "remote_tlb_flush_requests": 4,
        "make_all_cpus_request": 5,
        "flush_all": 2 * 4 + 3,
        "flush_current": 2,
        "mmu_load": 2,
    }


def test_an_entry_that_changes_nothing_is_left_out() -> None:
    recording = Recording()
    for _ in range(5):
        recording.enter(0)
    recording.write(0, 1)
    recording.unmap(1, 1)
    recording.enter(0)
    assert verbs(workload_of(recording)) == ["enter", "write", "unmap", "enter", "enter"]


def test_writes_of_cr4_change_bits_of_a_role() -> None:
    recording = Recording()
    recording.enter(0)
    for value in (0x630, 0x620, 0x6A0, 0x6B0):  # PSE, PSE, then PGE, which is part of no role, and PSE
        recording.write_cr(0, 4, value)
    recording.write_cr(0, 0, 0x80010033)
    recording.enter(1)
    recording.write_cr(1, 4, 0x630)
    workload = workload_of(recording)
    found = [(step.vcpu, step.start) for step in workload.steps if step.verb == "cr4"]
    assert found == [(0, 0x10), (0, 0x10), (0, 0x10)]
    assert workload.left_out == {
        "writes of CR0": 1,
        "first writes of CR4, whose change the trace does not show": 1,
    }


def test_nested_guests_on_vmx_are_left_out() -> None:
    recording = Recording()
    recording.enter(0)
    recording.event(0, "kvm_nested_vmenter", "rip: 0x1 vmcs: 0x2")
    left_out = {"entries of nested guests on VMX, because their VMCSs are not in the trace": 1}
    assert workload_of(recording).left_out == left_out


@pytest.mark.parametrize("tracer_first", [True, False])
def test_requests_for_the_clock_are_told_by_the_probe_that_has_their_number(tracer_first: bool) -> None:
    recording = Recording()
    recording.enter(0)
    for _ in range(3):
        if tracer_first:
            recording.call(0, "kvm_make_all_cpus_request", "kvm_arch_vcpu_ioctl_run")
        recording.probe(0, "kvm_make_all_cpus_request", " kvm=0x1 req=0x316")
        if not tracer_first:
            recording.call(0, "kvm_make_all_cpus_request", "kvm_arch_vcpu_ioctl_run")
    assert workload_of(recording).recorded == {}


@pytest.mark.parametrize(("micros", "left_out"), [(12_000, 0), (21_000, 2)])
def test_a_task_that_loses_its_cpu_after_the_event_of_its_range(micros: int, left_out: int) -> None:
    recording = Recording()
    recording.enter(0)
    recording.write(0, 1)
    recording.lines.append(unmap(HOST, 0, recording.tick(), 0x7F00_0000_0000, 0x7F00_0010_0000))
    recording.tick(micros)
    for gfn in (1, 2):
        recording.spte(HOST, gfn, PRESENT, 0)
    workload = workload_of(recording)
    assert workload.left_out.get("zapped SPTEs outside of a notifier's range", 0) == left_out
    assert ("unmap" in verbs(workload)) is (left_out == 0)


def test_moves_are_no_calls_of_svm_flush_tlb_all() -> None:
    recording = Recording()
    recording.enter(0)
    recording.probe(0, "svm_flush_tlb_all")
    assert workload_of(recording).recorded == {"flush_all_but_moves": 1}


def test_a_huge_page_in_the_place_of_a_table_and_the_flush_for_it() -> None:
    recording = Recording()
    for vcpu in range(2):
        recording.enter(vcpu)
        recording.write(vcpu, 0x200 + vcpu)
    recording.write(0, 0x200)
    recording.spte(TASKS[0], 0x200, TABLE, PRESENT, level=2)
    recording.enter(1)  # without a flush by the other vCPU this entry would change nothing
    assert verbs(workload_of(recording))[-3:] == ["huge", "write", "enter"]


def test_a_flush_in_the_middle_of_a_range_is_a_yield() -> None:
    recording = Recording()
    recording.enter(0)
    recording.unmap(0x100, 2)
    for gfn in (0x102, 0x103):
        recording.spte(HOST, gfn, PRESENT, 0)
    recording.flush()
    found = [(step.start, step.end) for step in workload_of(recording).steps if step.verb == "unmap"]
    assert found == [(0x100, 0x102), (0x102, 0x104)]


def test_a_range_ends_with_its_probe_or_after_a_pause() -> None:
    for end in ("probe", "pause"):
        recording = Recording()
        recording.enter(0)
        recording.unmap(0x100, 2)
        if end == "pause":
            recording.tick(10_000)
        else:
            function = "kvm_mmu_notifier_invalidate_range_end"
            recording.lines.append(probe(HOST, 0, recording.tick(), function))
        recording.spte(HOST, 0x102, PRESENT, 0)
        workload = workload_of(recording)
        assert verbs(workload).count("unmap") == 1, end
        assert workload.left_out == {"zapped SPTEs outside of a notifier's range": 1}


def test_zaps_of_an_obsolete_root_are_no_range() -> None:
    recording = Recording()
    recording.enter(0)
    recording.write(0, 0x100)
    recording.delete_slot(range(0))
    recording.unmap(0x100, 1)  # still mapped by the obsolete root alone
    assert "unmap" not in verbs(workload_of(recording))
    recording.write(0, 0x100)
    recording.unmap(0x100, 1)
    assert verbs(workload_of(recording)).count("unmap") == 1


def test_requests_about_the_clock_are_not_those_of_the_mmu() -> None:
    recording = Recording()
    recording.enter(0)
    recording.flush()
    recording.lines.append(probe(HOST, 0, recording.tick(), "kvm_make_all_cpus_request", " req=0x316"))
    assert workload_of(recording).recorded["make_all_cpus_request"] == 1


def test_a_huge_page_is_one_before_its_access() -> None:
    recording = Recording()
    recording.enter(0)
    recording.write(0, 0x20105)
    recording.lines = [line for line in recording.lines if line.name != "kvm_tdp_mmu_spte_changed"]
    recording.spte(100, 0x20000, 0, PRESENT | 1 << 7, level=2)
    workload = workload_of(recording)
    assert [(step.verb, step.start) for step in workload.steps[1:]] == [("huge", 0), ("write", 0x105)]


def test_a_vcpu_that_loads_a_root_before_its_first_entry_is_new() -> None:
    recording = Recording()
    recording.enter(0)
    recording.lines.append(probe(101, 2, recording.tick(), "kvm_mmu_load"))
    recording.enter(1)
    assert workload_of(recording).new == [(0, 1)]


def test_the_file_has_all_of_it(tmp_path: Path) -> None:
    workload = workload_of(whole())
    workload.new = [(0, 1)]
    workload.huge = [(0, BLOCK)]
    workload.without_pge = [(0, 0)]
    workload.steps.append(Step(workload.steps[-1].microseconds, "recover", 0, start=0, end=BLOCK))
    workload.steps.append(Step(workload.steps[-1].microseconds, "vmrun", 0, 1))
    path = tmp_path / "kvm.workload"
    path.write_text(text_of(workload))
    assert read_workload(path) == workload
    assert len(path.read_text()) < 30 * len(workload.steps)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("5 jump 0.0", "one of enter, stay, leave, resume, read"),
        ("5 enter 0.0", "enter with 1 arguments behind the vCPU"),
        ("5 enter 0 1", "VM.VCPU"),
        ("5 enter 0.2 1", "the number of a vCPU of the VM from 0 to 1"),
        ("5 enter 1.0 1", "the number of a VM above from 0 to 0"),
        ("5 enter 0.0 2", "CPU from 0 to 1"),
        ("5 write 0.0 0x400", "PAGE from 0 to 1023"),
        ("5 write 0.0 page", "a number for PAGE"),
        ("5 unmap 0 8 8", "END from 9 to 1024"),
        ("5 unmap 0.0 8 9", "a number for the number of a VM above"),
        ("5 huge 0 0x10", "a PAGE that is a multiple of 0x200"),
        ("1 zap-all 0", "events in the order of their times"),
        ("vm 0 vcpus 1 pages 512", "the number of the VM"),
        ("vm 1 vcpus 1 pages 513", "pages in blocks of 512"),
        ("mapped 0 8 8", "END from 9 to 1024"),
        ("recorded nothing 3", "source, pcpus, vm, mapped, huge, new, without-pge, memslot"),
        ("huge 0 8", "a PAGE that is a multiple of 0x200"),
        ("without-pge 0", "VM.VCPU"),
        ("5 recover 0 8 8", "END from 9 to 1024"),
        ("5 vmrun 0", "VM.VCPU"),
        ("pcpus 0", "pcpus from 1 to"),
        ("5 stay 0.0 2", "CPU from 0 to 1"),
        ("memslot 0 0 1 x 0", "a number for memslot"),
        ("new 0", "VM.VCPU"),
        ("left-out x y", "a number for the count"),
        ("5", "a line of a workload's file"),
    ],
)
def test_a_line_that_is_none_is_named(line: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.workload"
    head = "flushlab-workload 1\n# by hand\nsource x\npcpus 2\nvm 0 vcpus 2 pages 1024\n2 enter 0.0 0\n"
    path.write_text(head + line + "\n")
    with pytest.raises(BadInput) as error:
        read_workload(path)
    assert str(error.value).startswith(f"{path}:7: found '{line}'; expected {expected}")


@pytest.mark.parametrize(
    "text", ["", "flushlab-workload 4\n", "#!/bin/sh\n", "flushlab-workload 1\npcpus 2\n"]
)
def test_another_file_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "other"
    path.write_text(text)
    with pytest.raises(BadInput, match=f"^{path}"):
        read_workload(path)
