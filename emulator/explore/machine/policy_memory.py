"""The memory of a user's policy: does it change when a retry loop asks the policy again?"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from emulator.explore.engine.snapshot import CannotRestore, Snapshot

if TYPE_CHECKING:
    from emulator.policy import Policy

_OURS = __name__.partition(".")[0]


class Memory:
    """Detects changes of the policy's memory by a query; KVM's objects and counts of answers are not part of
    it."""

    def __init__(self) -> None:
        self.policy: Policy | None = None
        # By task, the innermost query last: a flush by a method is heard of by another method.
        self._before: defaultdict[int, list[Snapshot | None]] = defaultdict(list)
        # The last snapshot, and its policy.
        self._last: Snapshot | None = None
        self._of: Policy | None = None

    def asking(self, task: int) -> None:
        """Record the memory as this task asks; other tasks may ask before it is answered."""
        self._before[task].append(self._now())

    def changed(self, task: int) -> bool:
        """Return whether it has changed since this task's last `asking` without an answer; True if the states
        cannot be compared."""
        queries = self._before[task]
        before, now = queries.pop() if queries else None, self._now()
        if self.policy is None or before is None or now is None:
            return True
        if before is now:
            return False
        with self.policy.guarded():
            return not now.same(before)

    def _now(self) -> Snapshot | None:
        """Return a snapshot: the last one, as long as nothing has changed since."""
        policy, last = self.policy, self._last
        if last is not None and policy is not None:
            with policy.guarded():
                if policy is self._of and last.holds():
                    return last
        self._last, self._of = self._recorded(), policy
        return self._last

    def _recorded(self) -> Snapshot | None:
        policy = self.policy
        assert policy is not None
        given = getattr(policy, "_given", None)

        def constant(obj: object) -> bool:
            ours = type(obj).__module__.partition(".")[0] == _OURS
            return obj is given or (ours and obj is not policy)

        try:
            with policy.guarded():
                return Snapshot((policy,), constant, module=policy.module())
        except CannotRestore:
            return None
