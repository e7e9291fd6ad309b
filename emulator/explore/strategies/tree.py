"""One exhaustive search in parts, with a result that does not depend on the number of processes.

When its budget ends, a depth-first search leaves a path of nodes with choices that were not tried.  Each such
choice becomes a part (subtree.py); parts are searched in rounds, and the paths that they leave become new
branches.  The result does not depend on the number of processes, nor on their speed, because the parts of a
round and their budgets depend on the earlier rounds only, and results are merged in the order of the parts.

As in the depth-first search, the choices of a node are begun one after the other.  The sleep set of a later
choice has the accesses of the earlier choices' first steps, which are known once those steps have been
executed.  Its part need not wait until the earlier subtrees are complete, because the search completes them
in any case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

from emulator.explore.engine.objects import Objects, bits
from emulator.explore.strategies.dpor import Exhaustive, choices
from emulator.explore.strategies.search import Found, Limits, Program, search
from emulator.explore.strategies.subtree import Access, Outcome, Part, Rest, Sleep, rest_of

# Executions of the plain search, before any part is made.
PLAIN: Final = 256
# Executions of a part: enough to outweigh the cost of passing it to another process.
PART: Final = 64
# Parts of a round: enough to keep many processes busy.
ROUND: Final = 32


class Team(Protocol):
    """Searches parts, and yields their outcomes in order."""

    def outcomes(self, parts: Sequence[Part]) -> Iterator[Outcome]: ...


class Branch:
    """A node with work left; see dpor.Node.  `gone`: choices that were tried, or are out of bounds."""

    __slots__ = (
        "backtrack",
        "children",
        "enabled",
        "gone",
        "last",
        "parent",
        "preemptions",
        "sleep",
        "sleeping",
        "step",
        "under_way",
    )

    def __init__(self, parent: Branch | None, step: int, rest: Rest) -> None:
        self.parent = parent
        self.step = step  # the parent's choice that leads here
        self.enabled = rest.enabled
        self.last = rest.last
        self.preemptions = rest.preemptions
        self.backtrack = rest.backtrack
        self.gone = rest.done
        self.sleep: Sleep = dict(rest.sleep)
        self.sleeping = sum(1 << index for index in self.sleep)
        self.children: dict[int, Branch] = {}
        self.under_way = False

    def pending(self) -> int:
        return 0 if self.under_way else self.backtrack & ~self.gone & ~self.sleeping

    def path(self) -> tuple[Branch, ...]:
        """Return the nodes from the root to this one."""
        nodes: list[Branch] = []
        node: Branch | None = self
        while node is not None:
            nodes.append(node)
            node = node.parent
        return tuple(reversed(nodes))

    def falls_asleep(self, index: int, access: Access) -> None:
        self.sleep[index] = access
        self.sleeping |= 1 << index


class Tree:
    """The work that is left of one search."""

    def __init__(self, bound: int | None) -> None:
        self.bound = bound
        self.root: Branch | None = None
        self.bounded_away = False

    # --- the parts of a round -------------------------------------------------------------------------------

    def round(self, most: int) -> list[tuple[Branch, int]]:
        """Return up to `most` nodes and the next choice of each: the deepest first, as in a depth-first
        search.  Near the root, most executions would be pruned, because their tasks are asleep until the work
        below is done."""
        found = list(self._pending())
        found.sort(key=lambda entry: entry[0], reverse=True)
        return [(node, choice) for _, node, choice in found[:most]]

    def _pending(self) -> Iterator[tuple[int, Branch, int]]:
        stack = [(0, self.root)] if self.root is not None else []
        while stack:
            depth, node = stack.pop()
            choice = self._next(node)
            if choice >= 0:
                yield depth, node, choice
            stack += [(depth + 1, child) for child in node.children.values()]

    def _next(self, node: Branch) -> int:
        for index in bits(node.pending()):
            cost = node.last >= 0 and node.last != index and node.enabled >> node.last & 1
            if self.bound is None or node.preemptions + cost <= self.bound:
                return index
            self.bounded_away = True
            node.gone |= 1 << index
        return -1

    @staticmethod
    def prefix(node: Branch, choice: int) -> tuple[int, ...]:
        return (*(branch.step for branch in node.path()[1:]), choice)

    def under(self, prefix: Sequence[int]) -> Branch:
        """Return the node at which the last step of a prefix is chosen."""
        assert self.root is not None
        node = self.root
        for step in prefix[:-1]:
            node = node.children[step]
        return node

    # --- their outcomes -------------------------------------------------------------------------------------

    def grow(self, node: Branch | None, choice: int, rest: tuple[Rest, ...]) -> None:
        """Add the path that a search has left behind this choice; None: it begins at the root."""
        for one in rest:
            child = Branch(node, choice, one)
            if node is None:
                self.root = child
            else:
                node.children[choice] = child
            if one.access is not None:
                child.gone |= 1 << one.chosen
                if self.bound is None:
                    child.falls_asleep(one.chosen, one.access)
            node, choice = child, one.chosen

    def done(self, node: Branch, choice: int, outcome: Outcome) -> None:
        """Record the outcome of a part, and add the choices that it asks for and the path that it leaves."""
        node.under_way = False
        if outcome.found.more and not outcome.rest and outcome.found.schedule is None:
            return  # not begun: the choice stays pending
        node.gone |= 1 << choice
        if self.bound is None:
            node.falls_asleep(choice, outcome.first)
        path = node.path()
        for depth, begins, index in outcome.asked:
            above = path[depth]
            above.backtrack |= choices(above.backtrack, above.enabled, begins, index)
        for depth, tasks in outcome.wanted:
            above = path[depth]
            above.backtrack |= tasks & above.enabled or above.enabled
        self.grow(node, choice, outcome.rest)
        for branch in reversed(path):
            self._prune(branch)

    def _prune(self, node: Branch) -> None:
        if node.children or node.under_way or self._next(node) >= 0:
            return
        if node.parent is None:
            self.root = None
        else:
            del node.parent.children[node.step]


@dataclass(slots=True)
class Left:
    """A search that is not at its end: its tree, its results so far, and the parts of the present round that
    have not been searched."""

    tree: Tree
    found: Found
    parts: Sequence[Part] = ()


def wide_search(
    program: Program,
    objects: Objects,
    bound: int | None,
    limits: Limits,
    bad: Callable[[str], bool],
    team: Team,
    stop: Callable[[], bool] = lambda: False,
    *,
    plain: int = PLAIN,
    part: int = PART,
    left: Left | None = None,
    keep: Callable[[Left], None] = lambda left: None,
    watch: Callable[[Exhaustive | Tree, Found], None] = lambda search, found: None,
) -> Found:
    """Search exhaustively up to the first bad outcome: first plainly in this process, and then, if the search
    is large, in parts by the team.

    left: go on with this search instead.  keep: called after each part; `left` may be a copy of its argument.
    watch: called with the plain search, and with the tree, before the search of each.
    """
    most = limits.executions or 1 << 62
    if left is None:
        strategy, found = Exhaustive(objects, bound=bound), Found()
        watch(strategy, found)
        limited = replace(limits, executions=min(most, plain))
        search(program, objects, strategy, limited, bad, stop, found=found)
        if not found.more or found.schedule is not None or not found.executions:
            return found
        left = Left(Tree(bound), found)
        left.tree.grow(None, -1, rest_of(strategy))
    tree, found = left.tree, left.found
    watch(tree, found)
    while tree.root is not None and found.schedule is None and not stop():
        left.parts = left.parts or _round(tree, replace(limits, executions=part), most - found.executions)
        if not left.parts:
            break
        _do(left, team, keep)
    found.bounded_away |= tree.bounded_away
    found.more = tree.root is not None
    found.complete = not found.more and not found.too_long
    return found


def _round(tree: Tree, limits: Limits, left: int) -> list[Part]:
    """Return the parts of the next round.  limits: of each part; left: executions of all parts together."""
    parts = []
    for node, choice in tree.round(ROUND):
        executions = min(limits.executions, left)
        if executions <= 0:
            break
        left -= executions
        node.under_way = True
        prefix = tree.prefix(node, choice)
        parts.append(Part(prefix, dict(node.sleep), tree.bound, executions, limits.steps))
    return parts


def _do(left: Left, team: Team, keep: Callable[[Left], None]) -> None:
    parts, tree, found = left.parts, left.tree, left.found
    for done, outcome in enumerate(team.outcomes(parts), start=1):
        part = parts[done - 1]
        _merge(found, outcome.found)
        tree.done(tree.under(part.prefix), part.prefix[-1], outcome)
        left.parts = parts[done:]
        if found.schedule is not None:
            return
        keep(left)


def _merge(found: Found, other: Found) -> None:
    found.executions += other.executions
    found.pruned += other.pruned
    found.depth = max(found.depth, other.depth)
    found.steps += other.steps
    found.too_long += other.too_long
    found.met += other.met
    found.evidence.update(other.evidence)
    found.bounded_away |= other.bounded_away
    for outcome, n in other.outcomes.items():
        found.outcomes[outcome] = found.outcomes.get(outcome, 0) + n
    if other.schedule is not None:
        found.schedule, found.outcome = other.schedule, other.outcome
