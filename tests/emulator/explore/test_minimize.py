"""Shorter counterexamples: the possible ends of a candidate."""

from __future__ import annotations

import pytest

from emulator.explore.engine.scheduler import Execution
from emulator.explore.machine.lib import instrument
from emulator.explore.machine.program import LitmusProgram
from emulator.explore.results.minimize import minimized
from emulator.explore.strategies.sampling import RandomWalk
from emulator.explore.strategies.search import Limits, search
from emulator.litmus.loader import load_test
from emulator.litmus.policies import named_policy


class Fails(LitmusProgram):
    """A task of each execution fails, once `error` is set."""

    error: BaseException | None = None

    def start(self, execution: Execution) -> None:
        super().start(execution)
        execution.spawn("fails", self._fail)

    def _fail(self) -> None:
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError()])
def test_an_interrupt_is_no_candidate_that_failed(error: BaseException) -> None:
    program = Fails(load_test("entry-races-request"), named_policy("mutant:requests-before-mode"))
    try:
        with instrument(program.control):
            found = search(program, program.objects, RandomWalk(300, 3), Limits(), bool)
            assert found.schedule is not None
            program.error = error
            if isinstance(error, Exception):
                assert minimized(program, found.schedule, found.outcome) == found.schedule
            else:
                with pytest.raises(KeyboardInterrupt):
                    minimized(program, found.schedule, found.outcome)
    finally:
        program.close()
