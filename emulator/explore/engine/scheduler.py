"""A controlled scheduler: tasks are greenlets of one thread, and the scheduler runs one of them for one step.

A step is the code between two announcements.  `step()` ends the running task's step and announces the first
access of its next one, so between steps every task stands right before an access to shared state.  `touch()`
adds further accesses to the current step.  A task that cannot go on passes a condition, which is tested
before each choice, and must depend only on the objects that the task announces.

A strategy chooses the next task among those that are enabled.  If none is enabled and some have not finished,
the execution is deadlocked.  Tasks that never finish (interrupts, RCU) are daemons: they do not keep an
execution going.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from greenlet import getcurrent

from emulator.explore.engine.fibers import Body, fiber
from emulator.explore.engine.objects import Objects

Label = tuple[str, Hashable, str]  # kind, object, "read" or "write"
Condition = Callable[[], object]  # true: go on
Known = tuple[int, Label]  # a task, and its step

_KVM = "emulator.kvm."

START: Label = ("start", None, "read")


def spelled(*parts: Hashable) -> str:
    """Join the words of a label's kind and object, say: flatten nested tuples, and skip None."""
    words = (spelled(*part) if isinstance(part, tuple) else str(part) for part in parts if part is not None)
    return " ".join(word for word in words if word)


def stands_in(task: Task) -> str:
    """Return the innermost function of KVM's code on the task's stack, or "" if there is none."""
    frame = sys._getframe() if task.greenlet is getcurrent() else task.greenlet.gr_frame
    while frame is not None:
        if str(frame.f_globals.get("__name__", "")).startswith(_KVM):
            return str(frame.f_code.co_name)
        frame = frame.f_back
    return ""


class Abandoned(BaseException):
    """Unwinds a task after the end of its execution."""


class Divergence(Exception):
    """A replayed execution departs from its recording."""


class Strategy(Protocol):
    """Chooses the next task, and receives each step when it is over, except the `known` ones."""

    def known(self) -> Sequence[Known]:
        """Return the steps that begin the execution and have been executed before: they are replayed, and
        `choose` and `stepped` are called for later steps only."""

    def choose(self, enabled: int, last: int) -> int:
        """Return one of the tasks in the mask, or -1 to give the execution up.  `last` took the last step."""

    def stepped(self, task: Task) -> None:
        """Record the step that was chosen last, now that it is over: task.label, reads, writes."""


class Task:
    """One controlled thread.  `label`, `reads` and `writes` describe its current step or, between steps, its
    next one."""

    __slots__ = (
        "acts_for",
        "awaited",
        "body",
        "changed",
        "daemon",
        "done",
        "greenlet",
        "heard",
        "holders",
        "index",
        "label",
        "looked_at",
        "mark",
        "name",
        "reads",
        "resting",
        "rests",
        "waits_for",
        "was_blocking",
        "watch",
        "writes",
    )

    def __init__(self, index: int, name: str, body: Callable[[], None], daemon: bool) -> None:
        self.index = index
        self.mark = 1 << index if index >= 0 else 0  # in masks of tasks
        self.name = name
        self.body = body
        self.daemon = daemon
        self.greenlet: Any = None
        self.done = False
        self.label: Label = START
        self.looked_at: Label = START  # the label before it waited for a change
        self.reads = 0
        self.writes = 0
        self.was_blocking = False  # the step in question had a condition
        self.waits_for = ""
        self.holders: Callable[[], Iterable[int]] = tuple  # CPUs that hold the lock it waits for
        self.watch = 0  # read by the current iteration of a retry loop
        # Objects that the iteration which await_change() ended has read; 0 after the next step.
        self.awaited = 0
        self.changed = False  # another task has written one of the watched objects
        self.heard: list[Hashable] = []  # results of the current step's calls, if the program records them
        # It stands at a place where it uses no value that it has read before; `rests`: it comes to one when
        # its current step ends.
        self.resting = self.rests = False
        self.acts_for: Task | None = None  # a daemon that continues what this task has begun

    def __repr__(self) -> str:
        return f"<task {self.name}>"


@dataclass(frozen=True, slots=True)
class Wait:
    """A task that is blocked at the end, and the reason.

    function: the innermost function of KVM's code on its stack, "" if there is none.  holders: the CPUs that
    hold the lock, if it waits for one.
    """

    task: str
    label: Label
    waits_for: str
    function: str = ""
    holders: tuple[int, ...] = ()


