"""The registry of decision points: where KVM could flush, kick, wait or order differently."""

from __future__ import annotations

from typing import Final

from emulator.kvm.decisions import Decisions
from emulator.policy.point import DecisionPoint
from emulator.policy.points_common import COMMON_POINTS
from emulator.policy.points_hyperv import HYPERV_POINTS
from emulator.policy.points_nested import NESTED_POINTS
from emulator.policy.points_shadow import SHADOW_POINTS
from emulator.policy.points_tdp import TDP_POINTS

# In the order in which KVM states them.
POINTS: Final[tuple[DecisionPoint, ...]] = tuple(
    sorted(
        (*COMMON_POINTS, *TDP_POINTS, *SHADOW_POINTS, *NESTED_POINTS, *HYPERV_POINTS),
        key=lambda point: tuple(vars(Decisions)).index(point.name),
    )
)
BY_NAME: Final = {point.name: point for point in POINTS}
