"""A state of an explored machine tells all that later steps depend on: a search that visits each once finds
the final states of another one, and two ways to one state go on alike."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Final

import pytest

from emulator.explore.audit.continuations import StateCheck, Ways
from emulator.explore.audit.residue import ResidueProgram
from emulator.explore.audit.untold import Untold
from emulator.explore.engine.scheduler import Execution, Task
from emulator.explore.machine.lib import instrument
from emulator.explore.machine.options import NONE, ExploreOptions
from emulator.explore.machine.patched_code import shared_classes
from emulator.explore.machine.program import LitmusProgram
from emulator.explore.machine.states import MachineStates, hear, rests_there, stateless
from emulator.explore.machine.watching import watching
from emulator.explore.results.verdict import Plan, explore_verdict
from emulator.explore.strategies.dpor import Exhaustive
from emulator.explore.strategies.sampling import RandomWalk, Replay, Sampler
from emulator.explore.strategies.search import Found, Limits, search
from emulator.explore.strategies.stateful import Stateful
from emulator.litmus.loader import load_test
from emulator.litmus.model import SAFE, LitmusTest
from emulator.litmus.policies import named_policy
from emulator.litmus.verdict import VIOLATIONS
from emulator.policy import Policy
from native import lib
from native.types import CpuId, VmId

VM0: Final = VmId(0)


def every(test: LitmusTest, policy: str, states_of: type[MachineStates] | None = None) -> tuple[Found, int]:
    """Return the result of a search of everything, and the states that it has compared."""
    program = ResidueProgram(test, named_policy(policy))
    try:
        if states_of is not None:
            assert not stateless(program)
            hear(program)
        with instrument(program.control):
            objects = program.objects
            strategy = Exhaustive(objects) if states_of is None else Stateful(objects, states_of(program))
            found = search(program, objects, strategy, Limits(first_only=False), bool)
            return found, strategy.size if isinstance(strategy, Stateful) else 0
    finally:
        program.close()


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["linux-7.3", "linux-7.3+fault_retry=none"])
@pytest.mark.parametrize("name", ["notifier-protect", "entry-races-request"])
def test_the_same_final_states_as_without_states(name: str, policy: str) -> None:
    plain, _ = every(load_test(name), policy)
    found, states = every(load_test(name), policy, MachineStates)
    assert plain.complete
    assert found.complete
    assert set(found.outcomes) == set(plain.outcomes)
    assert (found.met > 0) == (plain.met > 0)
    assert states > 0
    assert found.executions < plain.executions


class To(Replay):
    """Leads to the state behind a schedule, records it, and gives up."""

    def __init__(self, schedule: Sequence[int], states: MachineStates) -> None:
        super().__init__(tuple(schedule))
        self.states = states
        self.key: tuple[int, tuple[Hashable, ...]] = 0, ()

    def pick(self, enabled: int, last: int) -> int:
        if len(self._schedule) < len(self.given):
            return super().pick(enabled, last)
        self.key = enabled, self.states.controlled()
        return -1


Calls = Callable[[Execution, LitmusProgram, CpuId], None]


def state_behind(calls: Sequence[Calls], schedule: Sequence[int]) -> tuple[int, tuple[Hashable, ...]]:
    """Return the tasks that can go on, and the records of the scheduler's stand-ins, behind the steps of
    tasks with calls of the library, each on a CPU of its own."""
    program = LitmusProgram(load_test("zap-two-roots"), Policy())
    control = program.control
    to = To(schedule, MachineStates(program))
    try:
        with instrument(control):
            program.start(Execution(program.objects, to))  # init
            control.execution = execution = Execution(program.objects, to)
            for cpu, call in enumerate(calls):
                execution.spawn(f"task {cpu}", partial(call, execution, program, CpuId(cpu)))
            execution.run()
            control.execution = None
    finally:
        program.close()
    assert execution.failure is None
    return to.key


def reads(execution: Execution, program: LitmusProgram, cpu: CpuId) -> None:
    library, m = program.control.lib, program.machine.m
    for _ in range(2):
        index = library.srcu_read_lock(m, cpu, VM0)
        execution.step(("inside", cpu, "read"), 0, 0)
        library.srcu_read_unlock(m, cpu, VM0, index)


def synchronizes(execution: Execution, program: LitmusProgram, cpu: CpuId) -> None:
    program.control.lib.synchronize_srcu(program.machine.m, cpu, VM0)


def test_a_grace_period_waits_for_readers_that_have_not_left_since() -> None:
    """Both readers have left once and are inside again, one of them since before the grace period began."""
    calls = (reads, reads, synchronizes)
    waits_for_1 = [0, 1, 1, 1, 2, 0, 0]
    waits_for_0 = [0, 1, 0, 0, 2, 1, 1]
    assert state_behind(calls, waits_for_0) != state_behind(calls, waits_for_1)
    assert state_behind(calls, waits_for_0) == state_behind(calls, waits_for_0)


def locks_for_read(execution: Execution, program: LitmusProgram, cpu: CpuId) -> None:
    library, m = program.control.lib, program.machine.m
    for _ in range(2):
        library.mmu_read_trylock(m, cpu, VM0)
        execution.step(("inside", cpu, "read"), 0, 0)
        library.mmu_read_unlock(m, cpu, VM0)


def locks_for_write(execution: Execution, program: LitmusProgram, cpu: CpuId) -> None:
    execution.step(("before", cpu, "read"), 0, 0)
    program.control.lib.mmu_write_trylock(program.machine.m, cpu, VM0)


def test_a_writer_waits_only_if_it_has_found_the_lock_taken() -> None:
    """One of two writers finds the reader there and makes the lock contended until the writer has it; the
    other one comes while the reader has left it."""
    calls = (locks_for_read, locks_for_write, locks_for_write)
    first, second = [0, 1, 0, 2, 0], [0, 2, 0, 1, 0]
    (able, (locks, *rest)), (others_able, (other_locks, *others)) = (
        state_behind(calls, schedule) for schedule in (first, second)
    )
    assert locks != other_locks
    # Nothing else tells these states apart.
    assert (able, rest) == (others_able, others)
    assert state_behind(calls, first) == state_behind(calls, first)


class Guests(Sampler):
    """The first execution, and what is recorded of each of the guest's accesses."""

    def __init__(self, program: LitmusProgram) -> None:
        super().__init__(1)
        self.program = program
        self.heard: list[tuple[int, list[Hashable]]] = []

    def pick(self, enabled: int, last: int) -> int:
        return (enabled & -enabled).bit_length() - 1

    def stepped(self, task: Task) -> None:
        if task.label[0] == "read":
            self.heard.append((self.program.control.exit_reason, list(task.heard)))


