"""How far an exhaustive search has come: an estimate from the tree that it has explored.

Each choice of a node has an equal share of the node's, the root's is 1, and a search has done the sum of the
shares of its complete subtrees.  The number of executions so far, divided by that sum, estimates their number
altogether: the weighted backtrack estimator (Kilby, Slaney, Thiebaux, Walsh, "Estimating search tree size",
AAAI 2006; after Knuth, "Estimating the efficiency of backtrack programs", Mathematics of Computation 29,
1975).

Source-DPOR adds choices to a node while the subtrees below it are searched.  So the share that is done may
fall, and the estimate grow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from emulator.explore.strategies.dpor import Exhaustive
from emulator.explore.strategies.search import Found
from emulator.explore.strategies.stateful import Stateful
from emulator.explore.strategies.tree import Tree

# Below this share an estimate means nothing.
_LEAST: Final = 1e-6


@dataclass(frozen=True, slots=True)
class Stage:
    """A round of a search as it goes on.

    bound: on preemptions; None: all.  runs: of this round.  share: the part of it that is done, as estimated.
    states: the number of states in its table, 0 if it has none.
    """

    bound: int | None
    runs: int
    share: float
    states: int = 0

    @property
    def left(self) -> int | None:
        """Return the estimated number of runs that are left, None if there is no estimate."""
        return round(self.runs * (1 / self.share - 1)) if self.share > _LEAST else None

    def parts(self) -> tuple[str, ...]:
        """Return the stage in words, the most important ones first."""
        where = "all" if self.bound is None else f"bound {self.bound}"
        # Choices may be added until the last execution.
        done = f"{min(99, int(100 * self.share))} %" if self.share >= 0.01 else "below 1 %"
        left = (f"~{_short(self.left)} left",) if self.left else ()
        states = (f"{self.states:,} states",) if self.states else ()
        return f"{where}: {done}", *left, *states


def stage_of(bound: int | None, search: Exhaustive | Tree, found: Found) -> Stage:
    """Return the stage of a round, with its results so far."""
    share = share_of_tree(search) if isinstance(search, Tree) else share_of_path(search)
    states = search.size if isinstance(search, Stateful) else 0
    return Stage(bound, found.executions + found.pruned, share, states)


def share_of_path(strategy: Exhaustive) -> float:
    """Return the share that a depth-first search has done, which has one path of nodes with choices left."""
    done, share = 0.0, 1.0
    for node in strategy.stack[strategy.floor :]:
        asleep = node.sleeping & ~node.done
        tried = node.done & ~(1 << node.chosen)
        choices = ((node.backtrack | node.done) & ~asleep | 1 << node.chosen).bit_count()
        done += share * tried.bit_count() / choices
        share /= choices
    return done


def share_of_tree(tree: Tree) -> float:
    """Return the share that a search in parts has done."""
    if tree.root is None:
        return 1.0
    done, stack = 0.0, [(1.0, tree.root)]
    while stack:
        share, node = stack.pop()
        asleep = node.sleeping & ~node.gone
        choices = ((node.backtrack | node.gone) & ~asleep).bit_count()
        share /= max(choices, 1)
        done += share * (node.gone.bit_count() - len(node.children))
        stack += [(share, child) for child in node.children.values()]
    return done


def _short(number: int) -> str:
    """Return a number with two digits that count, because it is an estimate."""
    for power, unit in ((9, "G"), (6, "M"), (3, "k")):
        if number >= 10**power:
            return f"{number / 10**power:.{1 if number < 10 ** (power + 1) else 0}f}{unit}"
    return str(number)
