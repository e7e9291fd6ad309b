"""A workload: the events of a traced host on which KVM's flushing depends, in their order.

builder.py has the rules by which it is made from a trace, workload_file.py its file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from emulator.hosttrace.memslots import Memslot

BLOCK: Final = 512
# KVM's counts, by the functions of VMX or SVM of which a recording may show the calls.
RECORDED: Final = {
    "remote_tlb_flush_requests": ("kvm_flush_remote_tlbs",),
    "make_all_cpus_request": ("kvm_make_all_cpus_request",),
    "flush_all": ("vmx_flush_tlb_all",),
    # On SVM a vCPU that moves gets a new ASID, without a call of svm_flush_tlb_all().
    "flush_all_but_moves": ("svm_flush_tlb_all",),
    "flush_current": ("vmx_flush_tlb_current", "svm_flush_tlb_current"),
    "flush_guest": ("vmx_flush_tlb_guest", "svm_flush_tlb_guest"),
    "mmu_load": ("kvm_mmu_load",),
    # Interrupts: ipi_send_cpumask from kvm_make_all_cpus_request(), csd_queue_cpu with __loaded_vmcs_clear().
    "kick_ipis": (),
    "vmcs_clear_ipis": (),
}


@dataclass(slots=True)
class Step:
    """One event.  `verb` is one of VERBS; `vcpu` is -1 for events of a VM; pages are those of the guest."""

    microseconds: int
    verb: str
    vm: int
    vcpu: int = -1
    start: int = -1
    end: int = -1


# The arguments behind VM or VM.VCPU: the number of them, and whether the event is a vCPU's.
VERBS: Final[dict[str, tuple[int, bool]]] = {
    "enter": (1, True),  # CPU
    "stay": (1, True),  # CPU, on which the vCPU stays in guest mode
    "leave": (0, True),  # the vCPU that stays leaves guest mode
    "resume": (0, False),  # the vCPUs that kicks have made leave guest mode stay in it again
    "read": (1, True),  # page
    "write": (1, True),  # page
    "cr4": (1, True),  # the bits that change
    "smi": (0, True),
    "rsm": (0, True),
    "vmrun": (0, True),  # the vCPU runs a nested guest from now on (SVM)
    "vmexit": (0, True),  # it runs L1 again
    "huge": (1, False),  # first page of a block that the host backs by a huge page
    "unmap": (2, False),  # pages from START to END, which is not included
    "log": (0, False),
    "zap-all": (0, False),
    "recover": (2, False),  # blocks from START to END, which KVM zaps to map them by huge pages again
}


# Events that put a vCPU on a CPU.
PLACING: Final = ("enter", "stay")


@dataclass
class Workload:
    """The events of a recording, and the machine and the VMs that they are about.

    `vms` has the number of vCPUs of each VM, `pages` the size of its memory, `mapped` the pages that were
    mapped when the recording began, `huge` the first pages of blocks that a huge page backed then, and `new`
    the vCPUs that had not run by then, by VM and number.  CR4.PGE is clear in those of `without_pge`.
    `recorded` has KVM's own counts as far as the trace shows them, `left_out` the events that are not in the
    workload, and `memslots` those given or inferred, with the pages' numbers on the host.
    """

    source: str
    pcpus: int
    vms: list[int]
    pages: list[int]
    mapped: list[list[int]]
    steps: list[Step]
    new: list[tuple[int, int]] = field(default_factory=list)
    huge: list[tuple[int, int]] = field(default_factory=list)
    without_pge: list[tuple[int, int]] = field(default_factory=list)
    recorded: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    memslots: list[Memslot] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return self.steps[-1].microseconds / 1e6 if self.steps else 0.0
