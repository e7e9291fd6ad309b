"""The policies that say something about a host without EPT.

Presets of other kernels and proposals answer for the TDP MMU and for EPT's tags alone.  Their verdicts about
the shadow MMU would be about code that does not exist, so they are refused there.
"""

from __future__ import annotations

from typing import Final

from emulator.errors import BadInput
from emulator.policy.points import BY_NAME
from emulator.policy.policy import Policy

# Points that are asked for the TDP MMU alone, or of which each other answer is about INVEPT.
EPT_POINTS: Final = (
    "remote_flush",
    "root_alloc",
    "root_lock",
    "root_put",
    "invalid_root_zap",
    "migration",
    "migration_vpid",
    "zap_scope",
    "zap",
    "zap_root",
    "zap_yield",
    "map_replace",
    "eager_split",
    "split_alloc",
    "fault_split",
    "huge_recovery",
)


def answer_about_ept(policy: Policy) -> str | None:
    """Return an answer of the policy that has no meaning without EPT, as `point=answer`; None: there is
    none."""
    for name in EPT_POINTS:
        point = BY_NAME[name]
        for answer in point.names():
            if answer != point.default and policy.may_answer(name, answer):
                return f"{name}={answer}"
    return None


def check_without_ept(policy: Policy, where: str) -> None:
    """Raise BadInput if the policy answers about EPT; `where`: the test or scenario whose host has none."""
    answer = answer_about_ept(policy)
    if answer is not None:
        raise BadInput(
            where,
            f"its host has no EPT, and policy {policy.name} answers {answer}",
            "a policy with Linux 7.3's answers about EPT and the TDP MMU",
        )
