"""The table of a run: mutants by rule and verdict, the kill rate, the survivors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import sqrt

from bench.mutation.generate import Mutant
from bench.mutation.judge import (
    BROKEN,
    CAUGHT,
    CLASSES,
    COST_ONLY,
    EQUIVALENT,
    SURVIVED,
    UNDECIDED,
    UNREACHED,
    Judgement,
)

Judged = Sequence[tuple[Mutant, Judgement]]
# Standard deviations on either side of a normal distribution's middle 95 %.
_DEVIATIONS = 1.96
_RATED = "neither broken, equivalent nor cost-only"


def kill_rate(judged: Judged) -> tuple[int, int]:
    """Return how many were caught of those that are decided and neither broken, equivalent nor cost-only."""
    verdicts = [judgement.verdict for _, judgement in judged]
    caught = verdicts.count(CAUGHT)
    return caught, len(verdicts) - sum(map(verdicts.count, (BROKEN, EQUIVALENT, COST_ONLY, UNDECIDED)))


def interval(caught: int, of: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of the rate in a population from which `of` mutants were drawn."""
    z2 = _DEVIATIONS**2
    middle = (caught + z2 / 2) / (of + z2)
    half = _DEVIATIONS / (of + z2) * sqrt(caught * (of - caught) / of + z2 / 4)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def table(judged: Judged, chosen: int, generated: int) -> str:
    by_rule: dict[str, Counter[str]] = {}
    for mutant, judgement in judged:
        by_rule.setdefault(mutant.rule, Counter())[judgement.verdict] += 1
    width = max([len("all rules"), *map(len, by_rule)])
    lines = [f"{'rule':<{width}}" + "".join(f"{one:>12}" for one in CLASSES)]
    total: Counter[str] = Counter()
    for rule, counts in sorted(by_rule.items()):
        total.update(counts)
        lines.append(f"{rule:<{width}}" + "".join(f"{counts[one] or '':>12}" for one in CLASSES))
    lines.append(f"{'all rules':<{width}}" + "".join(f"{total[one] or '':>12}" for one in CLASSES))
    lines += ["", *_summary(judged, chosen, generated), "", *_listed(judged)]
    return "\n".join(lines)


def _summary(judged: Judged, chosen: int, generated: int) -> list[str]:
    caught, of = kill_rate(judged)
    kinds = Counter(one.kind for _, one in judged if one.verdict == CAUGHT)
    by = Counter(one.by for _, one in judged if one.verdict == CAUGHT)
    rate = f"{100 * caught / of:.1f} %" if of else "none"
    if of and len(judged) < generated:
        low, high = interval(caught, of)
        rate += f" (95 % interval {100 * low:.1f} to {100 * high:.1f} %)"
    undecided = sum(one.verdict == UNDECIDED for _, one in judged)
    left_out = f"; {undecided} undecided are left out" if undecided else ""
    return [
        f"{generated} mutants generated, {chosen} chosen, {len(judged)} judged",
        f"kill rate {rate}: {caught} caught of {of} that are {_RATED}{left_out}",
        "caught by " + ", ".join(f"{name} {n}" for name, n in by.most_common()),
        "as " + ", ".join(f"{name} {n}" for name, n in kinds.most_common()),
    ]


def _listed(judged: Judged) -> list[str]:
    found = []
    for verdict in (SURVIVED, UNREACHED, UNDECIDED, COST_ONLY, EQUIVALENT):
        of = [(mutant, one) for mutant, one in judged if one.verdict == verdict]
        if of:
            found += [
                f"{verdict}:",
                *(f"  {mutant.name}  {mutant.path}:{mutant.line}  {one.why}" for mutant, one in of),
            ]
    return found
