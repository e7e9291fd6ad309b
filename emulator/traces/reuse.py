"""Measures how a trace reuses its pages, which decides whether a TLB of a given size helps.

The reuse distance of an access is the number of distinct other pages touched since the last access to the
same page. A fully associative LRU TLB of n entries hits exactly the accesses with a distance below n
(Mattson et al., "Evaluation techniques for storage hierarchies", IBM Systems Journal 9(2), 1970).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from emulator.traces.record import Records, page_numbers

# The default geometry of the modelled TLB: a current server core.
L1_ENTRIES: Final = 64
L2_ENTRIES: Final = 1536
COLD: Final = -1

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PageReuse:
    """Shares of all accesses, which add up to one, and sizes in 4K pages."""

    within_l1: float
    within_l2: float
    beyond_l2: float
    cold: float
    # Entries of the smallest fully associative LRU TLB that hits 99% of all accesses but the cold ones.
    working_set: int


def page_reuse(records: Records) -> PageReuse:
    """Return the reuse profile of a trace."""
    pages = page_numbers(records)
    # An access to the page of its predecessor has distance 0; only changes of the page need the computation.
    changes = np.flatnonzero(np.diff(pages, prepend=~pages[:1]))
    distance = reuse_distances(pages[changes])
    total = float(pages.size)
    same = pages.size - changes.size
    warm = np.sort(distance[distance != COLD])
    within_l1 = same + int(np.searchsorted(warm, L1_ENTRIES))
    within_l2 = same + int(np.searchsorted(warm, L2_ENTRIES))
    wanted = int(np.ceil(0.99 * (same + warm.size))) - same
    # The accesses with distance 0 need one entry, if there are any.
    working_set = int(warm[wanted - 1]) + 1 if wanted > 0 else min(same + warm.size, 1)
    return PageReuse(
        within_l1=within_l1 / total,
        within_l2=(within_l2 - within_l1) / total,
        beyond_l2=(same + warm.size - within_l2) / total,
        cold=(distance.size - warm.size) / total,
        working_set=working_set,
    )


def reuse_distances(pages: npt.NDArray[np.uint64]) -> I64:
    """Return the reuse distance of each access, COLD for the first one of a page.

    Let prev[i] be the last access to the page of i before i.  Count a page between the two at its first
    access j there: prev[i] < j < i and prev[j] <= prev[i].  Every j <= prev[i] also satisfies prev[j] <=
    prev[i], so the distance is the rank of prev[i] among its predecessors less prev[i] + 1.
    """
    prev = _previous(pages)
    warm = prev != COLD
    distance = np.full(pages.size, COLD, dtype=np.int64)
    # Cold accesses rank below everything: they count as predecessors, their own rank is not used.
    key = np.empty(pages.size, dtype=np.int64)
    cold_count = int(pages.size - warm.sum())
    key[warm] = prev[warm] + cold_count
    key[~warm] = np.arange(cold_count)
    rank = _rank_among_predecessors(key)
    distance[warm] = rank[warm] - (prev[warm] + 1)
    return distance


def _previous(pages: npt.NDArray[np.uint64]) -> I64:
    """Return, for each access, the index of the last earlier access to its page, or COLD."""
    order = np.argsort(pages, kind="stable")
    same = pages[order[1:]] == pages[order[:-1]]
    prev = np.full(pages.size, COLD, dtype=np.int64)
    prev[order[1:][same]] = order[:-1][same]
    return prev


def _rank_among_predecessors(key: I64) -> I64:
    """Return, for each element of distinct, non-negative keys, how many earlier ones are smaller.

    A radix partition from the highest bit down: within a run of equal higher bits (in order of time), an
    element with the bit set is above all earlier ones of the run that have it clear.
    """
    rank = np.zeros(key.size, dtype=np.int64)
    order = np.arange(key.size, dtype=np.int64)
    for bit in reversed(range(int(key.max(initial=0)).bit_length())):
        values = key[order]
        run = values >> (bit + 1)
        one = (values >> bit) & 1
        zeros_before = np.cumsum(1 - one) - (1 - one)
        first = np.flatnonzero(np.diff(run, prepend=-1))
        lengths = np.diff(first, append=run.size)
        zeros_in_run = zeros_before - np.repeat(zeros_before[first], lengths)
        rank[order] += np.where(one == 1, zeros_in_run, 0)
        zeros_total = np.repeat(np.add.reduceat(1 - one, first), lengths)
        start = np.repeat(first, lengths)
        index = np.arange(run.size, dtype=np.int64)
        ones_in_run = index - start - zeros_in_run
        target = start + np.where(one == 1, zeros_total + ones_in_run, zeros_in_run)
        order[target] = order.copy()
    return rank
