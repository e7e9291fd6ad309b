"""Search every interleaving of a program, up to the order of independent steps, but each state only once.

Stateful partial-order reduction (Yang, Chen, Gopalakrishnan, Kirby, "Efficient stateful dynamic partial order
reduction", SPIN 2008).  A table holds the states of which all continuations have been searched, each with the
accesses of all steps in its continuations.  An execution that reaches such a state ends there, and the steps
that it leaves out might race with its own.  So the search tries every task at each node whose step conflicts
with a step that was left out.  The result then does not depend on the order of the missing steps.

A state in the table was searched without the tasks of its sleep set, because other parts of the search cover
their steps.  It stands for the present state only if each of these tasks is asleep here, too.

The depth-first order completes a node when all its continuations have been searched, and only then puts its
state into the table.  A state on the present path is not in the table, so a cycle is never taken for a proof.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Protocol

from emulator.explore.engine.objects import Objects, bits, members
from emulator.explore.engine.scheduler import Task, Wait
from emulator.explore.strategies.dpor import Exhaustive, Node

Accesses = dict[int, tuple[int, int]]  # by task: the objects that its steps read and write


class States(Protocol):
    """Gives the states of a program."""

    def shared(self) -> Hashable:
        """Return the shared state; None if it cannot be determined."""

    def local(self, index: int, history: int) -> Hashable:
        """Return the local state of a task between two steps.  history: a number for all that it has read."""

    def rests(self, index: int) -> bool:
        """Return whether a task is at a place where its local state is the place alone."""

    def is_read(self, bit: int) -> bool:
        """Return whether tasks read an object by other means than the results of calls."""

    def is_held(self, bit: int) -> bool:
        """Return whether an object is a lock: readers may hold it, and write other objects meanwhile."""

    def is_read_under(self, bit: int) -> bool:
        """Return whether a writer of a lock may read an object that the lock's readers have written."""


class StatefulNode(Node):
    """A node with a state.

    `key`: the state, if states are compared here; `slept`: the tasks that were asleep when the node was new;
    `history`: the history of the chosen step's task, after the step; `below`: the accesses of all steps from
    here on.
    """

    __slots__ = ("below", "history", "key", "slept")

    def __init__(self, enabled: int, last: int, preemptions: int) -> None:
        super().__init__(enabled, last, preemptions)
        self.key: Hashable = None
        self.slept = 0
        self.history = 0
        self.below: Accesses = {}


