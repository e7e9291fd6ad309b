"""Policies: KVM's answers at the decision points."""

from __future__ import annotations

from emulator.policy.mutants import MUTANTS, Mutant, canonical, find_mutant
from emulator.policy.point import Alternative, DecisionPoint
from emulator.policy.points import POINTS
from emulator.policy.policy import Policy, PolicyError, check_answer, parse_setting
from emulator.policy.presets import DEFAULT, PRESET_DOCS, PRESETS, preset
from emulator.policy.proposals import PROPOSALS
from emulator.policy.spelling import check_policy, parse_policy
from emulator.policy.user import (
    UserPolicyError,
    base_of,
    class_policy,
    load_user_policy,
    resolve_policy,
    spelled_policy,
)

__all__ = [
    "DEFAULT",
    "MUTANTS",
    "POINTS",
    "PRESETS",
    "PRESET_DOCS",
    "PROPOSALS",
    "Alternative",
    "DecisionPoint",
    "Mutant",
    "Policy",
    "PolicyError",
    "UserPolicyError",
    "base_of",
    "canonical",
    "check_answer",
    "check_policy",
    "class_policy",
    "find_mutant",
    "load_user_policy",
    "parse_policy",
    "parse_setting",
    "preset",
    "resolve_policy",
    "spelled_policy",
]
