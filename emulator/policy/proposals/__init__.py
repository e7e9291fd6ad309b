"""Proposals of the mailing list, and this project's own: policies that act, a file each.

KVM's code keeps nothing of them.  Each is a class as a user's file may have one: it keeps state, hears
moments and flushes by itself.  The methods of its decision points are also alternatives of these points under
the proposal's name (`--set migration=root-tlb-gen`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from emulator.policy.proposals.cpu_flushed_mask_cleared import CpuFlushedMaskCleared
from emulator.policy.proposals.lkml_2021_batch_list import BatchList
from emulator.policy.proposals.lkml_2025_active_roots import ActiveRoots
from emulator.policy.proposals.lkml_2025_cpu_flushed_mask import CpuFlushedMask
from emulator.policy.proposals.lkml_2025_on_each_cpu import OnEachCpu
from emulator.policy.proposals.lkml_2025_vm_pcpu_mask import VmPcpuMask
from emulator.policy.proposals.root_tlb_gen import RootTlbGen

if TYPE_CHECKING:
    from emulator.policy.policy import Policy

# The classes, by the name of their alternatives.
PROPOSALS: Final[dict[str, type[Policy]]] = {
    "active-roots": ActiveRoots,
    "cpu-flushed-mask": CpuFlushedMask,
    "cpu-flushed-mask-cleared": CpuFlushedMaskCleared,
    "disconnected-list": BatchList,
    "on-each-cpu": OnEachCpu,
    "root-tlb-gen": RootTlbGen,
    "vm-pcpu-mask": VmPcpuMask,
}
