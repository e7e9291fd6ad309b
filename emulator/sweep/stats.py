"""A figure over repetitions: its median and interval, and a test of its difference from the baseline's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

CONFIDENCE: Final = 0.95
# A difference with a p-value above this one may be noise.
SIGNIFICANT: Final = 0.05
# With fewer runs of each side no difference can be significant: 2 / C(2n, n) is above SIGNIFICANT.
LEAST_RUNS: Final = 4
_RESAMPLES: Final = 2000


@dataclass(frozen=True, slots=True)
class Estimate:
    """The runs of one policy at one point.

    `low` and `high`: bootstrap interval of the median, None for a single run or without scipy.  `ratio` and
    `p`: against the baseline's runs, by a two-sided Mann-Whitney test.
    """

    runs: int
    median: float
    low: float | None = None
    high: float | None = None
    ratio: float | None = None
    p: float | None = None

    @property
    def differs(self) -> bool | None:
        """Return whether the difference from the baseline is more than noise; None: it was not tested."""
        return None if self.p is None else self.p <= SIGNIFICANT


def estimate(values: Sequence[float], baseline: Sequence[float] | None) -> Estimate:
    """Return the estimate of some runs; `baseline` is None for the baseline's own."""
    low, high = _interval(values)
    middle = median(values)
    if not baseline:
        return Estimate(len(values), middle, low, high)
    reference = median(baseline)
    ratio = middle / reference if reference else None
    return Estimate(len(values), middle, low, high, ratio, _mann_whitney(values, baseline))


def has_scipy() -> bool:
    try:
        import scipy.stats  # noqa: F401
    except ImportError:
        return False
    return True


def _interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the percentile bootstrap interval of the median.  It depends on the values alone: the
    resampling has a fixed seed."""
    if len(values) < 2 or not has_scipy():
        return None, None
    if min(values) == max(values):
        return values[0], values[0]
    import numpy as np
    from scipy.stats import bootstrap

    found = bootstrap(
        (np.asarray(sorted(values)),),
        np.median,
        n_resamples=_RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


def _mann_whitney(values: Sequence[float], baseline: Sequence[float]) -> float | None:
    if min(len(values), len(baseline)) < LEAST_RUNS or not has_scipy():
        return None
    from scipy.stats import mannwhitneyu

    p = float(mannwhitneyu(values, baseline, alternative="two-sided").pvalue)
    return 1.0 if math.isnan(p) else p
