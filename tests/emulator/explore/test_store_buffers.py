"""Stores that become visible late: the memory model itself, and barriers that KVM's code must have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from emulator.cli.main import main
from emulator.explain.processor import VISIBLE
from emulator.explore.engine.objects import Objects
from emulator.explore.engine.scheduler import Execution
from emulator.explore.machine.lib import instrument
from emulator.explore.machine.options import ExploreOptions
from emulator.explore.machine.program import LitmusProgram
from emulator.explore.machine.store_buffers import BufferedReaders, Store, StoreBuffers
from emulator.explore.results.replay import load, replay
from emulator.explore.results.verdict import Plan, Verdict, explore_verdict
from emulator.explore.strategies.dpor import Exhaustive
from emulator.explore.strategies.sampling import Pct
from emulator.explore.strategies.search import Found, Limits, Met, search
from emulator.litmus.loader import load_test, shipped_tests
from emulator.litmus.model import SAFE
from emulator.litmus.policies import named_policy
from emulator.litmus.verdict import VIOLATIONS
from emulator.policy import MUTANTS, PRESETS
from native.types import CpuId
from tests.support import CPU0, CPU1

Op = tuple[str, ...]
BARRIERS = [
    (test.name, policy, expected)
    for test in shipped_tests()
    for policy, expected in test.expect.store_buffers.items()
]


class Buffered:
    """Each task is a CPU.  ("w", x, v): a plain store; ("r", x): a load into a register; ("mb",);
    ("xchg", x, v): a locked instruction, which loads, too."""

    def __init__(self, *tasks: list[Op]) -> None:
        self.tasks = tasks
        self.objects = Objects()

    def start(self, execution: Execution) -> None:
        self.memory: dict[str, int] = {}
        self.registers: list[list[int]] = [[] for _ in self.tasks]
        self.stores = StoreBuffers(self.objects)
        for cpu in map(CpuId, range(len(self.tasks))):
            self.stores.add(cpu)
            execution.spawn(f"t{cpu}", self._body(execution, cpu))
        for cpu in map(CpuId, range(len(self.tasks))):
            execution.spawn(f"stores:{cpu}", self.stores.drains(execution, cpu), daemon=True)

    def finish(self, execution: Execution) -> str:
        assert not execution.deadlock
        return f"{sorted(self.memory.items())} {self.registers}"

    def met(self) -> Met:
        return Met(True, {})

    def abandon(self, execution: Execution) -> None:
        pass

    def _body(self, execution: Execution, cpu: CpuId) -> Callable[[], None]:
        memory, stores, bit, registers = self.memory, self.stores, self.objects.bit, self.registers[cpu]

        def write(x: str, value: int) -> Callable[[], None]:
            return lambda: memory.__setitem__(x, value)

        def body() -> None:
            for kind, *operands in self.tasks[cpu]:
                x = operands[0] if operands else ""
                if kind == "w":
                    value = int(operands[1])
                    stores.store(execution, cpu, Store((x,), value, x, bit(x), write(x, value)))
                elif kind == "r":
                    execution.step((kind, x, "read"), bit(x), 0)
                    own = stores.pending(execution, cpu, (x,))
                    registers.append(memory.get(x, 0) if own is None else own.value)
                else:
                    stores.fence(execution, cpu)
                if kind == "xchg":
                    execution.step((kind, x, "write"), bit(x), bit(x))
                    registers.append(memory.get(x, 0))
                    memory[x] = int(operands[1])

        return body


def run(*tasks: list[Op], reduce: bool = True) -> Found:
    program = Buffered(*tasks)
    strategy = Exhaustive(program.objects, reduce=reduce)
    found = search(program, program.objects, strategy, Limits(), lambda outcome: False)
    assert found.complete
    return found


def registers(found: Found) -> set[str]:
    return {outcome.partition("] ")[2] for outcome in found.outcomes}


SB: list[list[Op]] = [[("w", "x", "1"), ("r", "y")], [("w", "y", "1"), ("r", "x")]]


def test_store_buffering_has_the_fourth_outcome() -> None:
    assert registers(run(*SB)) == {"[[0], [0]]", "[[0], [1]]", "[[1], [0]]", "[[1], [1]]"}


@pytest.mark.parametrize("barrier", [("mb",), ("xchg", "z", "1")])
def test_barriers_and_locked_instructions_forbid_it(barrier: Op) -> None:
    found = run(*[[store, barrier, load] for store, load in SB])
    # The value that each has loaded last.
    loads = [json.loads(outcome) for outcome in registers(found)]
    assert {(one[-1], other[-1]) for one, other in loads} == {(0, 1), (1, 0), (1, 1)}


def test_one_barrier_is_not_enough() -> None:
    one = [[SB[0][0], ("mb",), SB[0][1]], SB[1]]
    assert "[[0], [0]]" in registers(run(*one))
    both = [[SB[0][0], ("mb",), SB[0][1]], [SB[1][0], ("mb",), SB[1][1]]]
    assert registers(run(*both)) == {"[[0], [1]]", "[[1], [0]]", "[[1], [1]]"}


def test_stores_stay_in_order_and_so_do_loads() -> None:
    # Message passing: a task that sees the flag sees the data.
    found = run([("w", "data", "1"), ("w", "flag", "1")], [("r", "flag"), ("r", "data")])
    assert registers(found) == {"[[], [0, 0]]", "[[], [0, 1]]", "[[], [1, 1]]"}


def test_all_see_stores_in_one_order() -> None:
    # Independent reads of independent writes.
    found = run([("w", "x", "1")], [("w", "y", "1")], [("r", "x"), ("r", "y")], [("r", "y"), ("r", "x")])
    assert "[[], [], [1, 0], [1, 0]]" not in registers(found)
    assert len(registers(found)) == 15


def test_a_cpu_sees_its_own_store_before_others_do() -> None:
    tasks: list[list[Op]] = [
        [("w", "x", "1"), ("r", "x"), ("r", "y")],
        [("w", "y", "1"), ("r", "y"), ("r", "x")],
    ]
    assert "[[1, 0], [1, 0]]" in registers(run(*tasks))
    # ... its newest one.
    assert registers(run([("w", "x", "1"), ("w", "x", "2"), ("r", "x")])) == {"[[2]]"}


PROGRAMS: list[list[list[Op]]] = [
    SB,
    [[("w", "x", "1"), ("r", "x"), ("r", "y")], [("w", "y", "1"), ("xchg", "x", "2")]],
    [[("w", "x", "1"), ("w", "y", "1"), ("r", "z")], [("w", "z", "1"), ("mb",), ("r", "y"), ("r", "x")]],
    [[("w", "x", "1"), ("mb",), ("w", "x", "2")], [("w", "x", "3"), ("r", "x")]],
    [[("w", "x", "1")], [("r", "x"), ("w", "y", "1")], [("r", "y"), ("r", "x")]],
]


@pytest.mark.parametrize("tasks", PROGRAMS)
def test_the_reduction_loses_no_outcome(tasks: list[list[Op]]) -> None:
    reduced, everything = run(*tasks), run(*tasks, reduce=False)
    assert set(reduced.outcomes) == set(everything.outcomes)
    assert reduced.executions <= everything.executions


def test_a_grace_period_waits_for_stores_that_were_there_before() -> None:
    stores = StoreBuffers(Objects())
    for cpu in (CPU0, CPU1):
        stores.add(cpu)
    readers = BufferedReaders(stores)
    execution = Execution(Objects(), Exhaustive(Objects()))
    stores.store(execution, CPU1, Store(("x",), 1, "x", 1, lambda: None))
    before = readers.now()
    assert not readers.gone(before)
    stores.store(execution, CPU0, Store(("y",), 1, "y", 1, lambda: None))
    stores.queues[1].popleft()
    stores.gone[1] += 1
    assert readers.gone(before)
    assert not readers.gone(readers.now())


# --- KVM ----------------------------------------------------------------------------------------------------


def verdict_of(test: str, policy: str, *, store_buffers: bool, executions: int = 2000) -> Verdict:
    plan = Plan(executions=executions, minimize=False, options=ExploreOptions(store_buffers=store_buffers))
    return explore_verdict(load_test(test), named_policy(policy), plan)


def test_each_barrier_mutant_has_a_test() -> None:
    assert {policy.removeprefix("mutant:") for _, policy, _ in BARRIERS} == {
        name for name, mutant in MUTANTS.items() if mutant.store_buffers
    }


@pytest.mark.slow
@pytest.mark.parametrize(("test", "policy", "expected"), BARRIERS)
def test_a_missing_barrier_matters_with_store_buffers_only(
    test: str, policy: str, expected: tuple[str, ...]
) -> None:
    consistent = verdict_of(test, policy, store_buffers=False)
    assert (consistent.verdict, consistent.complete) == (SAFE, True)
    assert consistent.document()["memory"] == "sequentially consistent"
    assert consistent.summary().endswith(", sequentially consistent")
    found = verdict_of(test, policy, store_buffers=True)
    assert found.verdict == VIOLATIONS
    assert found.kinds[0] in expected
    assert found.document()["memory"] == "x86-TSO"


def proved(test: str, policy: str) -> Found:
    """Everything at once: without the rounds of a verdict."""
    program = LitmusProgram(load_test(test), named_policy(policy), ExploreOptions(store_buffers=True))
    try:
        with instrument(program.control):
            return search(program, program.objects, Exhaustive(program.objects), Limits(), bool)
    finally:
        program.close()


@pytest.mark.slow
@pytest.mark.parametrize("policy", list(PRESETS))
def test_presets_have_the_barriers_that_they_need(policy: str) -> None:
    found = proved("entry-races-request", policy)
    assert found.complete
    assert set(found.outcomes) == {""}


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["linux-7.3", "root-tlb-gen", "cpu-flushed-mask-cleared"])
@pytest.mark.parametrize("test", ["return-zap", "kick-waits", "fault-races-unmap"])
def test_what_is_sound_stays_sound(test: str, policy: str) -> None:
    found = verdict_of(test, policy, store_buffers=True, executions=40)
    assert found.verdict != VIOLATIONS
    assert found.summary().endswith("x86-TSO")


@pytest.mark.slow
def test_other_mutants_are_still_caught() -> None:
    for mutant in ("P1", "P2", "P3"):
        assert verdict_of("entry-races-request", f"mutant:{mutant}", store_buffers=True).verdict == VIOLATIONS


def test_with_the_adversary_as_well() -> None:
    plan = Plan(
        executions=300, minimize=False, options=ExploreOptions(evict=1, speculate=1, store_buffers=True)
    )
    found = explore_verdict(load_test("speculative-fill"), named_policy("migration=none"), plan)
    assert found.verdict == VIOLATIONS
    assert found.summary().endswith("with up to 1 eviction and 1 speculative fill, x86-TSO")


@pytest.mark.slow
def test_a_recording_knows_its_memory_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "explore",
        "entry-races-request",
        "--policy",
        "mutant:entry-without-barrier",
        "--store-buffers",
    ]
    assert main([*arguments, "--output", str(tmp_path)]) == 1
    (path,) = tmp_path.iterdir()
    document = load(path)
    assert document["memory"] == "x86-TSO"
    late = f"{VISIBLE} v0's mode = IN_GUEST_MODE"
    texts = [step["text"] for step in document["steps"]]
    # The check of requests and the request itself come before the store that they should have seen.
    assert texts.index(late) > max(i for i, step in enumerate(document["steps"]) if step["kind"] == "promise")
    assert replay(path).document() == document
    capsys.readouterr()
    main(["explain", str(path)])
    assert "v0's mode = IN_GUEST_MODE" in capsys.readouterr().out
    path.write_text(json.dumps({**document, "memory": "sequentially consistent"}))
    assert main(["explore", "--replay", str(path)]) == 2
    path.write_text(json.dumps({**document, "memory": "weak"}))
    assert main(["explore", "--replay", str(path)]) == 2


def test_ones_own_stores_are_no_change_to_wait_for() -> None:
    """A fault that is tried again while an invalidation lasts: nothing changes by the vCPU's own mode."""
    program = LitmusProgram(
        load_test("kick-waits"), named_policy("linux-7.3"), ExploreOptions(store_buffers=True)
    )
    try:
        with instrument(program.control):
            found = search(program, program.objects, Pct(60, 0, 3), Limits(), bool)
    finally:
        program.close()
    assert found.too_long == 0
