"""The moments at which KVM calls a policy, and the flush instructions that some of them are about.

KVM knows no policy, only this protocol.  A policy defines the moments that it wants to hear of, and may act
in them: keep state (KVM stores it with its own objects, and never looks into it), flush, interrupt, make
requests.  The policy's functions are looked up once, when the VM is created, so a moment that the policy does
not hear costs the test of a field.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from emulator.kvm.mmu.structs import KvmMmuPage
from emulator.kvm.structs import Kvm, Vcpu
from emulator.machine.runtime import Cpu
from native.types import FlushReason, Hfn

FlushKind = Literal["invept-single", "invept-global", "invvpid-single", "invvpid-all", "invvpid-address"]


class PcpuFlush(NamedTuple):
    """A flush instruction that a pCPU executes for a VM.

    tag: the root's page (the EP4TA) of invept-single, the VPID of invvpid-single and invvpid-address, else
    -1.  roots: the roots that are known to be covered: the one of invept-single; for invept-global, which
    covers all, the current and previous roots of the vCPU that is flushed; none for INVVPID.  reason: enum
    flush_reason.
    """

    kind: FlushKind
    tag: int
    reason: FlushReason
    roots: tuple[KvmMmuPage, ...] = ()


class Notifications(Protocol):
    """The moments.  Each docstring tells the moment, and the state of the machine in it."""

    def root_created(self, cpu: Cpu, kvm: Kvm, root: KvmMmuPage) -> None:
        """`root` has been made, and no vCPU and no zap can find it yet.  Precedes root_alloc."""

    def root_released(self, cpu: Cpu, kvm: Kvm, root: KvmMmuPage) -> None:
        """`root` has lost its last reference, and is still linked.  Its page is given to RCU after that, and
        the policy's state of the root dies with it."""

    def root_current(self, cpu: Cpu, vcpu: Vcpu, root: KvmMmuPage) -> None:
        """`root` became the current one of `vcpu`: by kvm_mmu_load, before root_load is asked, or from the
        cache of previous roots, before cached_root is asked."""

    def remote_flush_due(self, cpu: Cpu, kvm: Kvm, reason: FlushReason) -> None:
        """SPTEs of `kvm` have changed, and a remote flush begins: no vCPU has its request yet."""

    def vcpu_loading(self, cpu: Cpu, vcpu: Vcpu) -> None:
        """`vcpu` is being loaded on `cpu`, with preemption disabled: loaded_vmcs.cpu and vcpu->cpu still tell
        the pCPU that it was on before, -1 for none."""

    def before_entry(self, cpu: Cpu, vcpu: Vcpu) -> None:
        """`vcpu` is about to enter the guest: interrupts are off, the mode is IN_GUEST_MODE and visible, and
        the last check for requests is still to come, so a request that is made here cancels the entry."""

    def pcpu_flushes(self, cpu: Cpu, kvm: Kvm, flush: PcpuFlush) -> None:
        """`cpu` is about to execute a flush instruction for `kvm`, with preemption disabled.  Flushes that a
        call on another pCPU executes there are not told."""

    def pcpu_flushed(self, cpu: Cpu, kvm: Kvm, flush: PcpuFlush) -> None:
        """`cpu` has executed that flush."""

    def table_removed(self, cpu: Cpu, kvm: Kvm, table: Hfn) -> None:
        """`table` has lost its link and all its entries, and decision zap was `done`: the policy gives the
        page to RCU itself, after a flush.  The walk is in RCU's read section and under mmu_lock."""

    def walk_ends(self, cpu: Cpu, kvm: Kvm, reason: FlushReason, flushed: bool, can_yield: bool) -> bool:
        """A walk that may have removed tables ends, or has taken one apart that it removed alone.  flushed:
        for all of them, so they may go to RCU at once.  can_yield: the walk is in RCU's read section and may
        drop mmu_lock.  Return whether the policy has flushed for all that the walk has zapped."""


@dataclass(frozen=True, slots=True)
class Heard:
    """The functions of a policy that hear the moments, by the moments' names; None: it does not hear it."""

    root_created: Callable[[Cpu, Kvm, KvmMmuPage], None] | None = None
    root_released: Callable[[Cpu, Kvm, KvmMmuPage], None] | None = None
    root_current: Callable[[Cpu, Vcpu, KvmMmuPage], None] | None = None
    remote_flush_due: Callable[[Cpu, Kvm, FlushReason], None] | None = None
    vcpu_loading: Callable[[Cpu, Vcpu], None] | None = None
    before_entry: Callable[[Cpu, Vcpu], None] | None = None
    pcpu_flushes: Callable[[Cpu, Kvm, PcpuFlush], None] | None = None
    pcpu_flushed: Callable[[Cpu, Kvm, PcpuFlush], None] | None = None
    table_removed: Callable[[Cpu, Kvm, Hfn], None] | None = None
    walk_ends: Callable[[Cpu, Kvm, FlushReason, bool, bool], bool] | None = None


def walk_ends(cpu: Cpu, kvm: Kvm, reason: FlushReason, *, flushed: bool, can_yield: bool = False) -> bool:
    """Tell the policy that a walk ends; return whether the policy has flushed."""
    hear = kvm.heard.walk_ends
    return hear is not None and hear(cpu, kvm, reason, flushed, can_yield)


def flush_begins(cpu: Cpu, kvm: Kvm, flush: PcpuFlush) -> None:
    """Tell the policy that this pCPU is about to flush."""
    if kvm.heard.pcpu_flushes is not None:
        kvm.heard.pcpu_flushes(cpu, kvm, flush)


def flush_ended(cpu: Cpu, kvm: Kvm, flush: PcpuFlush) -> None:
    """Tell the policy that this pCPU has flushed."""
    if kvm.heard.pcpu_flushed is not None:
        kvm.heard.pcpu_flushed(cpu, kvm, flush)