def test_the_result_of_a_guests_operation_is_recorded() -> None:
    """It is kept from the operation to the exit, where the mode has changed and no call has told it."""
    program = LitmusProgram(load_test("away-zap"), Policy())
    hear(program)
    try:
        with instrument(program.control):
            guests = Guests(program)
            search(program, program.objects, guests, Limits(), lambda _: False)
    finally:
        program.close()
    assert {reason for reason, _ in guests.heard} >= {lib.EXIT_EPT_VIOLATION, lib.EXIT_REASONS}
    assert all(reason in heard for reason, heard in guests.heard)


class NoMemory(MachineStates):
    """States without the core's memory."""

    def shared(self) -> Hashable:
        shared = super().shared()
        assert isinstance(shared, tuple)
        return shared[2:]


class NothingShared(MachineStates):
    """States of the tasks alone."""

    def shared(self) -> Hashable:
        return 0


class NoPlaces(MachineStates):
    """States without those of the tasks."""

    def local(self, index: int, history: int) -> Hashable:
        return 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("states_of", "alike"),
    [(MachineStates, True), (NoMemory, False), (NothingShared, False), (NoPlaces, False)],
)
def test_equal_states_go_on_alike(states_of: type[MachineStates], alike: bool) -> None:
    program = ResidueProgram(load_test("zap-range-fault"), named_policy("linux-7.3"))
    hear(program)
    try:
        with instrument(program.control):
            check = StateCheck(program, Ways(program.objects, states_of(program)), 0)
            check.run(150, 100)
    finally:
        program.close()
    assert check.pairs == 100
    assert (not check.findings) == alike


