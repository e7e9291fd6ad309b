"""A state's key has parts, and each of them counts: a search that leaves one out takes different states for
one, and the audit that continues them finds it.

Two tasks take their steps in either order and are done, which leaves states that differ in one part only.
The steps of a third task tell them apart.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import pytest

from emulator.explore.audit.continuations import StateCheck, Ways
from emulator.explore.engine.digest import Digest
from emulator.explore.engine.scheduler import Execution, Task
from emulator.explore.machine.lib import instrument
from emulator.explore.machine.program import LitmusProgram
from emulator.explore.machine.states import MachineStates, hear
from emulator.explore.strategies.search import Met
from emulator.litmus.loader import parse_test
from emulator.litmus.thread import LitmusThread
from emulator.policy import Policy
from native import ffi, lib
from native.types import CpuId, Gfn, InvalidateSeq, VmId

VM0: Final = VmId(0)
GFN: Final = Gfn(0x10)  # mapped before the threads begin
# Its threads are replaced.
TEST: Final = parse_test(
    'doc = "x"\nsource = "x"\ninit = ["v0: write 0x10"]\n[[vm]]\n'
    '[threads.v0]\nvcpu = 0\nops = ["read 0x10"]\n'
    + "".join(f'[threads.{name}]\nops = ["wait v0 1"]\n' for name in "bcd"),
    "planted",
    None,
)


@dataclass(slots=True)
class Held:
    """Python objects of each kind that KVM's state is made of."""

    number: int = 0
    flag: int = 0
    items: list[int] = field(default_factory=lambda: [0])
    names: dict[str, int] = field(default_factory=lambda: {"x": 0})
    marks: set[int] = field(default_factory=set)
    memory: bytearray = field(default_factory=lambda: bytearray(1))
    queue: deque[int] = field(default_factory=lambda: deque([0]))


class World:
    """The machine, as a task of a script sees it."""

    def __init__(self, program: Scripted, cpu: CpuId) -> None:
        self.program = program
        self.cpu = cpu
        self.m = program.machine.m
        self.held = program.held
        self.control = program.control

    @property
    def lib(self) -> Any:
        return self.control.lib

    @property
    def execution(self) -> Execution:
        assert self.control.execution is not None
        return self.control.execution

    def step(self, kind: str, *, reads: str = "", writes: str = "") -> None:
        """End the task's step; its next one touches objects with these names."""
        bit = self.control.bit
        self.execution.step(
            (kind, None, "write" if writes else "read"),
            bit(reads) if reads else 0,
            bit(writes) if writes else 0,
        )

    def tell(self, value: Hashable) -> None:
        """Take a step that tells a value, which the task uses no more."""
        self.step(f"tells {value}")


Script = Callable[[World], None]


class Scripted(LitmusProgram):
    """A test of which the threads are scripts."""

    def __init__(self, *scripts: Script) -> None:
        self.scripts = scripts
        self.held = Held()
        super().__init__(TEST, Policy())

    def _build_harness(self) -> None:
        super()._build_harness()
        self.harness.__dict__["held"] = self.held

    def _body(self, thread: LitmusThread) -> Callable[[], None]:
        place = list(self.harness.threads).index(thread.name)
        if place >= len(self.scripts):
            return lambda: None
        return partial(self.scripts[place], World(self, thread.home.id))

    def finish(self, execution: Execution) -> str:
        self.control.execution = None
        return "deadlock" if execution.deadlock else ""

    def met(self) -> Met:
        return Met(True, {})


def writes(change: Callable[[Held], None]) -> Script:
    def script(world: World) -> None:
        world.step("write", writes="held")
        change(world.held)

    return script


def tells(look: Callable[[Held], Hashable]) -> Script:
    def script(world: World) -> None:
        world.step("look", reads="held")
        world.tell(look(world.held))

    return script


# --- states with a part left out ----------------------------------------------------------------------------

PARTS: Final = ("memory", "memory", "objects", "locks", "readers", "holdouts", "roots", "calls")


class Without(MachineStates):
    """States without one part of the shared state."""

    part = ""

    def shared(self) -> Hashable:
        shared = super().shared()
        assert isinstance(shared, tuple)
        return tuple(value for part, value in zip(PARTS, shared, strict=True) if part != self.part)


def without(name: str) -> type[MachineStates]:
    return type(f"Without{name}", (Without,), {"part": name})


class NoHistories(MachineStates):
    """States that forget all that a task has read."""

    def local(self, index: int, history: int) -> Hashable:
        return super().local(index, 0)


