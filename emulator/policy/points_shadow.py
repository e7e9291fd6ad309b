"""The decision points of the shadow MMU, which are asked on hosts without EPT alone."""

from __future__ import annotations

from typing import Final

from emulator.kvm.decisions import Decisions
from emulator.policy.point import DecisionPoint, point

SHADOW_POINTS: Final[tuple[DecisionPoint, ...]] = (
    point(
        Decisions.pcide_on,
        "A vCPU's roots when it sets CR4.PCIDE, which flushes nothing (kvm_post_set_cr4).",
        {
            "free": "All roots are dropped, so that each is synced when it is loaded again.",
        },
        wrong={
            "keep": (
                "Previous roots stay cached. A MOV to CR3 with bit 63 returns to one from the time without "
                "PCIDs, when a MOV to CR3 invalidated all processes and synced the new root alone."
            ),
        },
    ),
    point(
        Decisions.noflush_root,
        "A cached root to which a vCPU returns by a MOV to CR3 with bit 63 (kvm_set_cr3).",
        {
            "none": (
                "It is used as it is: an invalidation of its PCID meanwhile would have dropped it (since "
                "4.19)."
            ),
            "sync": "It is synced, as for a MOV to CR3 that flushes (before 4.19).",
        },
    ),
)
