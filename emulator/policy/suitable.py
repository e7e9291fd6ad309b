"""Which policies mean something on a host with EPT, and on one without?

KVM asks the TDP MMU's decision points on hosts with EPT only.  It asks those of the shadow MMU on hosts
without EPT, and for nested guests for which L1 has an EPT; but two of them concern registers on which no
shadow of an EPT depends.  It asks those about Hyper-V where Hyper-V is below KVM.  A verdict about an answer
for which KVM never asks would be empty, so such a policy is refused.  A kernel's preset suits every host:
KVM asks for those of its answers that concern the host.
"""

from __future__ import annotations

from typing import Final

from emulator.errors import BadInput
from emulator.policy.point import DecisionPoint
from emulator.policy.points import BY_NAME
from emulator.policy.points_hyperv import HYPERV_POINTS
from emulator.policy.points_shadow import SHADOW_POINTS
from emulator.policy.points_tdp import TDP_POINTS
from emulator.policy.policy import Policy
from emulator.policy.presets import DEFAULT, PRESETS

# Each other answer than the default is about INVEPT.
_INVEPT: Final = ("remote_flush", "migration", "migration_vpid")
_ABOUT_EPT: Final = tuple(point.name for point in TDP_POINTS) + _INVEPT
_WITHOUT_EPT_ALONE: Final = tuple(
    point for point in SHADOW_POINTS if point.name in ("pcide_on", "noflush_root")
)
_KERNELS: Final = tuple(policy for name, policy in PRESETS.items() if name.startswith("linux-"))


def unasked_answer(
    policy: Policy, *, ept: bool, nested_ept: bool = False, hyperv: bool = False
) -> str | None:
    """Return an answer of the policy for which KVM never asks on such a host, as `point=answer`; None: there
    is none.

    nested_ept: a guest is a hypervisor that has an EPT for its own guests.  hyperv: the host is a guest of
    Hyper-V.
    """
    points = SHADOW_POINTS if ept else tuple(BY_NAME[name] for name in _ABOUT_EPT)
    if nested_ept:
        points = _WITHOUT_EPT_ALONE
    if not hyperv:
        points = (*points, *HYPERV_POINTS)
    if any(_answers_alike(policy, kernel, points) for kernel in _KERNELS):
        return None
    default = PRESETS[DEFAULT].answers()
    for point in points:
        for answer in point.names():
            if answer != default[point.name] and policy.may_answer(point.name, answer):
                return f"{point.name}={answer}"
    return None


def _answers_alike(policy: Policy, other: Policy, points: tuple[DecisionPoint, ...]) -> bool:
    """Return whether the policy answers these points as `other`, a table, does."""
    table = other.answers()
    return not any(
        policy.may_answer(point.name, answer)
        for point in points
        for answer in point.names()
        if answer != table[point.name]
    )


def check_suits(
    policy: Policy, where: str, *, ept: bool, nested_ept: bool = False, hyperv: bool = False
) -> None:
    """Raise BadInput if the policy gives an answer without meaning on such a host.

    where: the name of the test or scenario, for the message.
    """
    answer = unasked_answer(policy, ept=ept, nested_ept=nested_ept, hyperv=hyperv)
    if answer is not None and answer.startswith("hv_"):
        raise BadInput(
            where,
            f"its host is no guest of Hyper-V, and policy {policy.name} answers {answer}",
            "machine.hyperv = true, or a policy with Linux 7.3's answers about Hyper-V",
        )
    if answer is not None:
        raise BadInput(
            where,
            f"its host has {'EPT' if ept else 'no EPT'}, and policy {policy.name} answers {answer}",
            f"a policy with Linux 7.3's answers about {'the shadow MMU' if ept else 'EPT and the TDP MMU'}",
        )