class NoRoots(MachineStates):
    """States that leave out which roots a task has found in the VM's list."""

    def is_read(self, bit: int) -> bool:
        return self.control.objects.names[bit] != ("tdp_mmu_roots", VM0) and super().is_read(bit)


@pytest.mark.parametrize(("states_of", "told"), [(MachineStates, True), (NoRoots, False)])
def test_histories_tell_the_objects_that_tasks_read(states_of: type[MachineStates], told: bool) -> None:
    program = LitmusProgram(load_test("zap-contended"), Policy())
    program.races = untold = Untold(states_of(program))
    try:
        with instrument(program.control), watching(untold, shared_classes()):
            search(program, program.objects, RandomWalk(10, 1), Limits(), lambda _: False)
    finally:
        program.close()
    assert {name.split(":")[0] for name in untold.findings} == (set() if told else {"Kvm.tdp_mmu_roots"})


@pytest.mark.slow
def test_a_race_with_retries_is_proved_in_a_few_executions() -> None:
    """Without states it takes over 30,000."""
    found = explore_verdict(load_test("fault-races-unmap"), Policy(), Plan(executions=5000, stateful=True))
    assert (found.verdict, found.complete, found.limit) == (SAFE, True, "")
    assert found.met
    assert found.states > 100
    assert found.executions < 600
    assert f"in any interleaving: {found.rounds[-1]['executions']:,} executions, behind" in found.summary()
    assert found.document()["stateless"] is None


@pytest.mark.slow
@pytest.mark.parametrize("has_met", [False, True])
def test_executions_end_early_once_the_precondition_was_met(has_met: bool) -> None:
    """The first executions of this search do not meet it, and those that were sampled before may have."""
    program = LitmusProgram(load_test("stale-until-flush"), Policy())
    hear(program)
    try:
        with instrument(program.control):
            strategy = Stateful(program.objects, MachineStates(program), has_met=has_met)
            found = search(program, program.objects, strategy, Limits(runs=150), bool)
    finally:
        program.close()
    assert not found.met
    assert (strategy.matches > 0) == has_met


@pytest.mark.slow
def test_sampled_executions_can_meet_the_precondition() -> None:
    found = explore_verdict(load_test("stale-until-flush"), Policy(), Plan(executions=600, stateful=True))
    last = found.rounds[-1]
    assert last["strategy"] == "stateful"
    assert last["pruned"] > last["executions"] / 4


@pytest.mark.parametrize("policy", ["linux-7.3+fault_retry=none", "mutant:fault-without-retry"])
def test_an_unsafe_policy_is_refuted(policy: str) -> None:
    found = explore_verdict(load_test("fault-races-unmap"), named_policy(policy), Plan(stateful=True))
    assert found.verdict == VIOLATIONS
    assert "use-after-free" in found.kinds


@pytest.mark.parametrize(
    ("policy", "options", "reason"),
    [
        ("mutant:apic-mode-without-flush", NONE, "own code"),
        ("root-tlb-gen", NONE, "own code"),
        ("linux-7.3", ExploreOptions(store_buffers=True), "store buffers"),
        ("linux-7.3", ExploreOptions(evict=1), "TLBs"),
    ],
)
def test_a_search_says_why_it_tells_no_states(policy: str, options: ExploreOptions, reason: str) -> None:
    program = LitmusProgram(load_test("away-zap"), named_policy(policy), options)
    program.close()
    assert reason in stateless(program)


def test_a_retry_loop_rests_only_where_it_keeps_nothing() -> None:
    """The frames below cpu_relax() are those of the loop of KVM_RUN, and no others."""

    def cpu_relax() -> bool:
        return rests_there(sys._getframe())

    def handle_ept_violation() -> bool:
        return cpu_relax()

    def vmx_handle_exit() -> bool:
        return handle_ept_violation()

    def handle_exit() -> bool:
        return vmx_handle_exit()

    def vcpu_enter_guest() -> bool:
        return handle_exit()

    assert vcpu_enter_guest()
    assert not handle_exit()
    assert not cpu_relax()
