"""Tiny programs of explore's own tests: each task a list of operations on shared variables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from emulator.explore.engine.objects import Objects
from emulator.explore.engine.scheduler import Execution
from emulator.explore.strategies.dpor import Exhaustive
from emulator.explore.strategies.search import Found, Limits, Met, search

Op = tuple[str, ...]


class Tiny:
    """Operations: ("r", x) into the task's register; ("w", x, v); ("inc", x) reads and writes in one step;
    ("lock", x), ("unlock", x); ("wait", x, v) until x is v; ("when", x, y) once
    x is 1 reads y, in one step; ("until", x, v) retries until x is v, with a step for each look at it, and
    ("spin", x, v) looks again in the step behind the wait.  Two operations hold x like a lock: ("mark", x), a
    reader, leaves a mark of the task's own; ("see", x), a writer, reads how many marks there are.  The
    outcome is everything at the end."""

    def __init__(self, *tasks: Sequence[Op], objects: Objects | None = None) -> None:
        self.tasks = tasks
        self.objects = objects or Objects()

    def start(self, execution: Execution) -> None:
        self.shared: dict[str, int] = {}
        self.registers: list[list[int]] = [[] for _ in self.tasks]
        self.places = [0] * len(self.tasks)
        self.execution = execution
        for i in range(len(self.tasks)):
            execution.spawn(f"t{i}", self._body(execution, i))

    def finish(self, execution: Execution) -> str:
        held = "deadlock " + ",".join(wait.task for wait in execution.deadlock) if execution.deadlock else ""
        return f"{sorted(self.shared.items())} {self.registers} {held}"

    def met(self) -> Met:
        return Met(True, {})

    def abandon(self, execution: Execution) -> None:
        pass

    def _is(self, x: str, value: int) -> bool:
        return self.shared.get(x, 0) == value

    def _body(self, execution: Execution, i: int) -> Callable[[], None]:
        shared, bit = self.shared, self.objects.bit

        def body() -> None:
            for place, op in enumerate(self.tasks[i]):
                self.places[i] = place
                kind, x = op[0], op[1]
                mask = bit(x)
                if kind == "r":
                    execution.step((kind, x, "read"), mask, 0)
                    self.registers[i].append(shared.get(x, 0))
                elif kind == "w":
                    execution.step((kind, x, "write"), 0, mask)
                    shared[x] = int(op[2])
                elif kind == "inc":
                    execution.step((kind, x, "write"), mask, mask)
                    shared[x] = shared.get(x, 0) + 1
                elif kind == "mark":
                    execution.step((kind, x, "read"), mask, bit(f"{x} of {i}"))
                    shared[f"{x} of {i}"] = 1
                elif kind == "see":
                    execution.step((kind, x, "write"), 0, mask)
                    self.registers[i].append(sum(mine for key, mine in shared.items() if f"{x} of" in key))
                elif kind == "lock":
                    execution.step((kind, x, "write"), 0, mask, partial(self._is, x, 0), x)
                    shared[x] = 1
                elif kind == "unlock":
                    execution.step((kind, x, "write"), 0, mask)
                    shared[x] = 0
                elif kind == "when":
                    y = op[2]
                    execution.step((kind, x, "read"), mask | bit(y), 0, partial(self._is, x, 1), x)
                    self.registers[i].append(shared.get(y, 0))
                elif kind in ("until", "spin"):
                    self._retry(execution, x, int(op[2]), apart=kind == "until")
                else:
                    wanted = int(op[2])
                    execution.step((kind, x, "read"), mask, 0, partial(self._is, x, wanted), x)

        return body

    def _retry(self, execution: Execution, x: str, wanted: int, *, apart: bool) -> None:
        mask = self.objects.bit(x)
        execution.step(("look", x, "read"), mask, 0)
        found = self._is(x, wanted)
        while not found:
            execution.await_change(("relax", x, "read"))
            if apart:
                execution.step(("look", x, "read"), mask, 0)
            else:
                execution.touch(mask, 0)
            found = self._is(x, wanted)
            execution.step(("pause", x, "read"), 0, 0)


def explore(
    *tasks: Sequence[Op],
    reduce: bool = True,
    bound: int | None = None,
    bad: Callable[[str], bool] = lambda _: False,
) -> Found:
    program = Tiny(*tasks)
    strategy = Exhaustive(program.objects, bound=bound, reduce=reduce)
    return search(program, program.objects, strategy, Limits(), bad)
