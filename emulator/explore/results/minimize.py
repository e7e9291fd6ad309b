"""Minimizes a counterexample: fewest context switches, then fewest steps.

Blocks of steps of one task are joined if the outcome stays the same, and steps that the outcome does not need
are postponed until after it.  Every candidate is executed; one that cannot be executed is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator

from emulator.explore.machine.program import LitmusProgram
from emulator.explore.strategies.sampling import Sampler
from emulator.explore.strategies.search import Limits, Program, run_once
from emulator.litmus.failure import LitmusFailure

_ATTEMPTS = 400


class Follow(Sampler):
    """Takes the blocks in order, each as far as its task is enabled, and then any enabled task."""

    def __init__(self, blocks: list[tuple[int, int]]) -> None:
        super().__init__(1)
        self._blocks = list(blocks)
        self._at = 0
        self._taken = 0

    def pick(self, enabled: int, last: int) -> int:
        while self._at < len(self._blocks):
            index, n = self._blocks[self._at]
            if self._taken < n and enabled >> index & 1:
                self._taken += 1
                return index
            self._at += 1
            self._taken = 0
        return last if last >= 0 and enabled >> last & 1 else (enabled & -enabled).bit_length() - 1


def blocks_of(schedule: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return the schedule as blocks of (task, number of steps in a row)."""
    blocks: list[tuple[int, int]] = []
    for index in schedule:
        if blocks and blocks[-1][0] == index:
            blocks[-1] = (index, blocks[-1][1] + 1)
        else:
            blocks.append((index, 1))
    return blocks


def size(schedule: tuple[int, ...]) -> tuple[int, int]:
    return len(blocks_of(schedule)), len(schedule)


def minimized(program: LitmusProgram, schedule: tuple[int, ...], outcome: str) -> tuple[int, ...]:
    """Return the smallest schedule found that still has this outcome."""
    best, attempts, better = schedule, 0, True
    while better:
        better = False
        for blocks in _smaller(blocks_of(best)):
            attempts += 1
            if attempts > _ATTEMPTS:
                return best
            tried = _try(program, blocks, outcome)
            if tried is not None and size(tried) < size(best):
                best, better = tried, True
                break
    return best


def _smaller(blocks: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Yield candidates: a block joins its task's previous or next one, or is left out, hence postponed."""
    for i in range(len(blocks)):
        index, n = blocks[i]
        for j in range(i - 1, -1, -1):
            if blocks[j][0] == index:
                yield [*blocks[:j], (index, blocks[j][1] + n), *blocks[j + 1 : i], *blocks[i + 1 :]]
                break
        for j in range(i + 1, len(blocks)):
            if blocks[j][0] == index:
                yield [*blocks[:i], *blocks[i + 1 : j], (index, n + blocks[j][1]), *blocks[j + 1 :]]
                break
        yield [*blocks[:i], *blocks[i + 1 :]]


def _try(program: Program, blocks: list[tuple[int, int]], outcome: str) -> tuple[int, ...] | None:
    assert isinstance(program, LitmusProgram)
    strategy = Follow(blocks)
    execution = run_once(program, program.objects, strategy, Limits())
    if execution.failure is not None:
        program.abandon(execution)
        if not isinstance(execution.failure, Exception):
            raise execution.failure  # Ctrl-C
        return None
    try:
        same = program.finish(execution) == outcome
    except LitmusFailure:
        return None
    return strategy.schedule() if same else None
