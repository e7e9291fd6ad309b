"""The decision points that are asked where KVM's host is a guest of Hyper-V."""

from __future__ import annotations

from typing import Final

from emulator.kvm.decisions import Decisions
from emulator.policy.point import DecisionPoint, point

HYPERV_POINTS: Final[tuple[DecisionPoint, ...]] = (
    point(
        Decisions.hv_remote_flush,
        "On Hyper-V, with EPT: the remote flush (hv_flush_remote_tlbs, hv_flush_remote_tlbs_range).",
        {
            "tracked-roots": (
                "A hypercall for each root that a vCPU has in its EPT_POINTER; Hyper-V flushes all pCPUs for "
                "it, for the pages of the flush alone if KVM knows them. No requests. Roots that a vCPU has "
                "only cached keep their entries: with nested guests, cached_root=flush-current removes them."
            ),
            "requests": "KVM_REQ_TLB_FLUSH of all vCPUs, as on bare metal.",
        },
    ),
    point(
        Decisions.hv_local_flush,
        "On Hyper-V, with EPT: KVM_REQ_TLB_FLUSH_CURRENT, and the flush of kvm_mmu_load.",
        {
            "invept": "INVEPT single-context on the root, on this pCPU.",
            "hypercall": (
                "A hypercall, for which Hyper-V flushes the root on all pCPUs (proposed in June 2025)."
            ),
        },
    ),
)
