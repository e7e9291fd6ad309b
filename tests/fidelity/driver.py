"""One booted machine on which the steps of ground_truth.toml are performed.

This is all that the fidelity test knows about the emulator. The counters have KVM's meaning:

* `requests`: calls of kvm_make_all_cpus_request, by request. A vCPU's request to itself (migration, role
  change) is none.
* `flush_all`, `flush_current`, `flush_guest`: calls of the vendor's hook for that vCPU; kvm_mmu_load makes
  one of flush_current directly.
* `tlb_flush`: the vCPU statistic, i.e. kvm_vcpu_flush_tlb_{all,current,guest}; not the flush of kvm_mmu_load.
* `yields`: times that a zap flushed because it was about to give up mmu_lock (tdp_mmu_iter_cond_resched).
* `executed`: INVEPT and INVVPID instructions that the vCPUs executed, by kind.
* `refaults`: flushes of faults that meet: mmu_set_spte() took the dirty flag of a writable SPTE (before 6.13)
  or wp_page_copy() invalidated a page that another vCPU had copied and mapped by then.

The counters of a destroyed VM stay readable. A VM that does not exist yet has none: all are 0.

Steps, with the fixture's arguments, and their results. `vm` is 0 unless given (`guest`: all VMs).

guest do=write|idle|stop [slot] [n]
    All vCPUs from now on: store to each of the first n (all) pages of the slot over and over; stay in
    the guest without an access; leave KVM_RUN. An access that cannot be served (no memslot, no right to write
    in the host) is skipped. Returns 0, after each vCPU has done a whole round (stop: has left).
touch slot access=read|write [concurrent=yes]
    Each vCPU in turn, or all at once, accesses each page of the slot once. Returns the page faults taken.
unmap slot first n [yield_after] [split=yes]
    MADV_DONTNEED: one notifier range, then the host pages go. slot=none: memory that is in no memslot.
    yield_after: need_resched is set once after so many SPTEs. Returns the SPTEs zapped.
    split=yes: of a part of a 2M host page, which is split inside that range, once a vCPU has mapped it again.
    Returns the notifier ranges that zapped SPTEs.
pageout slot first n
    Reclaim: one notifier range for each page. Returns the SPTEs zapped.
age slot first n
    Reclaim asks for each page whether it was used (clear_flush_young). Returns of how many it was.
fork
    Of the VMM; the child exits at once. Returns the memslots of which SPTEs were zapped.
mprotect slot first n prot=r|rw|none [split=yes]
    Returns the SPTEs zapped. split=yes: a 2M host page that it changes in part is split before, in a notifier
    range of its own; returns the notifier ranges that zapped SPTEs.
collapse slot first n
    khugepaged on each 2M range, until the guest has faulted each in again. Returns the 2M leaves.
memslot_create slot, memslot_delete slot, memslot_move slot gpa
    Return 0.
dirty_log_enable slot, dirty_log_disable slot
    Return the SPTEs write-protected, and those zapped or replaced by huge ones.
get_dirty_log slot
    Returns the bits that it found set.
clear_dirty_log slot first n
    Returns the SPTEs write-protected.
migrate vcpu to=free
    To a pCPU that runs no vCPU. Returns 0 after the vCPU has entered the guest there.
share_pcpus with=vcpu0|other-vm
    All vCPUs of the VM move to vCPU 0's pCPU; vCPU i of every VM moves to the pCPU of VM 0's. Returns 0.
run switches
    Runs until the pCPUs have switched that often from one vCPU to another. Returns the switches.
nothing
    20 ms. Returns 0.
smi vcpu
    An SMI; the guest executes RSM at once. Returns 0.
guest_insn vcpu insn n
    The guest executes cr0_ts, cr0_wp, cr4_osfxsr, cr4_pge, cr4_pse (toggles), mov_cr3 or invlpg at least n
    times, or cpuid or io_out n times. Returns how often it did. Without EPT exactly n times; mov_cr3 to the
    current address space, or to `spaces` (0 to 2, at first 0) in turn.
pt_store vcpu slot level
    The guest stores once to the entry of that level that maps the slot, and then uses the slot no more.
    Returns how often KVM emulated a store.
vm_create
    With as many vCPUs as the machine was booted for. Returns 0 after each vCPU's first entry.
vm_destroy
    Returns 0.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections import Counter
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from .lines import Machine, Step


@dataclass(frozen=True)
class VcpuCounts:
    flush_all: int = 0
    flush_current: int = 0
    flush_guest: int = 0
    tlb_flush: int = 0
    kvm_mmu_load: int = 0

    def __sub__(self, other: VcpuCounts) -> VcpuCounts:
        return VcpuCounts(
            self.flush_all - other.flush_all,
            self.flush_current - other.flush_current,
            self.flush_guest - other.flush_guest,
            self.tlb_flush - other.tlb_flush,
            self.kvm_mmu_load - other.kvm_mmu_load,
        )


@dataclass(frozen=True)
class VmCounts:
    remote_tlb_flush_requests: int = 0
    requests: Counter[str] = field(default_factory=Counter)
    yields: int = 0
    refaults: int = 0
    executed: Counter[str] = field(default_factory=Counter)
    vcpus: tuple[VcpuCounts, ...] = ()

    def since(self, before: VmCounts) -> VmCounts:
        """Return the counts since then; a VM that did not exist then had none."""
        earlier = before.vcpus or (VcpuCounts(),) * len(self.vcpus)
        return VmCounts(
            self.remote_tlb_flush_requests - before.remote_tlb_flush_requests,
            self.requests - before.requests,
            self.yields - before.yields,
            self.refaults - before.refaults,
            self.executed - before.executed,
            tuple(now - then for now, then in zip(self.vcpus, earlier, strict=True)),
        )


class Bench(Protocol):
    """A machine that is booted: its VMs run, nothing else does anything to them."""

    def step(self, step: Step) -> int: ...

    def settle(self) -> None:
        """Waits until no vCPU in KVM_RUN has a request pending and each has done a whole round since."""

    def counts(self, vm: int) -> VmCounts: ...


class Driver(Protocol):
    # The fixture's `needs` that this machine has.
    capabilities: frozenset[str]

    def boot(self, machine: Machine, vcpus: int, preset: str) -> AbstractContextManager[Bench]: ...


def find_driver() -> Driver | None:
    """The emulator's driver, or None if the emulator has no jobs to run yet."""
    if importlib.util.find_spec("emulator.job.job") is None:
        return None
    driver: Driver = importlib.import_module(".emulated", __package__).EmulatorDriver()
    return driver
