"""Keeps the state of a search in its file from time to time, and gives it to the search that goes on.

Between two parts of an exhaustive search, and between two executions of one that samples, the rest of the
search depends on plain values only: the tree, the numbers so far, and the known reads of a user's policy.  A
state is kept only while the search may go on: a part that a signal or --seconds cuts short leaves another
tree than a whole one.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from emulator.explore.engine.objects import name_of
from emulator.explore.machine.policy_reads import Known, Seen
from emulator.explore.machine.program import LitmusProgram
from emulator.explore.results.search_file import SearchFile
from emulator.explore.strategies.portable import Plain, found_of, left_of, plain_found, plain_left
from emulator.explore.strategies.sampling import Sampler
from emulator.explore.strategies.search import Found
from emulator.explore.strategies.tree import Left
from emulator.output import Unwritable

if TYPE_CHECKING:
    from emulator.explore.results.verdict import Verdict

# Seconds between two saves, and the least ratio of that time to the time that a save takes.
PAUSE: Final = 0.5
RATIO: Final = 20
# Fields of a Verdict that a search fills in as it goes on.
_FIELDS: Final = (
    "verdict", "executions", "pruned", "steps", "depth", "complete", "bound", "guarantee", "rounds", "met",
    "evidence", "cut_off", "states",
)  # fmt: skip
# Fields of Seen.
_SETS: Final = ("read", "changed", "contents", "written")


class Keeper:
    """Keeps one search; without a file, nothing.

    stop: whether the search is to end, as the search itself asks.  number: of the round to go on with; 0: the
    search begins.
    """

    def __init__(self, file: SearchFile | None = None, stop: Callable[[], bool] = lambda: False) -> None:
        self._file = file
        self._stop = stop
        self._state: Plain = {} if file is None else file.state
        self._due = 0.0
        self._violation: list[Any] | None = None

    @property
    def known(self) -> Known:
        """Return the accesses of a user's policy that the search that was kept knew."""
        return Known.of(self._state.get("known", {}))

    @property
    def ended(self) -> bool:
        """Return whether the search that was kept has come to its end."""
        return bool(self._state.get("ended"))

    @property
    def number(self) -> int:
        return int(self._round.get("number", 0))

    @property
    def _round(self) -> Plain:
        found = self._state.get("round")
        return found if isinstance(found, dict) else {}

    def forget(self) -> None:
        """Forget the search that was kept: a new one begins, which knows more of the user's policy."""
        self._state = {}

    # --- going on -------------------------------------------------------------------------------------------

    def begin(self, program: LitmusProgram, verdict: Verdict) -> None:
        """Give the program and the verdict what the search had found by then."""
        self._program, self._verdict = program, verdict
        for name, value in self._state.get("verdict", {}).items():
            setattr(verdict, name, Counter(value) if name == "evidence" else value)
        if program.reads is not None and "seen" in self._state:
            program.reads.seen = _seen(self._state["seen"])
        if program.races is not None:
            program.races.findings.update(self._state.get("races", ()))
        verdict.before = verdict.executions + verdict.pruned
        if self._round:
            found = self._round.get("left", self._round).get("found", {})
            verdict.before += found.get("executions", 0) + found.get("pruned", 0)

    def violation(self) -> Found | None:
        """Return the violation with which the search that was kept has ended."""
        found = self._state.get("violation")
        return None if found is None else Found(schedule=tuple(found[0]), outcome=found[1])

    def left(self, number: int) -> Left | None:
        """Return the rest of an exhaustive round."""
        here = "left" in self._round and self._round["number"] == number
        return left_of(self._round["left"]) if here else None

    def sampled(self, strategy: Sampler) -> Found | None:
        """Let a sampling strategy go on; return its results so far."""
        if "sampler" not in self._round:
            return None
        strategy.go_on(self._round["sampler"], self._program.objects)
        return found_of(self._round["found"])

    # --- keeping --------------------------------------------------------------------------------------------

    def keep_round(self, number: int) -> None:
        """Keep the search before this round, unless it goes on in the midst of it."""
        if number > self.number and self._is_due():
            self._save({"round": {"number": number}})

    def keep_left(self, number: int, left: Left) -> None:
        if self._is_due():
            self._save({"round": {"number": number, "left": plain_left(left)}})

    def keep_sampled(self, strategy: Sampler, found: Found) -> None:
        if self._is_due():
            sampler = strategy.plain(self._program.objects)
            self._save({"round": {"number": 1, "sampler": sampler, "found": plain_found(found)}})

    def found(self, found: Found) -> None:
        """Note the violation with which the search ends."""
        self._violation = [found.schedule, found.outcome]

    def end(self) -> None:
        """Keep the end of the search, unless it was cut short."""
        if self._file is not None and not self.ended and not self._stop():
            self._save({"ended": True, "violation": self._violation})

    def _is_due(self) -> bool:
        reads = None if self._file is None else self._program.reads
        return (
            self._file is not None
            and time.monotonic() >= self._due
            and not (reads is not None and reads.grown)
            and not self._stop()
        )

    def _save(self, more: Plain) -> None:
        assert self._file is not None
        started, program = time.monotonic(), self._program
        state: Plain = {"verdict": {name: getattr(self._verdict, name) for name in _FIELDS}, **more}
        if program.reads is not None:
            state |= {"known": program.reads.known.document(), "seen": _plain_seen(program.reads.seen)}
        if program.races is not None:
            state["races"] = list(program.races.findings)
        try:
            self._file.save(state)
        except Unwritable as error:
            # The verdict is worth more than the file: the search goes on, and the command reports it.
            self._verdict.unkept = str(error)
        now = time.monotonic()
        self._due = now + max(PAUSE, RATIO * (now - started))


def _plain_seen(seen: Seen) -> Plain:
    sets = {name: list(getattr(seen, name)) for name in _SETS}
    return {**sets, "unwatched": list(seen.unwatched)}


def _seen(plain: Mapping[str, Any]) -> Seen:
    sets: dict[str, Any] = {name: set(map(name_of, plain[name])) for name in _SETS}
    return Seen(**sets, unwatched=dict.fromkeys(plain["unwatched"]))
