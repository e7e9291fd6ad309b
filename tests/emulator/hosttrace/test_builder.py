"""The rules by which a workload fills the gaps of a host's trace."""

from __future__ import annotations

import pytest

from emulator.hosttrace.builder import Builder
from emulator.hosttrace.workload import BLOCK, Workload
from tests.emulator.hosttrace.made_up import Line, entry, leave, observe, probe, read
from tests.emulator.replay.recording import HOST, PRESENT, TABLE, TASKS, Recording, workload_of

HUGE = PRESENT | 1 << 7
RETRIED = "page faults that mapped nothing, because a notifier's range was in progress"
UNSEEN = "events of VMs of which the trace shows no vCPU"
WORKER = 60


def verbs(workload: Workload, *wanted: str) -> list[tuple[str, int]]:
    return [(step.verb, step.start) for step in workload.steps if step.verb in wanted]


def again(recording: Recording) -> Workload:
    """Return the workload of a recording that is read twice, as one with several VMs is."""
    events = read(recording.text())[1]
    builder = Builder()
    for event in events:
        builder.add(event)
    second = builder.again()
    assert second is not None
    for event in events:
        second.add(event)
    return second.workload("made up", observe(recording.text()))


def test_a_fault_that_maps_nothing_is_retried() -> None:
    recording = Recording()
    recording.enter(0)
    recording.write(0, 0x200)
    recording.unmap(0x200, 1)
    for _ in range(3):
        recording.write(0, 0x200)
    # The first two of the three faults set no SPTE: the range is still in progress.
    sptes = [line for line in recording.lines if line.name == "kvm_tdp_mmu_spte_changed"]
    recording.lines = [line for line in recording.lines if line not in sptes[2:4]]
    workload = workload_of(recording)
    assert len(verbs(workload, "write")) == 2
    assert workload.left_out == {RETRIED: 2}


def test_a_fault_without_an_spte_on_a_page_that_was_never_zapped_stays() -> None:
    recording = Recording()
    recording.enter(0)
    recording.write(0, 0x200)
    recording.write(0, 0x201)
    recording.lines.pop(-2)  # fast_page_fault() changes an SPTE without this event
    assert len(verbs(workload_of(recording), "write")) == 2


def write_huge(recording: Recording) -> None:
    recording.write(0, 0x205)
    change = f"as id 0 gfn 200 level 2 old_spte 0 new_spte {HUGE:x}"
    recording.lines[-2] = recording.lines[-2]._replace(fields=change)


def test_an_spte_after_the_entry_that_ended_the_fault_makes_no_block_huge() -> None:
    recording = Recording()
    recording.enter(0)
    recording.write(0, 0x205)
    recording.unmap(0x205, 1)
    write_huge(recording)
    recording.lines[-2:] = reversed(recording.lines[-2:])  # as tools print lines of different CPUs
    assert not verbs(workload_of(recording), "huge")


def test_a_block_that_is_mapped_huge_twice_became_huge_once() -> None:
    recording = Recording()
    recording.enter(0)
    for _ in range(2):
        write_huge(recording)
        recording.delete_slot(range(0))
    assert len(verbs(workload_of(recording), "huge")) == 1


def test_a_block_is_huge_again_after_a_range_has_zapped_it() -> None:
    recording = Recording()
    recording.enter(0)
    for _ in range(2):
        write_huge(recording)
        recording.unmap(0x200, 0)
        recording.spte(HOST, 0x200, HUGE, 0, level=2)
        recording.flush()
    assert len(verbs(workload_of(recording), "huge")) == 2


def test_a_block_that_was_huge_when_the_recording_began() -> None:
    recording = Recording()
    recording.enter(0)
    recording.unmap(0x400, 0)
    recording.spte(HOST, 0x400, HUGE, 0, level=2)
    workload = workload_of(recording)
    assert workload.huge == [(0, 0)]
    assert workload.mapped == [list(range(BLOCK))]


def test_tables_that_are_zapped_before_a_flush_are_recovered() -> None:
    def recorded(worker: int, before: str = "") -> Workload:
        recording = Recording()
        recording.enter(0)
        for gfn in (0x200, 0x400):
            recording.write(0, gfn)
        recording.lines.append(probe(worker, 0, recording.tick(), before)) if before else None
        for gfn in (0x200, 0x400):
            recording.spte(worker, gfn, TABLE, 0, level=2)
        if before:
            recording.lines.append(probe(worker, 0, recording.tick(), before))
        recording.lines.append(probe(worker, 0, recording.tick(), "kvm_flush_remote_tlbs"))
        return workload_of(recording)

    assert [(step.verb, step.start, step.end) for step in recorded(WORKER).steps][-1] == (
        "recover",
        0,
        2 * BLOCK,
    )
    # The end of dirty logging flushes by range before it zaps the table; vCPUs zap those of obsolete roots.
    assert not verbs(recorded(WORKER, "kvm_flush_remote_tlbs_range"), "recover")
    assert not verbs(recorded(TASKS[0]), "recover")


def test_tables_of_obsolete_roots_are_not_recovered() -> None:
    recording = Recording()
    recording.enter(0)
    recording.write(0, 0x200)
    recording.delete_slot(range(0))
    recording.spte(HOST, 0x200, TABLE, 0, level=2)
    recording.flush()
    assert not verbs(workload_of(recording), "recover")