class Stateful(Exhaustive):
    """The depth-first strategy with a table of states.

    matches: executions that ended in a state of the table.  There are none until an execution has met the
    precondition: it depends on more than the state, and is known only at the end of a whole execution.
    has_met: an execution before this search has met it.
    """

    def __init__(self, objects: Objects, states: States, *, has_met: bool = False) -> None:
        super().__init__(objects)
        self.has_met = has_met
        self._node = StatefulNode
        self.states = states
        self.matches = 0
        self._known_states: dict[Hashable, list[tuple[int, Accesses]]] = {}
        # Numbers of histories.  A history is the number of the one before, and the values read in one step.
        self._numbers: dict[Hashable, int] = {}
        self._histories: list[int] = []  # by task
        self._versions: dict[int, int] = {}  # by object: the history of its last writer
        self._wrote_by: list[int] = []  # by task: the objects that it has written, as a mask
        # By lock, for its readers since the last writer: the objects that they had written when they touched
        # it, each with the history of its last writer.  Readers of a lock may write what further locks guard
        # among them; a step that writes the lock comes after theirs, and may read that without these locks.
        self._under: dict[int, dict[int, int]] = {}

    @property
    def size(self) -> int:
        """Return the number of states in the table."""
        return len(self._known_states)

    def begin(self, tasks: int) -> None:
        super().begin(tasks)
        self._histories = [0] * tasks
        self._wrote_by = [0] * tasks
        self._versions, self._under = {}, {}
        for node in self.stack[: self._fresh]:
            assert isinstance(node, StatefulNode)
            self._histories[node.chosen] = node.history
            self._accessed_by(node)

    def stepped(self, task: Task) -> None:
        depth = self.depth
        super().stepped(task)
        node = self.stack[depth]
        assert isinstance(node, StatefulNode)
        index, versions, is_read = task.index, self._versions, self.states.is_read
        read = tuple(versions.get(bit, 0) for bit in members(node.reads | node.writes) if is_read(bit))
        under: dict[int, int] = {}
        for bit in members(node.writes):
            if bit in self._under:
                under |= self._under[bit]
        told = (self._histories[index], index, task.label, tuple(task.heard), read, frozenset(under.items()))
        node.history = self._histories[index] = self._number(told)
        self._accessed_by(node)
        _add(node.below, index, node.reads, node.writes)

    def end(self, tasks: list[Task], deadlock: tuple[Wait, ...]) -> bool:
        if deadlock and self.stack:
            last = self.stack[-1]
            assert isinstance(last, StatefulNode)
            for task in tasks:
                if not task.done:
                    _add(last.below, task.index, task.reads, task.writes)
        return super().end(tasks, deadlock)

    def _number(self, told: Hashable) -> int:
        """Return the number of a history; equal histories have one number."""
        return self._numbers.setdefault(told, len(self._numbers) + 1)

    def _accessed_by(self, node: StatefulNode) -> None:
        index, versions, under, states = node.chosen, self._versions, self._under, self.states
        for bit in members(node.writes):
            versions[bit] = node.history
            under.pop(bit, None)
            if states.is_read_under(bit):
                self._wrote_by[index] |= 1 << bit
        wrote = self._wrote_by[index]
        if wrote:
            for bit in members(node.reads & ~node.writes):
                if states.is_held(bit):
                    told = under[bit] = under.get(bit) or {}
                    for one in members(wrote):
                        told[one] = versions[one]

    def _covered(self, node: Node) -> bool:
        if not self.stack:
            return False
        parent, states = self.stack[-1], self.states
        assert isinstance(node, StatefulNode)
        assert isinstance(parent, StatefulNode)
        index = parent.chosen
        if not states.rests(index):
            return False
        shared = states.shared()
        if shared is None:
            return False
        number = self._number(shared)
        # All that the task does from here on follows from its place and the state now.
        parent.history = self._histories[index] = self._number(("rests", index, number))
        locals_now = tuple(states.local(task, history) for task, history in enumerate(self._histories))
        key = number, node.enabled, locals_now
        known = self._known_states.get(key, ()) if self.met or self.has_met else ()
        for slept, below in known:
            if not slept & ~node.sleeping:
                self._race_with(below)
                for task, accesses in below.items():
                    _add(parent.below, task, *accesses)
                self.matches += 1
                self._matched(key)
                return True
        node.key, node.slept = key, node.sleeping
        return False

    def _complete(self, node: Node) -> None:
        assert isinstance(node, StatefulNode)
        if node.key is not None:
            self._known_states.setdefault(node.key, []).append((node.slept, node.below))
        if self.stack:
            parent = self.stack[-1]
            assert isinstance(parent, StatefulNode)
            for task, accesses in node.below.items():
                _add(parent.below, task, *accesses)

    def _matched(self, key: Hashable) -> None:
        """Note that the execution has reached a state of the table: a hook for audits."""

    def _race_with(self, below: Accesses) -> None:
        """Try all tasks at each node with a step that conflicts with a step below and need not precede it."""
        for index, (reads, writes) in below.items():
            for i in bits(self._dependent_steps(reads, writes) & ~self._precede(index)):
                node = self.stack[i]
                if node.chosen != index:
                    node.backtrack |= node.enabled


def _add(below: Accesses, index: int, reads: int, writes: int) -> None:
    before = below.get(index)
    below[index] = (reads, writes) if before is None else (before[0] | reads, before[1] | writes)
