"""What a user's policy remembers, as far as a loop that asks it again and again is concerned."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emulator.explore.engine.snapshot import CannotRestore, Snapshot

if TYPE_CHECKING:
    from emulator.policy import Policy

_OURS = __name__.partition(".")[0]


class Memory:
    """Has asking changed it?  KVM's objects in it are KVM's, and so are the counts of answers."""

    def __init__(self) -> None:
        self.policy: Policy | None = None
        self._before: dict[int, Snapshot | None] = {}

    def asking(self, task: int) -> None:
        """Remember what it is now that this task asks; others may before it is answered."""
        self._before[task] = self._now()

    def changed(self, task: int) -> bool:
        """Return whether it has changed since this task's `asking`; True if that cannot be told."""
        before, now = self._before.pop(task, None), self._now()
        if self.policy is None or before is None or now is None:
            return True
        with self.policy.guarded():
            return not now.same(before)

    def _now(self) -> Snapshot | None:
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