class NoVersions(MachineStates):
    """States that forget the Python objects that a task has read."""

    def is_read(self, bit: int) -> bool:
        return False


class NoResults(Ways):
    """A search that forgets the results of a task's calls."""

    def stepped(self, task: Task) -> None:
        task.heard.clear()
        super().stepped(task)


def found(
    scripts: tuple[Script, ...],
    states_of: type[MachineStates] = MachineStates,
    ways_of: type[Ways] = Ways,
) -> tuple[int, dict[str, int]]:
    """Return the number of pairs of ways to one state, and the differences behind them."""
    program = Scripted(*scripts)
    hear(program)
    try:
        with instrument(program.control):
            check = StateCheck(program, ways_of(program.objects, states_of(program)), 0)
            check.run(1000, 60)
            assert not check.strategy.stack, "the search is not complete"
    finally:
        program.close()
    return check.pairs, dict(check.findings)


# --- Python objects -----------------------------------------------------------------------------------------


def put(held: Held, name: str, value: int) -> None:
    """Give an object of one kind a value."""
    if name in ("items", "memory", "queue"):
        getattr(held, name)[0] = value
    elif name == "names":
        held.names["x"] = value
    elif name == "marks":
        held.marks.clear()
        held.marks.add(value)
    else:
        held.number = value


def value_of(held: Held, name: str) -> Hashable:
    value = getattr(held, name)
    return repr(value)


