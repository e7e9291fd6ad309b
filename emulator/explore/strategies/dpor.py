"""Every interleaving of a program, up to the order of independent steps.

Source-DPOR (Abdulla, Aronsson, Jonsson, Sagonas, "Optimal dynamic partial order reduction", POPL 2014,
algorithm 1) with sleep sets (Godefroid): after each step, the search looks for its races with earlier steps.
For each race that can be reversed, it adds a task that begins the reversed execution to the choices of the
node where the earlier step was taken.  Steps that wait for a condition follow Flanagan and Godefroid (POPL
2005): such a step may be enabled by the very step that it depends on, so it is compared with every concurrent
earlier step, not with the last one only, and no race is reversed at a node where it was disabled.

With a bound on preemptions the choices at a race are not enough, because the reversed execution may need one
more preemption than is left.  The task is therefore tried at the beginning of the block of steps, too (Coons,
Musuvathi, McKinley, "Bounded partial-order reduction", OOPSLA 2013), and no sleep sets are used.
"""

from __future__ import annotations

from collections import defaultdict

from emulator.explore.engine.objects import Objects, accesses, bits
from emulator.explore.engine.scheduler import Divergence, Known, Task, Wait


class Node:
    """A state along the current execution and the step taken from it.

    `backtrack` has the tasks that must be tried here, `done` those that were.  `sleep` maps each task that
    need not be tried here to the reads and writes of its next step.  `before` has a bit for each earlier step
    of the execution that happens before this one.
    """

    __slots__ = (
        "backtrack",
        "before",
        "chosen",
        "done",
        "enabled",
        "last",
        "preemptions",
        "reads",
        "sleep",
        "sleeping",
        "writes",
    )

    def __init__(self, enabled: int, last: int, preemptions: int) -> None:
        self.enabled = enabled
        self.last = last
        self.preemptions = preemptions  # in the steps that lead to this node
        self.backtrack = 0
        self.done = 0
        self.sleep: dict[int, tuple[int, int]] = {}
        self.sleeping = 0
        self.chosen = -1
        self.reads = 0
        self.writes = 0
        self.before = 0


def choices(backtrack: int, enabled: int, begins: int, index: int) -> int:
    """Return the tasks to add at a node so that one of `begins`, preferably `index`, is tried there."""
    if begins & backtrack:
        return 0
    begins &= enabled
    return begins & 1 << index or begins & -begins or enabled