@pytest.mark.parametrize(("before_load", "clear"), [(True, [(0, 0)]), (False, [])])
def test_a_flush_between_rsm_and_the_load_of_a_root_tells_cr4_pge(
    before_load: bool, clear: list[tuple[int, int]]
) -> None:
    recording = Recording()
    recording.enter(0)
    recording.event(0, "kvm_smm_transition", "vcpu 0: entering SMM, smbase 0x30000")
    recording.enter(0)
    recording.event(0, "kvm_smm_transition", "vcpu 0: leaving SMM, smbase 0x30000")
    calls = ["svm_flush_tlb_current", "kvm_mmu_load"]
    for function in calls if before_load else reversed(calls):
        recording.probe(0, function)
    recording.enter(0)
    assert workload_of(recording).without_pge == clear


def vmrun(recording: Recording, rest: str) -> None:
    recording.event(0, "kvm_nested_vmenter", f"rip: 0x1 vmcb: 0x40000 nested_rip: 0x2 int_ctl: 0x0 {rest}")


def test_vmrun_and_its_exit_are_steps() -> None:
    recording = Recording()
    recording.enter(0)
    vmrun(recording, "nested_npt=n guest_cr3: 0x2000")
    recording.write(0, 0x200)
    recording.event(0, "kvm_nested_vmexit_inject", "reason: hypercall ext_inf1: 0x0")
    workload = workload_of(recording)
    assert [step.verb for step in workload.steps] == ["enter", "vmrun", "write", "vmexit"]
    assert workload.left_out == {}


def test_tables_of_l1_that_kvm_shadows_are_left_out_and_named() -> None:
    recording = Recording()
    recording.enter(0)
    vmrun(recording, "nested_npt=y nested_cr3: 0x60000")
    recording.write(0, 0x200)  # a page by L1's tables, which is none of L1's own
    workload = workload_of(recording)
    assert not verbs(workload, "write")
    assert workload.left_out == {"nested guests' page tables (NPT), which KVM shadows, at so many entries": 1}


class TwoVms(Recording):
    """Two VMs in one process, each with a vCPU 0, of which probes tell the struct kvm at the end only."""

    def both(self) -> None:
        for task, cpu in zip(TASKS, (1, 2), strict=True):
            self.lines.append(entry(task, cpu, self.tick(), 0))
            self.lines.append(leave(task, cpu, self.tick()))

    def delete_slot_of(self, kvm: int) -> None:
        self.lines.append(Line("qemu", HOST, 0, self.tick(), "kvm_mmu_zap_all_fast", "kvm-mmu-valid-gen 0"))
        rest = f" kvm={kvm:#x} req=0x327"
        self.lines.append(probe(HOST, 0, self.tick(), "kvm_make_all_cpus_request", rest))

    def tell(self) -> None:
        for task, cpu, kvm in zip(TASKS, (1, 2), (0xA, 0xB), strict=True):
            self.lines.append(probe(task, cpu, self.tick(), "kvm_mmu_free_roots", f" kvm={kvm:#x}"))


def test_a_probe_tells_which_vm_of_a_process_is_meant() -> None:
    recording = TwoVms()
    recording.delete_slot_of(0xB)
    recording.both()
    for kvm in (0xA, 0xB, 0xB):
        recording.delete_slot_of(kvm)
    recording.tell()
    workload = again(recording)
    assert workload.vms == [1, 1]
    deleted = [step.vm for step in workload.steps if step.verb == "zap-all"]
    of_first = next(step.vm for step in workload.steps if step.verb == "enter")
    assert deleted == [1 - of_first, of_first, 1 - of_first, 1 - of_first]


def test_a_vm_of_which_the_vcpu_enters_later_is_told_before() -> None:
    recording = TwoVms()
    recording.lines.append(entry(TASKS[0], 1, recording.tick(), 0))
    recording.delete_slot_of(0xB)
    recording.both()
    recording.tell()
    workload = again(recording)
    assert [step.vm for step in workload.steps if step.verb == "zap-all"] == [1]
    assert workload.left_out == {}


def test_a_range_is_corrected_with_its_pages() -> None:
    recording = TwoVms()
    recording.both()
    for task in TASKS:
        recording.spte(task, 0x200, 0, PRESENT)
    recording.unmap(0x200, 0)
    recording.spte(HOST, 0x200, PRESENT, 0)
    recording.lines.append(probe(HOST, 0, recording.tick(), "kvm_flush_remote_tlbs", " kvm=0xb"))
    recording.tell()
    recording.unmap(0x200, 0)
    recording.spte(HOST, 0x200, PRESENT, 0)
    recording.lines.append(probe(HOST, 0, recording.tick(), "kvm_flush_remote_tlbs", " kvm=0xa"))
    workload = again(recording)
    assert [step.vm for step in workload.steps if step.verb == "unmap"] == [1, 0]
    assert workload.mapped == [[], []]


def test_a_vm_without_a_vcpu_in_the_trace_is_left_out_and_its_requests_are_not_counted() -> None:
    recording = TwoVms()
    recording.both()
    for kvm in (0xA, 0xC):
        recording.delete_slot_of(kvm)
    recording.lines.append(probe(HOST, 0, recording.tick(), "kvm_flush_remote_tlbs", " kvm=0xc"))
    recording.tell()
    workload = again(recording)
    assert len(verbs(workload, "zap-all")) == 1
    assert workload.left_out == {UNSEEN: 1}
    assert workload.recorded == {"make_all_cpus_request": 1}


def test_one_vm_is_read_once() -> None:
    builder = Builder()
    recording = Recording()
    recording.enter(0)
    recording.flush(" kvm=0xa req=0x300")
    for event in read(recording.text())[1]:
        builder.add(event)
    assert builder.again() is None
