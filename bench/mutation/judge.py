"""The verdict on one mutant: the suite against its code, by explore and then on real threads.

caught       a pair of the suite shows a violation, a failure, a wait without end, or no danger where it
             showed one before; or, after a glance at all pairs, an execution of one has other counts of
             events; the verdict names the pair, the kind, and the executions up to then
broken       Python itself fails in the mutated statement: no suite is needed to notice
equivalent   argued in equivalent.toml: no execution differs in anything that KVM promises
cost-only    survived, adds work by its rule, and some price of an event is higher in the first executions of
             all pairs, and none lower: of an event that is made twice, no price of an event.  A mutant that
             moves work, or leaves it out, is not excused by a price
unreached    survived, and no pair reaches the mutated statements
undecided    not caught, but some look used up its CPU time before it had done its executions
survived     all others
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any, Final

from bench.mutation import patched
from bench.mutation.counts import PRICES, STEPS, WORK, differences
from bench.mutation.generate import Mutant
from bench.mutation.suite import (
    FIRST,
    GLANCE,
    OTHER,
    SECOND,
    Known,
    Pair,
    Shown,
    counts,
    most_of,
    show,
)
from emulator.errors import BadInput
from emulator.explore.engine.scheduler import Divergence
from emulator.explore.strategies.search import Limits
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
UNDECIDED: Final = "undecided"
CLASSES: Final = (CAUGHT, BROKEN, EQUIVALENT, COST_ONLY, UNREACHED, SURVIVED, UNDECIDED)
# The kind of a catch by executions that do not end, although they did with KVM's code as it is.
ENDLESS: Final = "endless"
# The kind of a catch by the counts of an execution alone.
COUNTS: Final = "counts"

# Executions on real threads.
STRESS: Final = 60
ON_REAL_THREADS: Final = " on real threads"
# To flush, kick or wait twice in a row breaks no promise, so the counts of one execution of each pair do.
_ONLY_COSTS: Final = frozenset({"twice-flush", "twice-kick", "twice-request", "twice-barrier"})
# Rules that can make KVM do more, and no less, begin so: they repeat, widen, or weaken a condition.
_ADDS: Final = (
    "twice-", "widen-", "still-pending", "drop-operand", "drop-alternative", "drop-not", "drop-guard",
    "drop-branch", "off-by-one",
)  # fmt: skip
NOTHING_SHOWN: Final = Shown("", (), 0)
# How much the pair that caught this very mutant before promises: more than any number of other catches.
THIS_ONE: Final = 1_000_000
# Python's own errors: the mutated statement cannot be executed.
_PYTHONS: Final = (NameError, TypeError, AttributeError)
# All errors that a mutant may raise.
_CRASHES: Final = (*_PYTHONS, BadInput, ValueError, LookupError, ArithmeticError, RuntimeError, Divergence)


@dataclass(frozen=True, slots=True)
class Depth:
    """How long to look for a test that catches a mutant, besides a glance at all pairs of the default preset.

    at_once: pairs that get a first look before that glance; first_looks, second_looks: pairs that get one
    after it; of_a_preset: pairs of each other preset; long_others: pairs of these presets together that get a
    second look; stressed: pairs on real threads.  few: so few pairs that reach a statement all get a second
    look, because nothing else tests it.
    """

    at_once: int = 3
    first_looks: int = 32
    second_looks: int = 1000
    of_a_preset: int = 2
    long_others: int = 8
    stressed: int = 4
    few: int = 10


THOROUGH: Final = Depth()
# For a population of hundreds.
FAIR: Final = Depth(at_once=10, first_looks=8, second_looks=2, of_a_preset=1, long_others=4, stressed=0)
# Under the default preset only, and explored only.
QUICK: Final = Depth(first_looks=16, second_looks=8, of_a_preset=0, long_others=0, stressed=0)
# As QUICK, but without second looks: a lower bound of the catches, for machines that are busy otherwise.
BRIEF: Final = Depth(first_looks=16, second_looks=0, of_a_preset=0, long_others=0, stressed=0, few=0)


@dataclass(frozen=True, slots=True)
class Look:
    """A number of executions of one pair, explored or on real threads."""

    known: Known
    executions: int
    real: bool = False

    def __str__(self) -> str:
        return f"{self.known.pair}{ON_REAL_THREADS if self.real else ''}"

    @property
    def key(self) -> str:
        return f"{self.known.pair.key}{ON_REAL_THREADS if self.real else ''}"


@dataclass(frozen=True, slots=True)
class Judgement:
    """The verdict on a mutant.

    pair, kind, executions: the test that caught it, and how.  by: explore or stress.  why: the text of a
    failure, or the prices that differ.  looked: the longest look at each pair that caught nothing, in
    executions, by the look's key.
    """

    name: str
    verdict: str
    by: str = ""
    pair: str = ""
    kind: str = ""
    executions: int = 0
    why: str = ""
    looked: dict[str, int] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        return asdict(self)


def judge(
    mutant: Mutant,
    all_known: Sequence[Known],
    say: Callable[[str], None],
    depth: Depth = THOROUGH,
    before: Judgement | None = None,
    telling: Mapping[str, int] = MappingProxyType({}),
    counts_tell: bool = False,
) -> Judgement:
    """Judge a mutant in this process, which has no other use afterwards.  `say` hears of each look before.

    before: an earlier judgement; its looks are not repeated.  telling: see reaches().  counts_tell: the pair
    that caught the mutant before did so by its counts.
    """
    patched.apply(mutant.module, mutant.path, mutant.text)
    reaching = reaches(mutant, all_known, telling)
    before_others = [one for one in reaching if _caught_it(one, telling)]
    looked = dict(before.looked) if before is not None else {}
    executions = before.executions if before is not None else 0
    cut_short: list[str] = []
    priced = [one for one in reaching if one.pair.preset == DEFAULT] or reaching
    if mutant.rule in _ONLY_COSTS and (cost := _cost(mutant, priced)):
        return Judgement(mutant.name, COST_ONLY, why=cost)
    if counts_tell and (miscounted := _miscounted(mutant, before_others, say, executions)) is not None:
        return miscounted
    counted = mutant.rule.startswith(_ADDS)  # more work is a price, unless a test catches it
    at_a_glance = reaching[: depth.at_once]
    for look in pending(reaching, depth, looked, before_others):
        longer = look.executions > _glance(look.known) and look.known not in at_a_glance
        if not counted and longer:
            counted = True
            if (miscounted := _miscounted(mutant, priced, say, executions)) is not None:
                return miscounted
        say(str(look))
        found, caught = (_stressed if look.real else _explored)(mutant, look, executions)
        if caught is not None:
            return caught
        executions += found.executions
        if found.cut_short:
            cut_short.append(str(look))
        looked[look.key] = look.executions
    if not reaching:
        return Judgement(mutant.name, UNREACHED)
    if cut_short:
        return Judgement(mutant.name, UNDECIDED, executions=executions, why=f"cut short: {cut_short[0]}")
    if cost := _cost(mutant, priced):
        return Judgement(mutant.name, COST_ONLY, executions=executions, why=cost, looked=looked)
    if (miscounted := _miscounted(mutant, priced, say, executions)) is not None:
        return miscounted
    return Judgement(mutant.name, SURVIVED, executions=executions, looked=looked)


def reaches(
    mutant: Mutant, all_known: Iterable[Known], telling: Mapping[str, int] = MappingProxyType({})
) -> list[Known]:
    """Return the pairs that reach a mutated statement, in the order in which they are tried.

    First comes the pair that caught this very mutant before, then the default's, and of these the ones that
    promise most: telling has how many similar mutants a pair has caught.  Then come the pairs that reach all
    of the statements, those with further choices before the others, and then those that reach little else.
    """
    lines = {(mutant.module, line) for line in mutant.statements}
    found = [one for one in all_known if one.lines & lines]
    return sorted(
        found,
        key=lambda one: (
            not _caught_it(one, telling),
            one.pair.preset != DEFAULT,
            -telling.get(str(one.pair), 0),
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


def _caught_it(one: Known, telling: Mapping[str, int]) -> bool:
    return telling.get(str(one.pair), 0) >= THIS_ONE


def looks(reaching: Sequence[Known], depth: Depth, before_others: Sequence[Known] = ()) -> Iterator[Look]:
    """Yield the looks at a mutant: short ones at all pairs before long ones at the most promising.

    before_others: pairs that get their longest look before all.
    """
    yield from (Look(one, most_of(one.pair)) for one in before_others)
    default = [one for one in reaching if one.pair.preset == DEFAULT]
    unproved = [one for one in default if not one.shown.complete]
    others = [one for one in reaching if one.pair.preset != DEFAULT]
    only_there = [] if default else _of_each_test(others)
    yield from (Look(one, FIRST) for one in default[: depth.at_once])
    yield from (Look(one, _glance(one)) for one in default)
    yield from (Look(one, OTHER) for one in only_there)
    seen: Counter[str] = Counter()
    for one in others:
        seen[one.pair.preset] += 1
        if seen[one.pair.preset] <= depth.of_a_preset:
            yield Look(one, OTHER)
    yield from (Look(one, FIRST) for one in unproved[: depth.first_looks])
    seconds = depth.second_looks if len(unproved) > depth.few else depth.few
    yield from (Look(one, SECOND) for one in unproved[:seconds])
    yield from (Look(one, SECOND) for one in only_there[: depth.few] if not one.shown.complete)
    yield from (Look(one, SECOND) for one in others[: depth.long_others])
    yield from (Look(one, STRESS, real=True) for one in reaching[: depth.stressed])


def _glance(one: Known) -> int:
    """Return the executions of the first look at a pair: all, if a few more than a glance prove it.

    A mutant may keep every execution from the test's precondition, which only a complete search shows.
    """
    whole = one.shown.complete and GLANCE < one.shown.executions <= FIRST
    return FIRST if whole else GLANCE


def _of_each_test(others: Sequence[Known]) -> list[Known]:
    """Return the first pair of each test, of pairs that reach statements which the default's do not."""
    found: dict[str, Known] = {}
    for one in others:
        found.setdefault(one.pair.test, one)
    return list(found.values())


