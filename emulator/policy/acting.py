"""The moments that policies hear, as functions for KVM."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Final

from emulator.kvm.notifications import Heard, Notifications
from emulator.policy.state import declarations

if TYPE_CHECKING:
    from emulator.policy.policy import Policy

# The names of the moments, and the parameters of each.
MOMENTS: Final[dict[str, tuple[str, ...]]] = {
    one.name: tuple(inspect.signature(getattr(Notifications, one.name)).parameters) for one in fields(Heard)
}


def is_simple(proposal: str) -> bool:
    """Return whether a proposal needs neither state nor moments, so any class may answer with it."""
    from emulator.policy.proposals import PROPOSALS

    cls = PROPOSALS[proposal]
    declared = any(declarations([cls]).values())
    return not declared and not any(hasattr(cls, moment) for moment in MOMENTS)


def heard_by(policies: Sequence[Policy]) -> Heard:
    """Return the moments that these policies define.  Each moment is heard in their order."""
    hearers = {
        name: [getattr(policy, name) for policy in policies if hasattr(type(policy), name)]
        for name in MOMENTS
    }
    return Heard(**{name: _together(functions) for name, functions in hearers.items() if functions})


def _together(functions: list[Callable[..., Any]]) -> Callable[..., Any]:
    if len(functions) == 1:
        return functions[0]

    def hear(*arguments: Any) -> bool:
        found = [function(*arguments) for function in functions]
        return any(found)

    return hear