class Execution:
    """One run of a program's tasks.  After `run`: `failure` (an exception of a task), `pruned` (the strategy
    gave up), `too_long`, `deadlock` (the blocked tasks), `stopped` (`stop` was called).

    Tasks that have not finished by then are unwound where they stand.  The program must restore the state
    that they leave half changed before the next execution.
    """

    __slots__ = (
        "aborting",
        "between",
        "crashed",
        "current",
        "deadlock",
        "failure",
        "hub",
        "known",
        "last",
        "length",
        "limit",
        "next",
        "objects",
        "on_step",
        "on_step_end",
        "pruned",
        "ready",
        "replayed",
        "starting",
        "stopped",
        "strategy",
        "tasks",
        "too_long",
        "waiting",
        "watchers",
    )

    def __init__(self, objects: Objects, strategy: Strategy, limit: int = 5000) -> None:
        self.objects = objects
        self.strategy = strategy
        self.limit = limit
        self.tasks: list[Task] = []
        self.watchers: list[Task] = []  # those with loops that await_change() may block: no daemons
        self.hub: Any = None
        self.current: Task = Task(-1, "none", lambda: None, True)
        self.next: Task | None = None
        self.last = -1
        self.length = 0
        self.known: Sequence[Known] = ()
        self.replayed = 0  # steps before this one are known
        self.ready = 0  # tasks that can go on without a condition
        self.waiting: dict[int, Condition] = {}  # tasks that can go on once their condition holds
        self.starting = True
        self.between = False  # two steps: no task runs
        self.aborting = False
        self.crashed = False
        self.stopped = False
        self.pruned = False
        self.too_long = False
        self.failure: BaseException | None = None
        self.deadlock: tuple[Wait, ...] = ()
        self.on_step: Callable[[Task], None] | None = None
        self.on_step_end: Callable[[Task], None] | None = None  # adds to the step's accesses

    # --- for programs ---------------------------------------------------------------------------------------

    def spawn(self, name: str, body: Callable[[], None], daemon: bool = False) -> Task:
        task = Task(len(self.tasks), name, body, daemon)
        self.tasks.append(task)
        if not daemon:
            self.watchers.append(task)
        return task

    def step(
        self,
        label: Label,
        reads: int,
        writes: int,
        condition: Condition | None = None,
        waits_for: str = "",
    ) -> None:
        """End the running task's step; its next one begins with this access, once `condition` holds."""
        if self.aborting:
            raise Abandoned  # on the way out, in a `finally`
        task = self.current
        if not self.starting:
            self._ended(task)
        task.resting, task.rests = task.rests, False
        task.label = label
        task.reads = reads
        task.writes = writes
        task.was_blocking = condition is not None
        task.waits_for = waits_for
        if condition is None:
            self.ready |= task.mark
        else:
            self.ready &= ~task.mark
            self.waiting[task.index] = condition
        if self.starting:
            self.hub.switch()
        else:
            if self.length < self.replayed:
                if condition is None and self.known[self.length][0] == task.index:
                    self.last = task.index
                    self.between = False
                    return
                chosen: Task | None = self._next_known()
            else:
                chosen = self._choose()
            if chosen is task:
                return
            if chosen is None:
                self.hub.switch()
            else:
                chosen.greenlet.switch()
        if self.aborting:
            raise Abandoned

    def touch(self, reads: int, writes: int) -> None:
        """Add accesses to the current step."""
        task = self.current
        task.reads |= reads
        task.writes |= writes

    def await_change(self, label: Label, *, rests: bool = False) -> None:
        """Block a retry loop until another task writes an object that this iteration has read.

        This is sound: an iteration without side effects that reads the same values repeats the previous one
        (as with await statements; cf. spin loops in stateless model checkers).  Reads of earlier iterations
        do not matter, because this one has ended as they did.

        It requires that each iteration ends here: a loop in which another loop waits forgets its reads before
        that wait, and may seem to deadlock.

        rests: the next iteration uses no local variable with a value that the task has read so far.
        """
        task = self.current
        assert not task.daemon
        task.watch |= task.reads | task.writes
        task.looked_at = task.label
        task.rests = rests
        self.step(label, task.watch, 0, lambda: task.changed)
        task.changed = False
        # The step after the wait depends on all objects that were awaited, the next wait on its own reads.
        task.awaited, task.reads, task.watch = task.reads, 0, 0

    def stop(self) -> None:
        """End the execution with the current step: enough was seen."""
        self.stopped = True

    # --- running --------------------------------------------------------------------------------------------

    def run(self) -> None:
        self.hub = getcurrent()
        self.known = self.strategy.known()
        self.replayed = len(self.known)
        try:
            self._run()
        finally:
            self._abandon()

    def _run(self) -> None:
        for task in self.tasks:
            # Run the task up to its first announcement: before it, it touches no shared state.
            self.current = task
            task.greenlet = fiber()
            task.greenlet.switch(self._body(task))
        self.starting = False
        if self.failure is None:
            self.next = self._next_known() if self.replayed else self._choose()
        while self.next is not None:
            task, self.next = self.next, None
            task.greenlet.switch()

    def _body(self, task: Task) -> Body:
        def body() -> Any:
            try:
                task.body()
                self._done(task)
            except BaseException as error:
                # Errors of a task that is unwound do not count, but Ctrl-C does, in any task.
                if not self.aborting or not isinstance(error, Exception | Abandoned):
                    self._failed(task, error)
            task.greenlet = None
            return self.hub

        return body

    def _done(self, task: Task) -> None:
        task.done = True
        self.ready &= ~task.mark
        if not self.starting:
            self._ended(task)
            self.next = self._next_known() if self.length < self.replayed else self._choose()

    def _failed(self, task: Task, error: BaseException) -> None:
        task.done = self.crashed = True
        self.ready &= ~task.mark
        self.next = None
        if self.failure is None or (isinstance(self.failure, Exception) and not isinstance(error, Exception)):
            self.failure = error

    def _ended(self, task: Task) -> None:
        length = self.length
        self.length = length + 1
        if self.on_step_end is not None:
            self.on_step_end(task)
        self.between = True
        writes = task.writes
        if not task.daemon:
            task.watch |= task.reads
            task.reads |= task.awaited
            task.awaited = 0
        if writes:
            for other in self.watchers:
                if other.watch & writes and other is not task and other is not task.acts_for:
                    other.changed = True
        if length >= self.replayed:
            self.strategy.stepped(task)
            task.heard.clear()
        elif self.known[length][1] != task.label:
            raise Divergence(
                f"step {length} of {task.name}: {task.label}, but {self.known[length][1]} at the first time"
            )
        else:
            task.heard.clear()
        if self.on_step is not None:
            self.on_step(task)

    def _choose(self) -> Task | None:
        if self.stopped:
            return None
        if self.length >= self.limit:
            self.too_long = True
            return None
        enabled = self.ready
        for index, condition in self.waiting.items():
            if condition():
                enabled |= 1 << index
        if not enabled:
            self.deadlock = tuple(
                Wait(
                    task.name,
                    task.label,
                    task.waits_for or f"a change of {spelled(*task.looked_at[:2])}",
                    stands_in(task),
                    tuple(task.holders()),
                )
                for task in self.tasks
                if not task.done and not task.daemon
            )
            return None
        index = self.strategy.choose(enabled, self.last)
        if index < 0:
            self.pruned = True
            return None
        self.last = index
        task = self.tasks[index]
        if not enabled >> index & 1:
            raise Divergence(f"step {self.length}: {task.name} cannot go on, but it could then")
        if not self.ready & task.mark:
            del self.waiting[index]
        self.current = task
        self.between = False
        return task

    def _next_known(self) -> Task:
        """Return the task of the next known step, checked to be enabled."""
        index = self.last = self.known[self.length][0]
        condition = self.waiting.pop(index, None)
        if not (condition() if condition is not None else self.ready >> index & 1):
            raise Divergence(f"step {self.length}: {self.tasks[index].name} cannot go on, but it could then")
        task = self.current = self.tasks[index]
        self.between = False
        return task

    @property
    def clean(self) -> bool:
        """Return whether all tasks have finished, so that no lock is held and no operation is half done."""
        return not self.crashed and all(task.done or task.daemon for task in self.tasks)

    def _abandon(self) -> None:
        """Unwind the tasks that have not finished."""
        self.aborting = True
        for task in self.tasks:
            if task.greenlet is not None:
                self.current = task
                task.greenlet.throw(Abandoned)
