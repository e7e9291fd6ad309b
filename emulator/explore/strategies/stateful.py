"""Every interleaving of a program, up to the order of independent steps, and each state once.

Stateful partial-order reduction (Yang, Chen, Gopalakrishnan, Kirby, "Efficient stateful dynamic partial order
reduction", SPIN 2008).  A table has the states behind which everything was searched, with the accesses of all
steps there.  An execution that comes to such a state ends.  The steps that it does not take might race with
its own: at each of its nodes of which the step conflicts with one of them, every task is tried, so that
nothing rests on the order of the steps that are missing.

A state was searched without the tasks of its sleep set, whose steps other parts of the search cover.  It
stands for the present one if each of these tasks is asleep here, too: then they are covered here as well.

The depth-first order completes a node when everything behind it has been searched, and only then is its state
in the table.  A state on the present path is none of these, so a cycle is never taken for a proof.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Protocol

from emulator.explore.engine.objects import Objects, bits, members
from emulator.explore.engine.scheduler import Task, Wait
from emulator.explore.strategies.dpor import Exhaustive, Node

Accesses = dict[int, tuple[int, int]]  # by task: the objects that its steps read and write


class States(Protocol):
    """Tells the states of a program."""

    def shared(self) -> Hashable:
        """Return the shared state, None if it cannot be told."""

    def local(self, index: int, history: int) -> Hashable:
        """Return the state of a task between two steps.  history: stands for all that it has read."""

    def rests(self, index: int) -> bool:
        """Return whether a task stands where its local state is its place."""

    def is_read(self, bit: int) -> bool:
        """Return whether tasks read an object otherwise than by the results of calls."""


class StatefulNode(Node):
    """`key`: its state, if it is compared; `slept`: the tasks asleep when it was new; `history`: that of the
    chosen step's task after the step; `below`: the accesses of all steps from here on."""

    __slots__ = ("below", "history", "key", "slept")

    def __init__(self, enabled: int, last: int, preemptions: int) -> None:
        super().__init__(enabled, last, preemptions)
        self.key: Hashable = None
        self.slept = 0
        self.history = 0
        self.below: Accesses = {}


class Stateful(Exhaustive):
    """The depth-first strategy with a table of states.

    matches: executions that ended in a state of the table: none, as long as no execution has met the
    precondition, which depends on more than the state, and is only known of those that come to their ends.
    """

    def __init__(self, objects: Objects, states: States) -> None:
        super().__init__(objects)
        self._node = StatefulNode
        self.states = states
        self.matches = 0
        self._known_states: dict[Hashable, list[tuple[int, Accesses]]] = {}
        # Numbers of histories: each is a history before, and the values read since.
        self._numbers: dict[Hashable, int] = {}
        self._histories: list[int] = []  # by task
        self._versions: dict[int, int] = {}  # by object that tasks read: the history of its last writer

    @property
    def size(self) -> int:
        """Return the number of states in the table."""
        return len(self._known_states)

    def begin(self, tasks: int) -> None:
        super().begin(tasks)
        self._histories = [0] * tasks
        self._versions = {}
        for node in self.stack[: self._fresh]:
            assert isinstance(node, StatefulNode)
            self._histories[node.chosen] = node.history
            self._wrote_by(node)

    def stepped(self, task: Task) -> None:
        depth = self.depth
        super().stepped(task)
        node = self.stack[depth]
        assert isinstance(node, StatefulNode)
        index, versions = task.index, self._versions
        read = tuple(
            versions.get(bit, 0) for bit in members(node.reads | node.writes) if self.states.is_read(bit)
        )
        told = (self._histories[index], index, task.label, tuple(task.heard), read)
        node.history = self._histories[index] = self._number(told)
        self._wrote_by(node)
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
        """Return a number of its own for a history."""
        return self._numbers.setdefault(told, len(self._numbers) + 1)

    def _wrote_by(self, node: StatefulNode) -> None:
        for bit in members(node.writes):
            self._versions[bit] = node.history

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
        for slept, below in self._known_states.get(key, ()) if self.met else ():
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
        """Note that the execution has come to a state of the table: a hook for audits."""

    def _race_with(self, below: Accesses) -> None:
        """Try all tasks at each node whose step one of the steps below may come before."""
        for index, (reads, writes) in below.items():
            for i in bits(self._dependent_steps(reads, writes) & ~self._precede(index)):
                node = self.stack[i]
                if node.chosen != index:
                    node.backtrack |= node.enabled


def _add(below: Accesses, index: int, reads: int, writes: int) -> None:
    before = below.get(index)
    below[index] = (reads, writes) if before is None else (before[0] | reads, before[1] | writes)