def pending(
    reaching: Sequence[Known], depth: Depth, looked: Mapping[str, int], before_others: Sequence[Known] = ()
) -> Iterator[Look]:
    """Yield the looks that are left to do; `looked` may grow meanwhile."""
    for look in looks(reaching, depth, before_others):
        if looked.get(look.key, 0) < look.executions:
            yield look


def _explored(mutant: Mutant, look: Look, before: int) -> tuple[Shown, Judgement | None]:
    """Explore a pair; return the result, and the judgement if it caught the mutant."""
    one = look.known
    try:
        shown = show(one.pair, look.executions)
    except _CRASHES as error:
        return NOTHING_SHOWN, _crashed(mutant, "explore", one.pair, before, error)
    kind = differs(one, shown, look.executions)
    if not kind:
        return shown, None
    total = before + shown.executions
    return shown, Judgement(mutant.name, CAUGHT, "explore", str(one.pair), kind, total, shown.failure)


def _crashed(mutant: Mutant, by: str, pair: Pair, before: int, error: Exception) -> Judgement:
    """Judge a mutant with code that raises.  It is broken if the error is Python's own."""
    verdict = BROKEN if by == "explore" and isinstance(error, _PYTHONS) else CAUGHT
    return Judgement(mutant.name, verdict, by, str(pair), "crash", before + 1, _text(error))


