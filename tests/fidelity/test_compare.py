"""The comparison itself: it must notice every count that differs, and accept only those that may vary."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from .compare import fewest, problems
from .driver import VcpuCounts, VmCounts
from .emulated import EmulatorDriver
from .lines import VCPU_KEYS, Line, Step, load

LINES = {line.id: line for line in load()}


def recorded(line: Line, vcpus: int, result: int) -> list[VmCounts]:
    """The counts of a machine that counts exactly as the line says."""

    def of_vcpu(key: str, i: int) -> int:
        value = line.expect.get(key, 0)
        due = value[i] if isinstance(value, list) else result if value == "result" else value
        met = line.at_once and i == 0 and key in ("flush_all", "tlb_flush")
        return fewest(line, vcpus, due) if met else due

    flushes = line.expect.get("remote_tlb_flush_requests", 0)
    assert not isinstance(flushes, list)
    operated = VmCounts(
        result if flushes == "result" else flushes,
        Counter({name: result if n == "result" else n for name, n in line.requests.items()}),
        executed=Counter(line.executes or {}),
        vcpus=tuple(VcpuCounts(**{key: of_vcpu(key, i) for key in VCPU_KEYS}) for i in range(vcpus)),
    )
    idle = VmCounts(vcpus=(VcpuCounts(),) * vcpus)
    return [operated if vm == line.vm else idle for vm in range(max(line.machine.vms, 1))]


def result_of(line: Line) -> int:
    return line.result if line.result is not None else line.result_min or 0


@pytest.mark.parametrize("line", LINES.values(), ids=str)
def test_recorded_counts_are_accepted_and_any_other_is_not(line: Line) -> None:
    for vcpus in line.vcpus:
        result = result_of(line)
        exact = recorded(line, vcpus, result)
        assert problems(line, vcpus, result, exact) == []
        for vm, counts in enumerate(exact):
            for wrong in one_off(counts):
                assert problems(line, vcpus, result, [*exact[:vm], wrong, *exact[vm + 1 :]]), (vm, wrong)


def one_off(counts: VmCounts) -> list[VmCounts]:
    """Each with one counter that is one too high."""
    wrong = [
        replace(counts, remote_tlb_flush_requests=counts.remote_tlb_flush_requests + 1),
        *(
            replace(counts, requests=counts.requests + Counter({name: 1}))
            for name in ("TLB_FLUSH", "MMU_FREE_OBSOLETE_ROOTS", "MMU_RELOAD")
        ),
    ]
    for i, vcpu in enumerate(counts.vcpus):
        for key in VCPU_KEYS:
            more = replace(vcpu, **{key: getattr(vcpu, key) + 1})
            wrong.append(replace(counts, vcpus=(*counts.vcpus[:i], more, *counts.vcpus[i + 1 :])))
    return wrong


def test_precondition_that_does_not_hold_is_a_problem() -> None:
    line = LINES["unmap-populated-idle"]
    assert problems(line, 2, 127, recorded(line, 2, 128))


def test_some_requests_may_meet_in_one_flush_where_the_line_says_so() -> None:
    line = LINES["touch-write-after-read-contended"]
    exact = recorded(line, 2, 128)[0]

    def with_flushes(n: int) -> list[VmCounts]:
        merged = replace(exact.vcpus[0], flush_all=n, tlb_flush=n)
        return [replace(exact, vcpus=(merged, exact.vcpus[1]))]

    assert problems(line, 2, 128, with_flushes(119)) == []
    assert problems(line, 2, 128, with_flushes(116)) == []
    assert problems(line, 2, 128, with_flushes(115))
    assert problems(line, 2, 128, with_flushes(129))
    assert problems(replace(line, merged=0.0), 2, 128, with_flushes(127))


def test_one_vcpu_has_met_all_requests_at_once_where_the_line_says_so() -> None:
    line = LINES["shadow-memslot_delete-active"]
    exact = recorded(line, 2, 0)[0]
    for flushes in ((1, 2), (2, 1), (1, 1), (2, 2), (0, 1)):
        vcpus = tuple(replace(exact.vcpus[0], flush_all=n, tlb_flush=n) for n in flushes)
        found = problems(line, 2, 0, [replace(exact, vcpus=vcpus)])
        assert bool(found) is (flushes in ((2, 2), (0, 1))), flushes


def test_twice_as_many_may_meet_where_more_vcpus_run_than_were_recorded() -> None:
    line = LINES["touch-write-after-read-contended"]
    exact = recorded(line, 4, 128)[0]
    for flushes, accepted in ((103, True), (102, False)):
        vcpus = tuple(replace(vcpu, flush_all=flushes, tlb_flush=flushes) for vcpu in exact.vcpus)
        assert (problems(line, 4, 128, [replace(exact, vcpus=vcpus)]) == []) is accepted


def test_a_flush_at_a_yield_counts_only_where_zaps_may_yield() -> None:
    may, may_not = LINES["unmap-64-pages-while-written"], LINES["unmap-one-page-while-written"]
    for line, accepted in ((may, True), (may_not, False)):
        exact = recorded(line, 2, 1)[0]
        yielded = replace(
            exact, remote_tlb_flush_requests=2, requests=Counter(TLB_FLUSH=2), yields=1, vcpus=exact.vcpus
        )
        assert (problems(line, 2, 1, [yielded]) == []) is accepted


def test_a_flush_of_a_second_fault_counts_only_where_faults_may_meet() -> None:
    may, may_not = LINES["shadow-unmap-all-while-written"], LINES["shadow-unmap-populated-idle"]
    for line, accepted in ((may, True), (may_not, False)):
        exact = recorded(line, 2, 128)[0]
        met = replace(exact, remote_tlb_flush_requests=2, requests=Counter(TLB_FLUSH=2), refaults=1)
        assert (problems(line, 2, 128, [met]) == []) is accepted


def test_an_instruction_too_many_or_of_another_kind_is_a_problem_with_one_vcpu() -> None:
    line = LINES["shadow-mov-cr3-same"]
    exact = recorded(line, 1, 1)[0]
    for executed in (Counter(invvpid_single=2), Counter(invvpid_all=1), Counter[str]()):
        assert problems(line, 1, 1, [replace(exact, executed=executed)])


def test_every_operation_of_the_machine_has_a_line() -> None:
    done = {line.do.op for line in LINES.values()}
    assert done >= {
        *("memslot_create", "memslot_delete", "memslot_move", "unmap", "mprotect", "touch"),
        *("dirty_log_enable", "get_dirty_log", "clear_dirty_log", "dirty_log_disable"),
        *("migrate", "run", "smi", "vm_create", "vm_destroy"),
    }
    assert all(line.recorded for line in LINES.values())


def test_the_emulator_can_run_each_line() -> None:
    missing = {line.id: line.needs - EmulatorDriver.capabilities for line in LINES.values()}
    assert {line_id: needs for line_id, needs in missing.items() if needs} == {}


def test_steps_are_parsed() -> None:
    step = Step.parse("guest write slot=1 gpa=0x10")
    assert (step.op, step.word("do"), step.number("slot"), step.number("gpa")) == ("guest", "write", 1, 16)
    with pytest.raises(ValueError, match="expected a number"):
        step.number("do")
