"""The verdict on one mutant: the suite against its code, by explore and then on real threads.

caught       a pair of the suite shows a violation, a failure, a wait without end, or no danger where it
             showed one before; the verdict names the pair, the kind, and the executions up to then
broken       Python itself fails in the mutated statement: no suite is needed to notice
equivalent   argued in equivalent.toml: no execution differs in anything that KVM promises
cost-only    survived, and some price is higher and none lower in the first executions of all pairs
unreached    survived, and no pair reaches the mutated statements
survived     all others
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from bench.mutation import patched
from bench.mutation.generate import Mutant
from bench.mutation.suite import FIRST, GLANCE, Known, Shown, most_of, prices, show
from emulator.errors import BadInput
from emulator.explore.engine.scheduler import Divergence
from emulator.litmus.model import INCONCLUSIVE
from emulator.litmus.policies import named_policy
from emulator.litmus.runner import run_test
from emulator.litmus.verdict import FAILED, VIOLATIONS
from emulator.policy import DEFAULT

CAUGHT: Final = "caught"
BROKEN: Final = "broken"
EQUIVALENT: Final = "equivalent"
COST_ONLY: Final = "cost-only"
UNREACHED: Final = "unreached"
SURVIVED: Final = "survived"
CLASSES: Final = (CAUGHT, BROKEN, EQUIVALENT, COST_ONLY, UNREACHED, SURVIVED)

# Executions on real threads.
_STRESS: Final = 60
# Python's own errors: the mutated statement cannot be executed.
_PYTHONS: Final = (NameError, TypeError, AttributeError)
# ... and those that a mutant causes.
_CRASHES: Final = (*_PYTHONS, BadInput, ValueError, LookupError, ArithmeticError, RuntimeError, Divergence)


@dataclass(frozen=True, slots=True)
class Depth:
    """How long to look for a test that catches a mutant, after a glance at all pairs of the default preset:
    pairs that get a first and a second look, pairs of each other preset, and pairs on real threads."""

    first_looks: int = 32
    second_looks: int = 1000
    of_a_preset: int = 2
    stressed: int = 4


THOROUGH: Final = Depth()
# Under the default preset only, and explored only.
QUICK: Final = Depth(first_looks=16, second_looks=8, of_a_preset=0, stressed=0)


@dataclass(frozen=True, slots=True)
class Judgement:
    """The verdict on a mutant.

    pair, kind, executions: the test that caught it, and how.  by: explore or stress.  why: the text of a
    failure, or the prices that differ.
    """

    name: str
    verdict: str
    by: str = ""
    pair: str = ""
    kind: str = ""
    executions: int = 0
    why: str = ""

    def document(self) -> dict[str, Any]:
        return asdict(self)


def judge(
    mutant: Mutant, all_known: Sequence[Known], say: Callable[[str], None], depth: Depth = THOROUGH
) -> Judgement:
    """Judge a mutant in this process, which has no other use afterwards.  `say` hears of each pair before."""
    patched.apply(mutant.module, mutant.path, mutant.text)
    reaching = reaches(mutant, all_known)
    executions = 0
    for one, most in looks(reaching, depth):
        say(str(one.pair))
        found, caught = _look(mutant, one, most, executions)
        if caught is not None:
            return caught
        executions += found
    for one in reaching[: depth.stressed]:
        say(f"{one.pair} on real threads")
        caught = _stressed(mutant, one)
        if caught is not None:
            return caught
    if not reaching:
        return Judgement(mutant.name, UNREACHED)
    cost = _cost(one for one in reaching if one.prices)
    if cost:
        return Judgement(mutant.name, COST_ONLY, executions=executions, why=cost)
    return Judgement(mutant.name, SURVIVED, executions=executions)


def reaches(mutant: Mutant, all_known: Iterable[Known]) -> list[Known]:
    """Return the pairs that reach a mutated statement, in the order in which they are tried.

    First come the default's, and of these the ones that reach all of the statements, those with further
    choices before the others, and then those that reach little else.
    """
    lines = {(mutant.module, line) for line in mutant.statements}
    found = [one for one in all_known if one.lines & lines]
    return sorted(
        found,
        key=lambda one: (
            one.pair.preset != DEFAULT,
            not lines <= one.lines,
            not one.pair.choices,
            len(one.lines),
            one.pair,
        ),
    )


def is_reached(mutant: Mutant, all_known: Iterable[Known]) -> bool:
    """Return whether some pair reaches all of the mutated statements."""
    lines = {(mutant.module, line) for line in mutant.statements}
    return any(lines <= one.lines for one in all_known)


def looks(reaching: Sequence[Known], depth: Depth) -> list[tuple[Known, int]]:
    """Return the pairs in the order in which they are explored, each with its most executions."""
    default = [one for one in reaching if one.pair.preset == DEFAULT]
    found = [(one, GLANCE) for one in default]
    found += [(one, FIRST) for one in default[: depth.first_looks] if not one.shown.complete]
    found += [(one, most_of(one.pair)) for one in default[: depth.second_looks] if not one.shown.complete]
    seen: dict[str, int] = {}
    for one in reaching:
        preset = one.pair.preset
        seen[preset] = seen.get(preset, 0) + 1
        if preset != DEFAULT and seen[preset] <= depth.of_a_preset:
            found.append((one, most_of(one.pair)))
    return found


def _look(mutant: Mutant, one: Known, most: int, before: int) -> tuple[int, Judgement | None]:
    """Explore a pair; return the number of executions, and the judgement if it caught the mutant."""
    try:
        shown = show(one.pair, most)
    except _CRASHES as error:
        verdict = BROKEN if isinstance(error, _PYTHONS) else CAUGHT
        return 0, Judgement(mutant.name, verdict, "explore", str(one.pair), "crash", before + 1, _text(error))
    kind = differs(one, shown, most)
    if not kind:
        return shown.executions, None
    total = before + shown.executions
    return 0, Judgement(mutant.name, CAUGHT, "explore", str(one.pair), kind, total, shown.failure)


def differs(one: Known, shown: Shown, most: int) -> str:
    """Return in which way a pair differs from its verdict with KVM's code as it is; "": it does not."""
    if shown.verdict == VIOLATIONS:
        return shown.kinds[0].partition(":")[0]
    if shown.verdict == FAILED:
        return "failure"
    vacuous = shown.verdict == INCONCLUSIVE and one.shown.verdict != INCONCLUSIVE
    return INCONCLUSIVE if vacuous and most >= min(most_of(one.pair), one.shown.executions) else ""


def _stressed(mutant: Mutant, one: Known) -> Judgement | None:
    try:
        outcome = run_test(one.pair.litmus, named_policy(one.pair.preset), _STRESS)
    except _CRASHES as error:
        return Judgement(mutant.name, CAUGHT, "stress", str(one.pair), "crash", 1, _text(error))
    if outcome.failure:
        return Judgement(
            mutant.name, CAUGHT, "stress", str(one.pair), "failure", outcome.executions, outcome.failure
        )
    if outcome.kinds:
        kind = next(iter(outcome.kinds))
        return Judgement(mutant.name, CAUGHT, "stress", str(one.pair), kind, outcome.executions)
    return None


def _cost(reaching: Iterable[Known]) -> str:
    """Return the prices that have risen, "" if none has, or if one has fallen."""
    risen: dict[str, int] = {}
    for one in reaching:
        for name, n in prices(one.pair).items():
            if n < one.prices[name]:
                return ""
            if n > one.prices[name]:
                risen[name] = risen.get(name, 0) + n - one.prices[name]
    return ", ".join(f"{n} more {name}" for name, n in risen.items())


def _text(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} in {last.name}()"[:300]