KINDS: Final = {
    "number": "_attributes",
    "items": "_slices",
    "memory": "_slices",
    "names": "_mappings",
    "marks": "_elements",
    "queue": "_elements",
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_python_object_counts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scripts = (
        writes(lambda held: put(held, kind, 1)),
        writes(lambda held: put(held, kind, 2)),
        tells(lambda held: value_of(held, kind)),
    )
    _, differences = found(scripts)
    assert not differences
    _, differences = found(scripts, without("objects"))
    assert differences
    monkeypatch.setattr(Digest, KINDS[kind], lambda digest: iter(()))
    _, differences = found(scripts)
    assert differences


# --- the scheduler's stand-ins, and what tasks have read ----------------------------------------------------


def raises_the_flag(world: World) -> None:
    world.step("raise", writes="flag")
    world.held.flag = 1


def enters_before_the_flag(world: World) -> None:
    world.step("look at the flag", reads="flag")
    if not world.held.flag:
        world.lib.srcu_read_lock(world.m, world.cpu, VM0)


def synchronizes(world: World) -> None:
    world.lib.synchronize_srcu(world.m, world.cpu, VM0)
    world.tell("over")


def reads_twice(world: World) -> None:
    """Enter twice, and leave in a step that conflicts with the begin of a grace period, too.

    Otherwise it would be tried before that begin or behind it, and not both.
    """
    for _ in range(2):
        index = world.lib.srcu_read_lock(world.m, world.cpu, VM0)
        bit = world.control.bit
        world.execution.step(("inside", None, "write"), bit("moment"), bit("srcu", VM0))
        world.lib.srcu_read_unlock(world.m, world.cpu, VM0, index)


def is_done_at_a_moment(world: World) -> None:
    """Conflict with each step of the others.

    States are compared when a task is done, so they are compared between any two of these steps.
    """
    bit = world.control.bit
    shared = (bit(name, VM0) for name in ("srcu", "mmu_invalidate_seq"))
    everywhere = bit("moment") | bit("held") | sum(shared)
    world.execution.step(("moment", None, "write"), 0, everywhere)


def looks_and_tells_later(world: World) -> None:
    world.step("look", reads="held")
    number = world.held.number
    world.step("pause", reads="moment")
    world.tell(number)


def hears_and_tells_later(world: World) -> None:
    """Sample mmu_invalidate_seq, and use the sample when memory does not tell it any more."""
    seq = world.lib.mmu_invalidate_seq(world.m, VM0)
    world.step("pause", reads="moment")
    world.tell(seq)


def sets_seq(number: int) -> Script:
    def script(world: World) -> None:
        world.step("set", writes="number")
        world.execution.touch(0, world.control.bit("mmu_invalidate_seq", VM0))
        lib.mmu_invalidate_seq_init(world.m, VM0, InvalidateSeq(number))

    return script


def samples_seq(world: World) -> None:
    world.tell(world.lib.mmu_invalidate_seq(world.m, VM0))


def revokes_more_behind_the_flag(world: World) -> None:
    """Make one of two promises, which leave the page's right in different states and all other memory equal.

    Each ends the right to write, withdraws the frame's custody once and advances its tag once.
    """
    world.step("look at the flag", reads="flag")
    promise = lib.PROMISE_NOTIFIER if world.held.flag else lib.PROMISE_NOTIFIER_WRITE
    world.lib.oracle_revoke(world.m, world.cpu, VM0, GFN, Gfn(GFN + 1), promise, 0)


def tells_the_right(world: World) -> None:
    world.step("look", reads="custody")
    world.tell(lib.oracle_right(world.m, VM0, GFN, ffi.new("uint32_t *")))


def enters_and_tells_later(world: World) -> None:
    """Read a value in a read section of SRCU, which alone orders the read with the value's writer."""
    world.lib.srcu_read_lock(world.m, world.cpu, VM0)
    number = world.held.number
    world.step("pause", reads="moment")
    world.tell(number)


def writes_behind_readers(world: World) -> None:
    world.execution.step(("synchronize", None, "write"), 0, world.control.bit("srcu", VM0))
    world.held.number = 1


def writes_under_a_lock(world: World) -> None:
    """Write a value as one of the readers of mmu_lock."""
    world.lib.mmu_read_trylock(world.m, world.cpu, VM0)
    world.step("write", writes="held")
    world.held.number = 1
    world.lib.mmu_read_unlock(world.m, world.cpu, VM0)


def locks_and_tells_later(world: World) -> None:
    world.lib.mmu_write_trylock(world.m, world.cpu, VM0)
    number = world.held.number
    world.lib.mmu_write_unlock(world.m, world.cpu, VM0)
    world.step("pause", reads="moment")
    world.tell(number)


class NoSections(MachineStates):
    """States that forget the order of SRCU's read sections and grace periods."""

    def is_read(self, bit: int) -> bool:
        return self.control.objects.names[bit] != ("srcu", VM0) and super().is_read(bit)


class NoHoldouts(NoSections, Without):
    part = "holdouts"


class NoReadersOfLocks(MachineStates):
    """States that forget the values that readers of a lock have written."""

    def is_held(self, bit: int) -> bool:
        return False


PLANTED: Final[dict[str, tuple[tuple[Script, ...], type[MachineStates], type[Ways]]]] = {
    "memory": ((sets_seq(1), sets_seq(2), samples_seq), without("memory"), Ways),
    # Nothing but the ledger differs.
    "ledger": (
        (revokes_more_behind_the_flag, raises_the_flag, tells_the_right),
        without("memory"),
        Ways,
    ),
    "readers": ((enters_before_the_flag, raises_the_flag, synchronizes), without("readers"), Ways),
    "holdouts": (
        (reads_twice, reads_twice, synchronizes, is_done_at_a_moment),
        NoHoldouts,
        Ways,
    ),
    "histories": (
        (looks_and_tells_later, writes(lambda held: put(held, "number", 1)), is_done_at_a_moment),
        NoHistories,
        Ways,
    ),
    "results": ((hears_and_tells_later, sets_seq(1), is_done_at_a_moment), MachineStates, NoResults),
    "sections": (
        (enters_and_tells_later, writes_behind_readers, is_done_at_a_moment),
        NoSections,
        Ways,
    ),
    "readers of locks": (
        (locks_and_tells_later, writes_under_a_lock, is_done_at_a_moment),
        NoReadersOfLocks,
        Ways,
    ),
    "versions": (
        (looks_and_tells_later, writes(lambda held: put(held, "number", 1)), is_done_at_a_moment),
        NoVersions,
        Ways,
    ),
}


@pytest.mark.parametrize(
    "part",
    [pytest.param(part, marks=pytest.mark.slow) if part == "holdouts" else part for part in PLANTED],
)
def test_each_part_of_the_key_counts(part: str) -> None:
    scripts, states_of, ways_of = PLANTED[part]
    # In the sections of that program no value is read: with their order there would be too many states.
    pairs, differences = found(scripts, NoSections if part == "holdouts" else MachineStates)
    assert not differences
    pairs, differences = found(scripts, states_of, ways_of)
    assert differences, pairs


@pytest.mark.parametrize("claims", [False, True])
def test_a_place_where_a_value_is_kept_is_no_rest(claims: bool) -> None:
    def looks(world: World) -> None:
        world.step("look", reads="held")
        number = world.held.number
        world.execution.current.rests = claims
        world.step("pause", reads="moment")
        world.tell(number)

    _, differences = found((looks, writes(lambda held: put(held, "number", 1)), is_done_at_a_moment))
    assert bool(differences) == claims