class Exhaustive:
    """The depth-first strategy.  `reduce=False` tries all enabled tasks at every node."""

    exhaustive = True

    def __init__(self, objects: Objects, *, bound: int | None = None, reduce: bool = True) -> None:
        self.objects = objects
        self._node: type[Node] = Node
        self.bound = bound
        self.reduce = reduce
        self.met = 0  # executions so far that met the precondition
        self.bounded_away = False  # a choice was left out because of the bound
        self.stack: list[Node] = []
        self.floor = 0  # nodes before this one belong to another part of the search (subtree.py)
        self.depth = 0
        self._fresh = 0  # steps before this one are replayed
        self._steps: list[Known] = []  # of the current execution
        self._asleep = False  # given up: all enabled tasks are asleep, and their steps covered elsewhere
        self._last_of: list[int] = []  # per task: its last step of this execution
        # Per object: the steps of the execution that wrote it, and those that touched it.
        self._wrote: defaultdict[int, int] = defaultdict(int)
        self._touched: defaultdict[int, int] = defaultdict(int)

    # --- the scheduler's side -------------------------------------------------------------------------------

    def begin(self, tasks: int) -> None:
        self._asleep = False
        self.depth = self._fresh
        last_of = self._last_of = [-1] * tasks
        for depth in range(self._fresh):
            last_of[self.stack[depth].chosen] = depth

    def known(self) -> list[Known]:
        return self._steps[: self._fresh]

    def choose(self, enabled: int, last: int) -> int:
        depth = self.depth
        if depth < len(self.stack):
            node = self.stack[depth]
            if node.enabled != enabled:
                raise Divergence(f"step {depth}: other tasks can go on than at the first time")
            return node.chosen
        node = self._new_node(enabled, last)
        if self.reduce and depth:
            # A task that was enabled and is not any more races with the step that disabled it.
            parent = self.stack[-1]
            stopped = parent.enabled & ~enabled & ~(1 << parent.chosen)
            if stopped:
                self._add_any(depth - 1, stopped)
        able = enabled & ~node.sleeping
        if not able or self._covered(node):
            self._asleep = True
            return -1
        # Go on with the last task if possible: that costs no preemption, so the bound is never exceeded here.
        node.chosen = last if last >= 0 and able >> last & 1 else (able & -able).bit_length() - 1
        node.backtrack = 1 << node.chosen if self.reduce else enabled
        self.stack.append(node)
        return node.chosen

    def stepped(self, task: Task) -> None:
        depth = self.depth
        self.depth += 1
        node = self.stack[depth]
        node.reads, node.writes = task.reads, task.writes
        index = task.index
        if self.reduce:
            previous = self._last_of[index]
            base = self.stack[previous].before | 1 << previous if previous >= 0 else 0
            found = self._accessed(depth, task.reads, task.writes) & ~base
            node.before = base | self._races(depth, index, found, task.was_blocking) if found else base
        self._last_of[index] = depth
        self._steps.append((index, task.label))

    def end(self, tasks: list[Task], deadlock: tuple[Wait, ...]) -> bool:
        """End the execution.  Return whether there is another one, to which the next `choose` calls lead."""
        if self.reduce and self.stack and not self._asleep:
            # The last step may have disabled other tasks, too: daemons, if the execution ends with it.
            last = self.stack[-1]
            others = last.enabled & ~(1 << last.chosen)
            if others:
                self._add_any(len(self.stack) - 1, others)
        if deadlock and self.reduce:
            for task in tasks:
                if not task.done:
                    # The task never took its next step, but it might have been first.
                    found = self._dependent_steps(task.reads, task.writes) & ~self._precede(task.index)
                    self._races(self.depth, task.index, found, True)
        return self._advance()

    def schedule(self) -> tuple[int, ...]:
        return tuple(node.chosen for node in self.stack[: self.depth])

    # --- the search -----------------------------------------------------------------------------------------

    def _new_node(self, enabled: int, last: int) -> Node:
        if not self.stack:
            return self._node(enabled, last, 0)
        parent = self.stack[-1]
        preemptions = parent.preemptions
        if parent.chosen != parent.last:
            preemptions += self._cost(parent, parent.chosen)
        node = self._node(enabled, last, preemptions)
        if parent.sleeping and self.reduce and self.bound is None:
            wrote = parent.writes
            touched = wrote | parent.reads
            for index, step in parent.sleep.items():
                # Two steps do not commute if one writes what the other touches.
                if index != parent.chosen and not (step[1] & touched or wrote & step[0]):
                    node.sleep[index] = step
                    node.sleeping |= 1 << index
        return node

    @staticmethod
    def _cost(node: Node, index: int) -> int:
        """Return 1 if the choice is a preemption: of another task while the last one is enabled."""
        last = node.last
        return node.enabled >> last & 1 if last >= 0 and last != index else 0

    def _affordable(self, node: Node, index: int) -> bool:
        return self.bound is None or node.preemptions + self._cost(node, index) <= self.bound

    def _advance(self) -> bool:
        stack = self.stack
        while len(stack) > self.floor:
            node = stack[-1]
            node.done |= 1 << node.chosen
            left = node.backtrack & ~node.done & ~node.sleeping
            if left and self.reduce and self.bound is None:
                node.sleep[node.chosen] = (node.reads, node.writes)
                node.sleeping |= 1 << node.chosen
            for index in bits(left) if left else ():
                if not self._affordable(node, index):
                    self.bounded_away = True
                    continue
                node.chosen = index
                self._forget_from(len(stack) - 1)
                return True
            stack.pop()
            self._complete(node)
        return False

    def _covered(self, node: Node) -> bool:
        """Return whether all steps that can follow a new node have been searched: a hook for subclasses."""
        return False

    def _complete(self, node: Node) -> None:
        """Note that all steps that can follow a node have been searched: a hook for subclasses."""

    def _forget_from(self, depth: int) -> None:
        self._fresh = depth
        del self._steps[depth:]
        keep = (1 << depth) - 1
        for table in (self._wrote, self._touched):
            for bit in table:
                table[bit] &= keep

    def _accessed(self, depth: int, reads: int, writes: int) -> int:
        """Record the accesses of a step, and return the earlier steps that it depends on."""
        found, mark = 0, 1 << depth
        touched, wrote = self._touched, self._wrote
        written, read = accesses(reads, writes)
        for bit in written:
            steps = touched[bit]
            found |= steps
            touched[bit] = steps | mark
            wrote[bit] |= mark
        for bit in read:
            found |= wrote[bit]
            touched[bit] |= mark
        return found

    # --- races ----------------------------------------------------------------------------------------------

    def _precede(self, index: int) -> int:
        """Return the steps up to the last one of this task that happen before it, and that step."""
        previous = self._last_of[index]
        return 0 if previous < 0 else self.stack[previous].before | 1 << previous

    def _races(self, depth: int, index: int, found: int, blocking: bool) -> int:
        """Add the choices that reverse the races of a step of task `index`, the next after `depth` steps,
        with the earlier steps that it depends on (`found`), apart from those that happen before the task's
        previous step.  Return `found` and the steps that happen before them."""
        stack = self.stack
        previous = self._last_of[index]
        before = candidates = found
        for i in bits(found):
            before |= stack[i].before
        covered = 0
        while candidates:
            i = candidates.bit_length() - 1
            candidates ^= 1 << i
            node = stack[i]
            if node.chosen == index or covered >> i & 1:
                continue
            if (
                blocking
                and i > previous
                and not node.enabled >> index & 1
                and not self._enabled_without(i, before)
            ):
                continue  # it was already waiting there, for this very step or a later one that depends on it
            if not blocking:
                covered |= node.before
            self._reverse_race(i, depth, index, before)
        return before

    def _enabled_without(self, i: int, before: int) -> bool:
        """Return whether the step also depends on a step after i that does not follow from i."""
        return any(not self.stack[k].before >> i & 1 for k in bits(before >> i + 1 << i + 1))

    def _dependent_steps(self, reads: int, writes: int) -> int:
        found = 0
        written, read = accesses(reads, writes)
        for bit in written:
            found |= self._touched[bit]
        for bit in read:
            found |= self._wrote[bit]
        return found

    def _reverse_race(self, i: int, depth: int, index: int, before: int) -> None:
        """Reverse the race of step i with the next step of `index`: first take steps that do not follow i."""
        stack, node = self.stack, self.stack[i]
        after = 0  # steps after i that do not depend on it
        begins = seen = 0
        for k in range(i + 1, depth):
            other = stack[k]
            if other.before >> i & 1 or other.chosen == node.chosen:
                continue
            mark = 1 << other.chosen
            if not seen & mark and not other.before & after:
                begins |= mark
            seen |= mark
            after |= 1 << k
        if not seen >> index & 1 and not before & after:
            begins |= 1 << index
        if self.bound is None:
            self._add(i, begins, index)
        else:
            # At i, and at the beginning of the block of steps around i: a preemption there may be free.
            for k in {i, self._block(i)}:
                self._add_any(k, begins | 1 << index)

    def _add(self, i: int, begins: int, index: int) -> None:
        node = self.stack[i]
        node.backtrack |= choices(node.backtrack, node.enabled, begins, index)

    def _add_any(self, i: int, tasks: int) -> None:
        node = self.stack[i]
        node.backtrack |= tasks & node.enabled or node.enabled

    def _block(self, i: int) -> int:
        stack = self.stack
        while i > 0 and stack[i - 1].chosen == stack[i].chosen:
            i -= 1
        return i
