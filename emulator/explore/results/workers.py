"""The processes that search parts: this one alone, or a pool in which each has the program."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from types import TracebackType
from typing import Final

from emulator.explore.machine.lib import instrument
from emulator.explore.machine.options import ExploreOptions
from emulator.explore.machine.policy_reads import NOTHING, Grown, Known, Seen
from emulator.explore.machine.program import LitmusProgram
from emulator.explore.strategies.search import Found
from emulator.explore.strategies.subtree import Outcome, Part, search_part
from emulator.litmus.model import LitmusTest
from emulator.litmus.policies import named_policy
from emulator.processes import ProcessPool, ending

# Parts that this process searches before the pool is started, which takes a while.
FIRST_PARTS: Final = 16

# None: the part was given up, because the policy reads more than was known.  Then the races of a patch.
_Searched = tuple[Outcome | None, Seen | None, tuple[str, ...]]

_NOT_BEGUN = Outcome(Found(), ((), ()), (), (), ())


class Team:
    """`jobs` processes, not counting this one if there are several.

    stop: asked between executions in this process, and between parts in the pool; a part that it prevents
    counts as not begun.  told: called for each part that the pool has searched, with its number of runs.
    """

    def __init__(
        self,
        program: LitmusProgram,
        jobs: int,
        stop: Callable[[], bool],
        told: Callable[[int], None] = lambda runs: None,
    ) -> None:
        self.program = program
        self.jobs = jobs
        self.stop = stop
        self.told = told
        self._parts = 0
        self._pool: ProcessPool | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Team:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def outcomes(self, parts: Sequence[Part]) -> Iterator[Outcome]:
        """Yield the outcomes in the order of the parts.  The caller may stop early."""
        if self.jobs == 1 or self._parts < FIRST_PARTS:
            for part in parts:
                self._parts += 1
                yield self._take(_search(self.program, part, self.stop))
            return
        futures = [self._others().submit(_do, part) for part in parts]
        try:
            for future in futures:
                if self.stop() and future.cancel():
                    yield _NOT_BEGUN
                else:
                    outcome = self._take(self._others().result(future))
                    self.told(outcome.found.executions + outcome.found.pruned)
                    yield outcome
        finally:
            _cancel(futures)

    def _take(self, searched: _Searched) -> Outcome:
        """Return a part's outcome, and merge the policy's reads that it has seen.

        Parts do not depend on the process that searches them, and are merged in their order.  Raises Grown.
        """
        outcome, seen, found = searched
        if self.program.races is not None:
            self.program.races.findings.update(found)
        reads = self.program.reads
        if reads is not None and seen is not None:
            reads.merge(seen)
        if outcome is None:
            raise Grown
        return outcome

    def _others(self) -> ProcessPool:
        if self._pool is None:
            program = self.program
            known = None if program.reads is None else program.reads.known
            arguments = (program.test, program.policy.spelled(), program.options, known or NOTHING)
            self._pool = self._stack.enter_context(ProcessPool(self.jobs, _begin, *arguments))
        return self._pool


def _cancel(futures: list[Future[_Searched]]) -> None:
    for future in futures:
        future.cancel()


class _Here:
    """The program of a process in the pool, from its first part to its end."""

    program: LitmusProgram
    stack = ExitStack()


def _begin(test: LitmusTest, policy: str, options: ExploreOptions, known: Known) -> None:
    found = named_policy(policy)
    _Here.stack.enter_context(found.confined())
    _Here.program = LitmusProgram(test, found, options, known=known)
    _Here.stack.enter_context(instrument(_Here.program.control))


def _do(part: Part) -> _Searched:
    return _search(_Here.program, part, ending)


def _search(program: LitmusProgram, part: Part, stop: Callable[[], bool]) -> _Searched:
    if program.reads is None:
        outcome = search_part(program, program.objects, part, bool, stop)
        return outcome, None, _races(program)
    with program.reads.apart() as seen:
        try:
            return search_part(program, program.objects, part, bool, stop), seen, _races(program)
        except Grown:
            return None, seen, ()


def _races(program: LitmusProgram) -> tuple[str, ...]:
    return () if program.races is None else tuple(program.races.findings)
