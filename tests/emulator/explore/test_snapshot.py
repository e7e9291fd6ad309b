"""Objects that are put back between two executions: Python's, and with them whole programs."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any
from weakref import ref

import pytest

from emulator.explore.engine.scheduler import Execution, Task
from emulator.explore.engine.snapshot import CannotRestore, Snapshot
from emulator.explore.machine.lib import instrument
from emulator.explore.machine.program import LitmusProgram
from emulator.explore.results.verdict import Plan, explore_verdict
from emulator.explore.strategies.sampling import RandomWalk
from emulator.explore.strategies.search import Limits, run_once
from emulator.litmus.loader import load_test, shipped_texts
from emulator.litmus.policies import named_policy, suits
from native import ffi, lib
from native.types import CpuId, Vpid
from tests.emulator.explore.likeness import describe

POLICIES = ("linux-6.12", "lkml-2025-cpu-flushed-mask", "root-tlb-gen")


class Slots:
    __slots__ = ("__private", "a", "later")

    def __init__(self, a: object) -> None:
        self.a = a
        self.__private = 1

    def raise_it(self) -> int:
        self.__private += 1
        return self.__private


class MoreSlots(Slots):
    __slots__ = ("b",)


class Plain:
    def __init__(self, **attributes: object) -> None:
        self.__dict__.update(attributes)


@dataclass(frozen=True, slots=True)
class Frozen:
    inside: list[int] = field(default_factory=list)


def counting() -> Callable[[], int]:
    n = 0

    def count() -> int:
        nonlocal n
        n += 1
        return n

    return count


# --- objects ------------------------------------------------------------------------------------------------


def test_contents_come_back_in_the_same_objects() -> None:
    inner: list[object] = [1, [2]]
    root = Plain(
        numbers=[3, 1, 2], inner=inner, again=inner, names={"b": 1, "a": [0]}, bag={1, 2, 3},
        queue=deque([1, 2], maxlen=5), marks=bytearray(4), frozen=Frozen([7]), pair=([], {}),
    )  # fmt: skip
    before, objects = describe(root), dict(vars(root))
    snapshot = Snapshot([root])
    for _ in range(3):
        root.numbers.sort()  # type: ignore[attr-defined]
        inner[1].append(3)  # type: ignore[attr-defined]
        inner.append(root)
        root.names["c"] = root.names.pop("b")  # type: ignore[attr-defined]
        root.names["a"].clear()  # type: ignore[attr-defined]
        root.bag.clear()  # type: ignore[attr-defined]
        root.queue.rotate()  # type: ignore[attr-defined]
        root.marks[2] = 9  # type: ignore[attr-defined]
        root.frozen.inside.append(8)  # type: ignore[attr-defined]
        root.pair[0].append(1)  # type: ignore[attr-defined]
        root.again = None  # type: ignore[attr-defined]
        root.more = 1  # type: ignore[attr-defined]
        assert describe(root) != before
        snapshot.restore()
        assert describe(root) == before
        assert all(vars(root)[name] is value for name, value in objects.items())
    assert list(root.names) == ["b", "a"]  # type: ignore[attr-defined]


def test_slots_come_back_set_or_not() -> None:
    obj = MoreSlots([])
    obj.b = 5  # type: ignore[attr-defined]
    snapshot = Snapshot([obj])
    for _ in range(2):
        obj.a = obj.b = None  # type: ignore[attr-defined]
        obj.later = 1  # type: ignore[attr-defined]
        assert obj.raise_it() == 2
        snapshot.restore()
        assert (obj.a, obj.b) == ([], 5)  # type: ignore[attr-defined, comparison-overlap]
        assert not hasattr(obj, "later")
    del obj.a
    snapshot.restore()
    assert obj.a == []


def test_what_code_remembers_comes_back() -> None:
    count = counting()
    bound = Slots(1).raise_it
    count()
    snapshot = Snapshot([count, bound])
    for _ in range(2):
        assert (count(), count(), bound()) == (2, 3, 2)
        snapshot.restore()


def test_memory_of_cffi_comes_back() -> None:
    words = ffi.new("uint64_t[]", [1, 2, 3])
    event = ffi.new("struct event *")
    snapshot = Snapshot([[words, event, ffi.NULL, ffi.cast("void *", 5)]])
    words[1] = event.a = 77
    snapshot.restore()
    assert (list(words), event.a) == ([1, 2, 3], 0)


def test_what_is_constant_or_somebody_elses_is_left_alone() -> None:
    left, aside = Plain(a=1), Slots(iter([]))
    snapshot = Snapshot([left, aside], lambda obj: obj is left, {Slots: frozenset({"a"})})
    left.a, aside.a = 2, 3  # type: ignore[attr-defined]
    snapshot.restore()
    assert (left.a, aside.a) == (2, 3)  # type: ignore[attr-defined]


def generator() -> Iterator[int]:
    yield 1


DUE_TO: dict[str, Callable[[Any], None]] = {
    "an attribute": lambda of: setattr(of.plain, "a", 2),
    "another attribute": lambda of: setattr(of.plain, "b", 2),
    "a slot": lambda of: setattr(of.slots, "a", 2),
    "a slot that was empty": lambda of: setattr(of.slots, "later", 2),
    "a list": lambda of: of.list.append(2),
    "a list's order": lambda of: of.list.reverse(),
    "an equal object in a list": lambda of: of.list.__setitem__(0, float(of.list[0])),
    "a dict": lambda of: of.dict.update(a=2),
    "a dict's key": lambda of: of.dict.pop("a"),
    "a set": lambda of: of.set.add(2),
    "a deque": lambda of: of.deque.pop(),
    "bytes": lambda of: of.bytes.append(2),
    "memory": lambda of: of.memory.__setitem__(0, 2),
    "what a frozen object has": lambda of: of.frozen.inside.append(2),
    "a frozen object": lambda of: object.__setattr__(of.frozen, "inside", []),
    "a closure": lambda of: of.counting(),
    "a default": lambda of: setattr(of.counting, "__defaults__", (1,)),
}


@pytest.mark.parametrize("change", DUE_TO)
def test_a_snapshot_holds_until_something_changes(change: str) -> None:
    of = Plain(
        plain=Plain(a=1), slots=Slots(1), list=[7000, 8000], dict={"a": 1}, set={1}, deque=deque([1]),
        bytes=bytearray(1), memory=ffi.new("int[]", 1), frozen=Frozen([1]), counting=counting(),
    )  # fmt: skip
    snapshot = Snapshot([of])
    assert snapshot.holds()
    DUE_TO[change](of)
    assert not snapshot.holds()


@pytest.mark.parametrize(
    "obj", [iter([1]), generator(), random.Random(1), map(int, []), memoryview(b""), Lock(), ref(Plain)]
)
def test_what_cannot_be_put_back_is_refused(obj: object) -> None:
    with pytest.raises(CannotRestore):
        Snapshot([Plain(state=[obj])])


# --- worlds -------------------------------------------------------------------------------------------------


def world_of(program: LitmusProgram) -> list[str]:
    lines = describe(program.harness, program.machine, program.control.programs)
    return [line.replace("'snapshots'=1", "'snapshots'=0") for line in lines]


def executed(program: LitmusProgram, executions: int, seed: int = 1) -> list[tuple[object, ...]]:
    """Return all steps of some random executions, and their outcomes."""
    strategy = RandomWalk(executions, seed)
    found: list[tuple[object, ...]] = []
    steps: list[object] = []

    def note(task: Task) -> None:
        steps.append((task.name, task.label, task.reads, task.writes))

    start = program.start

    def noted(execution: Execution) -> None:
        start(execution)
        execution.on_step = note

    program.start = noted  # type: ignore[method-assign]
    for _ in range(executions):
        execution = run_once(program, program.objects, strategy, Limits())
        assert execution.failure is None
        found.append((program.finish(execution), tuple(steps)))
        steps.clear()
    program.start = start  # type: ignore[method-assign]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("test", sorted(shipped_texts()))
def test_a_restored_world_is_like_a_new_one(test: str) -> None:
    """And so are its executions: the same steps with the same footprints, and the same outcome."""
    name = POLICIES[len(test) % len(POLICIES)]
    policy = named_policy(name if suits(load_test(test), name) else "linux-7.3")
    used, rebuilt = (LitmusProgram(load_test(test), policy, rebuild=r) for r in (False, True))
    strategy = RandomWalk(1, 1)
    try:
        with instrument(rebuilt.control):
            rebuilt.start(Execution(rebuilt.objects, strategy))
            new = world_of(rebuilt)
            rebuilt.control.execution = None
            want = executed(rebuilt, 3)
        with instrument(used.control):
            used.start(Execution(used.objects, strategy))
            memory = lib.machine_fingerprint(used.machine.m)
            used.control.execution = None
            assert executed(used, 3) == want
            assert executed(used, 3) == want
            used.start(Execution(used.objects, strategy))
            assert world_of(used) == new
            assert lib.machine_fingerprint(used.machine.m) == memory
            used.control.execution = None
    finally:
        used.close()
        rebuilt.close()


def test_the_comparison_sees_a_difference() -> None:
    program = LitmusProgram(load_test("return-zap"), named_policy("linux-6.12"))
    with instrument(program.control):
        program.start(Execution(program.objects, RandomWalk(1, 1)))
        before = world_of(program)
        kvm = program.harness.kvms[0]
        changes: list[Callable[[], Any]] = [
            lambda: kvm.at_host_work.append(CpuId(1)),
            lambda: setattr(kvm.vcpus[0].loaded_vmcs, "cpu", 1),
            lambda: kvm.slots_lock._token.pop(),
            lambda: setattr(program.harness.threads["v0"], "pcpu", 1),
            lambda: program.machine.vmx_vpids.append(Vpid(9)),
        ]
        for change in changes:
            change()
            assert world_of(program) != before
            assert program._initial is not None
            program._initial.restore()
            assert world_of(program) == before
    program.close()


USER_POLICY = """
import random
from emulator.policy import Policy

