"""The decision points that a tree's code has taken over."""

from __future__ import annotations

from typing import Final

from emulator.errors import BadInput
from emulator.policy import PRESETS, Policy

# Decision points of tdp_mmu.c, and of the requests in kvm_main.c.  The policy still decides those of mmu.c
# and of the rest of KVM.
OWN_POINTS: Final = (
    "root_alloc", "root_put", "invalid_root_zap", "zap_scope", "zap", "zap_root", "zap_yield", "map_replace",
    "split_alloc", "fault_split", "invalid_roots", "frozen_zap", "mapped_fault", "huge_recovery",
    "zapped_pfn", "remote_kick", "kick_wait",
)  # fmt: skip
# Moments inside tdp_mmu.c, of which the tree's code tells no policy.
_OWN_MOMENTS: Final = ("root_created", "root_released", "table_removed", "walk_ends")
_WITH_KERNEL: Final = "with --kernel, answers to other points"


def check_policy_for_tree(policy: Policy) -> None:
    """Raise BadInput if the policy decides what the tree's own code decides."""
    if policy.patch is not None:
        found = f"{policy.name} patches the model's code, which the tree's code replaces"
        raise BadInput("--policy", found, "with --kernel, a policy without a patch")
    kernels = [one.answers() for name, one in PRESETS.items() if name.startswith("linux-")]
    answers = policy.answers()
    decided = [point for point in OWN_POINTS if point in policy.overrides()]
    if decided:
        found = f"{policy.name} decides {decided[0]}, which the tree's own code decides"
        raise BadInput("--policy", found, _WITH_KERNEL)
    # At these points a policy may have the answers of any one kernel: they come with its base.
    others = [[point for point in OWN_POINTS if answers[point] != kernel[point]] for kernel in kernels]
    if fewest := min(others, key=len):
        found = f"{policy.name} answers {fewest[0]}={answers[fewest[0]]}, which the tree's own code decides"
        raise BadInput("--policy", found, _WITH_KERNEL)
    heard = policy.heard()
    for moment in _OWN_MOMENTS:
        if getattr(heard, moment) is not None:
            found = f"{policy.name} hears of {moment}, a moment inside the tree's own code"
            raise BadInput("--policy", found, "with --kernel, a policy that hears of other moments")
