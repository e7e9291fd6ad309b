"""The decision points that are asked for nested guests alone."""

from __future__ import annotations

from typing import Final

from emulator.kvm.decisions import Decisions
from emulator.policy.point import DecisionPoint, point

NESTED_POINTS: Final[tuple[DecisionPoint, ...]] = (
    point(
        Decisions.nested_transition,
        "Flush when a vCPU enters L2, or L1 after a VM exit of L2 (nested_vmx_transition_tlb_flush).",
        {
            "tag-aware": (
                "KVM_REQ_TLB_FLUSH_GUEST if L1 has given L2 no VPID; else no flush while the tags of L1 and "
                "L2 differ, but see vpid02_reuse."
            ),
            "apic-access-flush": (
                "As tag-aware, and KVM_REQ_TLB_FLUSH_CURRENT each time if L1 has set `virtualize APIC "
                "accesses` for L2 (before 5.5)."
            ),
            "always": "KVM_REQ_TLB_FLUSH_CURRENT each time, as for nested SVM.",
        },
        wrong={
            "none": "No flush: L1 and an L2 without a VPID use mappings that VM entry and VM exit end.",
        },
    ),
    point(
        Decisions.nested_invept,
        "KVM's work for an INVEPT that L1 executes (handle_invept).",
        {
            "free-roots": (
                "The vCPU drops its roots that shadow the EPT; the next entry of L2 loads a root, which "
                "syncs and flushes."
            ),
            "free-roots-and-flush": (
                "The vCPU executes INVEPT single-context for each root that shadows the EPT, and drops it."
            ),
        },
        wrong={
            "none": "Nothing: L2 may go on using mappings that L1 has removed from its EPT.",
        },
    ),
    point(
        Decisions.nested_invvpid,
        "The flush for an INVVPID that L1 executes (handle_invvpid).",
        {
            "pcpu-of-vmcs02": (
                "INVVPID of vpid02; if vmcs02 was loaded on another pCPU last, at the next entry of L2 "
                "instead (since 7.3)."
            ),
        },
        wrong={
            "current-pcpu": (
                "INVVPID of vpid02 on the pCPU where L1 runs (before 7.3). Wrong where a migration flushes "
                "less than everything."
            ),
            "none": "No flush.",
        },
    ),
    point(
        Decisions.vpid02_reuse,
        "Flush when L1 gives L2 another VPID, and both are vpid02 (nested_vmx_transition_tlb_flush).",
        {
            "flush": "KVM_REQ_TLB_FLUSH_GUEST, because nothing is cached under the new VPID.",
        },
        wrong={
            "none": "No flush: L2 uses mappings of another VPID of L1's, which may be another guest's.",
        },
    ),
)