class Moody(Policy):
    base = "linux-6.12"

    def __init__(self):
        super().__init__()
        self.asked = 0
        {memory}

    def migration(self, cpu, vcpu):
        self.asked += 1
        return {answer}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("memory", "answer", "restores"),
    [
        ("self.last = []", '"none" if self.asked == 2 else "active-roots"', True),
        ("self.dice = random.Random(1)", '"none" if self.dice.random() < 0.9 else "active-roots"', False),
    ],
)
def test_a_policy_remembers_nothing_of_earlier_executions(
    tmp_path: Path, memory: str, answer: str, restores: bool
) -> None:
    path = tmp_path / "moody.py"
    path.write_text(USER_POLICY.format(memory=memory, answer=answer))
    remembers_nothing(path, restores)


def remembers_nothing(path: Path, restores: bool) -> None:
    test, policy = load_test("return-three-pcpus"), named_policy(str(path))
    program, rebuilt = LitmusProgram(test, policy), LitmusProgram(test, policy, rebuild=True)
    with instrument(rebuilt.control):
        want = executed(rebuilt, 8)
    with instrument(program.control):
        assert executed(program, 8) == want
        assert (program._initial is not None) == restores
    asked = [p.harness.policy._mine.asked for p in (program, rebuilt)]  # type: ignore[attr-defined]
    assert asked[0] == asked[1] > 1
    program.close()
    rebuilt.close()


