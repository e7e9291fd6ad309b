"""Proposals of the mailing list, and this project's own: policies that act, a file each.

KVM's code keeps nothing of them.  Each is a class as a user's file may have one: it keeps state, hears
moments and flushes by itself.  The methods of its decision points are also alternatives of these points under
the proposal's name (`--set migration=root-tlb-gen`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from emulator.policy.policy import Policy

PROPOSALS: Final[dict[str, type[Policy]]] = {}