def differs(one: Known, shown: Shown, most: int) -> str:
    """Return in which way a pair differs from its verdict with KVM's code as it is; "": it does not."""
    if shown.verdict == VIOLATIONS:
        return shown.kinds[0].partition(":")[0]
    if shown.verdict == FAILED:
        return "failure"
    if shown.endless and one.shown.depth * 2 < Limits().steps:
        return ENDLESS
    vacuous = shown.verdict == INCONCLUSIVE and one.shown.verdict != INCONCLUSIVE
    # A look that was cut short shows nothing by its silence.
    whole = shown.complete or shown.executions >= min(most, most_of(one.pair), one.shown.executions)
    enough = most >= min(most_of(one.pair), one.shown.executions)
    return INCONCLUSIVE if vacuous and whole and enough else ""


def _stressed(mutant: Mutant, look: Look, before: int) -> tuple[Shown, Judgement | None]:
    """Run a pair on real threads; return as _explored() does."""
    pair = look.known.pair
    try:
        outcome = run_test(pair.litmus, named_policy(pair.preset), look.executions)
    except _CRASHES as error:
        return NOTHING_SHOWN, _crashed(mutant, "stress", pair, before, error)
    shown = replace(NOTHING_SHOWN, executions=outcome.executions)
    kind = "failure" if outcome.failure else next(iter(outcome.kinds), "")
    if not kind:
        return shown, None
    total = before + outcome.executions
    return shown, Judgement(mutant.name, CAUGHT, "stress", str(pair), kind, total, outcome.failure)


def _miscounted(
    mutant: Mutant, reaching: Iterable[Known], say: Callable[[str], None], before: int
) -> Judgement | None:
    """Judge a mutant by the counts of one execution of each pair; None: they are as they were."""
    for one in reaching:
        say(str(one.pair))
        try:
            changed = differences(one.counts, counts(one.pair))
        except _CRASHES as error:
            return _crashed(mutant, "explore", one.pair, before, error)
        if changed:
            why = ", ".join(f"{n:+} {name}" for name, n in changed.items())
            return Judgement(mutant.name, CAUGHT, "explore", str(one.pair), COUNTS, before + 1, why)
    return None


def _cost(mutant: Mutant, reaching: Iterable[Known]) -> str:
    """Return the prices that have risen; "" if no event's has, or one has fallen, or the rule adds nothing.

    The number of steps is a price of doing a step twice only: another mutant may have more for any reason.
    An event that is made twice has been made: the other thread may do less work then, as long as no event
    is lacking.
    """
    if not mutant.rule.startswith(_ADDS):
        return ""
    twice = mutant.rule.startswith("twice-")
    priced = [name for name in PRICES if twice or name != STEPS]
    risen: dict[str, int] = {}
    for one in reaching:
        now = counts(one.pair)
        for name in priced:
            more = now[name] - one.counts[name]
            if more < 0 and not (twice and name in WORK):
                return ""
            if more > 0:
                risen[name] = risen.get(name, 0) + more
    if not twice and not risen.keys() - WORK:
        return ""
    return ", ".join(f"{n} more {name}" for name, n in risen.items())


def _text(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} in {last.name}()"[:300]