FORGETFUL = """
from collections import deque
from enum import Enum
from emulator.policy import Policy

NUMBER, MEMORY = 0, []

def helper(): ...

class Memory:
    held = 0

def made():
    class Made:
        held = 0
    return Made()

class Kind(Enum):
    ONE = 1

FUNCTIONS, MADE = [lambda: None], made()

class Forgetful(Policy):
    base = "linux-6.12"
    number, memory, queue = 0, {{}}, deque()

    class Nested:
        held = 0

    def __init__(self):
        super().__init__()
        self.asked = 0

    @staticmethod
    def many(by_default=[]):
        by_default.append(1)
        return len(by_default)

    def migration(self, cpu, vcpu, given=[], *, named=[]):
        global NUMBER, LATE
        {remember}
        self.asked = {times}
        return "none" if self.asked == 2 else "active-roots"
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("remember", "times"),
    [
        ("NUMBER += 1", "NUMBER"),
        ("MEMORY.append(1)", "len(MEMORY)"),
        ("LATE = globals().get('LATE', 0) + 1", "LATE"),
        ("helper.times = getattr(helper, 'times', 0) + 1", "helper.times"),
        ("Memory.held += 1", "Memory.held"),
        ("Forgetful.number += 1", "self.number"),
        ("type(self).late = getattr(self, 'late', 0) + 1", "self.late"),
        ("self.memory[len(self.memory)] = 1", "len(self.memory)"),
        ("self.queue.append(1)", "len(self.queue)"),
        ("given.append(1)", "len(given)"),
        ("named.append(1)", "len(named)"),
        ("n = self.many()", "n"),
        ("self.Nested.held += 1", "self.Nested.held"),
        ("type(MADE).held += 1", "MADE.held"),
        ("Kind.ONE.held = getattr(Kind.ONE, 'held', 0) + 1", "Kind.ONE.held"),
        ("FUNCTIONS[0].times = getattr(FUNCTIONS[0], 'times', 0) + 1", "FUNCTIONS[0].times"),
        ("Forgetful.many.times = getattr(self.many, 'times', 0) + 1", "self.many.times"),
    ],
)
def test_nor_does_its_file(tmp_path: Path, remember: str, times: str) -> None:
    path = tmp_path / "forgetful.py"
    path.write_text(FORGETFUL.format(remember=remember, times=times))
    remembers_nothing(path, True)


@pytest.mark.parametrize("policy", ["linux-6.12", "mutant:requests-before-mode"])
def test_a_search_is_the_same_with_and_without(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    test, plan = load_test("entry-races-request"), Plan()
    restored = explore_verdict(test, named_policy(policy), plan)
    init = LitmusProgram.__init__

    def rebuilding(self: LitmusProgram, *arguments: Any, **given: Any) -> None:
        init(self, *arguments, rebuild=True, **given)

    monkeypatch.setattr(LitmusProgram, "__init__", rebuilding)
    rebuilt = explore_verdict(test, named_policy(policy), plan)
    assert restored.rounds == rebuilt.rounds
    assert restored.kinds == rebuilt.kinds
    if restored.counterexample is not None:
        assert rebuilt.counterexample is not None
        assert restored.counterexample.document() == rebuilt.counterexample.document()
