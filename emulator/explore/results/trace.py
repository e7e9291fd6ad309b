"""Traces: the execution of a search that has a number, or that reaches a goal, recorded whatever its outcome.

The search is that of explore_verdict(), in this process alone, so the number of an execution is the one that
verdicts count ("after N interleavings").  It ends with the execution that was sought, or with its own end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, get_args

from emulator.errors import BadInput, one_of, shown
from emulator.explore.engine.scheduler import Execution
from emulator.explore.machine.lib import instrument
from emulator.explore.machine.policy_reads import NOTHING, Known
from emulator.explore.machine.program import LitmusProgram
from emulator.explore.results.record import Recording, record
from emulator.explore.results.verdict import Plan, Stop, Verdict, explore_verdict
from emulator.litmus.failure import LitmusFailure
from emulator.litmus.model import LitmusTest, Need
from emulator.litmus.ops import OpError, parse_op
from emulator.litmus.verdict import proven
from emulator.policy import Policy
from native import lib
from native.types import SignalSlot

# A goal besides the dangers' names: an execution that meets the test's precondition.
NEEDS: Final = "needs"
_DANGERS: Final = tuple(need for need in get_args(Need) if need != "nothing")


@dataclass(frozen=True, slots=True)
class Goal:
    """The execution that is sought.  `reached`: whether the execution of a number, which has just ended, is
    that one."""

    text: str
    reached: Callable[[LitmusProgram, int], bool]


def numbered(number: int) -> Goal:
    return Goal(f"execution {number}", lambda program, n: n == number)


def goal_of(test: LitmusTest, text: str) -> Goal:
    """Return the goal that a user has named: a danger, "needs", or a thread's operation; raises BadInput."""
    if text == NEEDS:
        wanted = " or ".join(test.expect.needs)
        return Goal(f"the precondition ({wanted})", lambda program, n: proven(test, program.evidence()))
    if text in _DANGERS:
        return Goal(text, lambda program, n: program.evidence().get(text, 0) > 0)
    name, _, rest = text.partition(":" if ":" in text else " ")
    name, rest = name.strip(), rest.strip()
    if name not in test.threads:
        known = [f"{thread}: {op}" for thread, section in test.threads.items() for op in section.ops]
        raise BadInput("--reach", shown(text), one_of(text, [NEEDS, *known, *_DANGERS]))
    number = _operation(test, name, rest)
    what = f"{name}: {test.threads[name].ops[number - 1]} (operation {number})"
    thread = tuple(test.threads).index(name)
    return Goal(what, lambda program, n: int(lib.signal_get(program.machine.m, SignalSlot(thread))) >= number)


def _operation(test: LitmusTest, name: str, text: str) -> int:
    """Return the number of a thread's operation: the last of those that are equal, or that number itself."""
    section = test.threads[name]
    texts = [f"{name}: {op}" for op in section.ops]
    expected = one_of(f"{name}: {text}", texts, f", or a number from 1 to {len(texts)} instead")
    if text.isdecimal():
        number = int(text) if len(text) < 6 else 0
        if not 1 <= number <= len(texts):
            raise BadInput("--reach", f"operation {shown(text)} of {name}", expected)
        return number
    try:
        op = parse_op(text, "vcpu" if section.is_vcpu else "kvm")
    except OpError:
        raise BadInput("--reach", shown(f"{name}: {text}"), expected) from None
    same = [i for i, other in enumerate(section.parsed, start=1) if other == op]
    if not same:
        raise BadInput("--reach", shown(f"{name}: {text}"), expected)
    return same[-1]


@dataclass(frozen=True, slots=True)
class Trace:
    """A traced execution, and its number in the search."""

    number: int
    recording: Recording


class _Reached(Exception):
    """Ends the search: this is the execution that was sought."""

    def __init__(self, number: int, schedule: tuple[int, ...], known: Known) -> None:
        super().__init__(f"execution {number}")
        self.number, self.schedule, self.known = number, schedule, known


class _Sought(LitmusProgram):
    """A program that ends its search at the goal."""

    def __init__(self, goal: Goal, *args: Any, **options: Any) -> None:
        self.goal = goal
        self.number = 0
        self.over = False  # the search has found a violation, which ends it; later executions are not its
        super().__init__(*args, **options)

    def finish(self, execution: Execution) -> str:
        try:
            outcome = super().finish(execution)
        except LitmusFailure:
            self._ended(execution)
            raise
        self._ended(execution)
        self.over = self.over or bool(outcome)
        return outcome

    def abandon(self, execution: Execution) -> None:
        super().abandon(execution)
        if execution.failure is not None and isinstance(execution.failure, Exception):
            self._ended(execution)

    def _ended(self, execution: Execution) -> None:
        """Count an execution; raise _Reached if it is the one."""
        if self.over:
            return
        self.number += 1
        if self.goal.reached(self, self.number):
            known = NOTHING if self.reads is None else self.reads.known
            schedule: Any = execution.strategy
            raise _Reached(self.number, schedule.schedule(), known)


def traced(
    test: LitmusTest,
    policy: Policy,
    plan: Plan,
    goal: Goal,
    stop: Stop = lambda: False,
    kind: type[LitmusProgram] = LitmusProgram,
) -> Trace | Verdict:
    """Return the first execution of the search that reaches the goal, or the verdict of a search in which
    none does.  kind: the class of programs that are searched."""
    sought = type(kind.__name__, (_Sought, kind), {})
    try:
        return explore_verdict(test, policy, plan, stop, build=partial(sought, goal))
    except _Reached as found:
        reached = found
    with policy.confined():
        program = kind(test, policy, plan.options, known=reached.known, frozen=True)
        try:
            with instrument(program.control):
                return Trace(reached.number, record(program, reached.schedule, trace=True))
        finally:
            program.close()
