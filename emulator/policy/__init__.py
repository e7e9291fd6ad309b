"""Policies: what KVM decides at each decision point."""

from __future__ import annotations

from emulator.policy.points import POINTS, Alternative, DecisionPoint
from emulator.policy.policy import Policy, PolicyError
from emulator.policy.presets import DEFAULT, PRESETS, preset

__all__ = [
    "DEFAULT",
    "POINTS",
    "PRESETS",
    "Alternative",
    "DecisionPoint",
    "Policy",
    "PolicyError",
    "preset",
]
