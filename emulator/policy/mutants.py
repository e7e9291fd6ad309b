"""Mutants: bugs that KVM had, and plausible ones, each a policy `mutant:NAME`.

A mutant is a base preset with other answers (`settings`), or with `bugs` that KVM's code has under it
(`"B6" in kvm.policy.bugs`), at the place and in the order in which the kernel had them.  Those that only cost
flushes or memory must not trip the oracle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from emulator.errors import closest, shown
from emulator.policy.policy import NAMED_BY, Policy, PolicyError

PREFIX = "mutant:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """A mutant.

    source: the commit that fixed the bug, or the code that the mutant reverses.  expected: the kinds of
    violation that catch it; none if it only costs flushes or memory.  store_buffers: it is caught only where
    stores become visible late, that is, by `flushlab explore --store-buffers`.
    """

    name: str
    doc: str
    source: str
    expected: tuple[str, ...] = ()
    base: str = "linux-7.3"
    settings: Mapping[str, str] = field(default_factory=dict)
    bugs: tuple[str, ...] = ()
    store_buffers: bool = False

    @property
    def cost_only(self) -> bool:
        return not self.expected

    def policy(self, base: Policy) -> Policy:
        """Return the mutant's policy, on top of `base`, the preset that `self.base` names."""
        changed = base.with_settings(self.settings)
        return Policy(PREFIX + self.name, {*base.bugs, *self.bugs}, **changed.answers())


MUTANTS: dict[str, Mutant] = {
    mutant.name: mutant
    for mutant in (
        Mutant(
            name="B1",
            doc="a zap yields although a flush from an earlier root is pending: it was not handed in",
            source="a835429cda91, 5.12",
            bugs=("B1",),
            expected=("use-after-free",),
        ),
        Mutant(
            name="B1b",
            doc="a pending flush from an earlier root is forgotten when a later root needs none",
            source="cf3e26427c08, reverted by 873dd122172f before 5.18",
            bugs=("B1b",),
            expected=("use-after-free",),
        ),
        Mutant(
            name="B2",
            doc="recovery of huge pages does not pass on that the TDP MMU needs a flush",
            source="048f49809c52, 5.12, for NX huge pages; here for those that come back after dirty logging",
            bugs=("B2",),
            expected=("walk-after-free",),
        ),
        Mutant(
            name="B3",
            doc="recovery of huge pages calls something that yields, and goes on with what it had found",
            source="33a3164161fc, 5.12, for NX huge pages; here for those that come back after dirty logging",
            bugs=("B3",),
            expected=("walk-after-free",),
        ),
        Mutant(
            name="B4",
            doc="a flush that a yield has made is made once more",
            source="c7785d85b6c6 and 8ed716ca7dc9, 5.16",
            bugs=("B4",),
        ),
        Mutant(
            name="B6",
            doc="after a yield the iterator is restarted and then advanced: an SPTE is skipped and survives",
            source="3a0f64de479c, 5.16",
            bugs=("B6",),
            expected=("use-after-free",),
        ),
        Mutant(
            name="B7",
            doc="when dirty logging is armed, a flush only if some SPTE loses W just now; with access "
            "tracking (eptad = 0) aging may have taken it before, and a TLB still has it",
            source="b64d740ea7dd, 6.0",
            settings={"write_protect": "if-changed"},
            expected=("stale-after-revoke",),
        ),
        Mutant(
            name="B10",
            doc="a zap leaves its flush to whoever flushes next (kvm->tlbs_dirty), and a notifier that finds "
            "nothing to zap does not",
            source="what 6bc6db000295, 5.15, removed",
            bugs=("B10",),
            expected=("use-after-free", "stale-after-revoke"),
        ),
        Mutant(
            name="B21",
            doc="a remote flush drops the current context only, and a vCPU goes back to a root that it had "
            "before",
            source="Flush all EPTP/VPID contexts on remote TLB flush, 5.8; with cached roots for SMM",
            settings={"remote_flush": "current-context", "role_change": "keep-roots"},
            expected=("use-after-free", "stale-after-revoke"),
        ),
        Mutant(
            name="B25",
            doc="a notifier holds no reference on the root that it walks, and yields: the root is freed",
            source="7533377215b6, 5.16",
            bugs=("B25",),
            expected=("walk-after-free",),
        ),
        Mutant(
            name="B27",
            doc="a fault on a slot that is being deleted installs an MMIO SPTE over the SPTE that is still "
            "there",
            source="e0c378684b65, 6.0",
            bugs=("B27",),
            expected=("use-after-free", "stale-after-revoke"),
        ),
        Mutant(
            name="B32",
            doc="the TDP MMU holds no reference of its own: a role change zaps the whole tree",
            source="edbdb43fc96b, 6.4",
            settings={"root_put": "inline"},
        ),
        Mutant(
            name="I1",
            doc="INIT resets a vCPU without a flush, and so do the writes to CR4 and CR0 with which it boots",
            source="kvm_vcpu_reset() and vmx_vcpu_reset(); those of the boot would do",
            settings={"role_change": "no-guest-flush"},
            bugs=("I1",),
            expected=("guest-stale",),
        ),
        Mutant(
            name="L1",
            doc="reaping a dirty log does not write-protect the pages that it takes out: nothing logs the "
            "next write",
            source="2673127d8ae2 and its like, 6.8",
            bugs=("L1",),
            expected=("lost-dirty",),
        ),
        Mutant(
            name="L2",
            doc="a dirty log is write-protected before its marks are taken: the mark of a write in between "
            "goes with them",
            source="edde99ce0529, 2.6.34",
            bugs=("L2",),
            expected=("lost-dirty",),
        ),
        Mutant(
            name="L3",
            doc="fast_page_fault() marks the page before it makes the SPTE writable: the log is reaped in "
            "between",
            source="the comment in fast_pf_fix_direct_spte()",
            bugs=("L3",),
            expected=("lost-dirty",),
        ),
        Mutant(
            name="P1",
            doc="the last look at requests comes before mode = IN_GUEST_MODE: both sides miss each other",
            source="Documentation/virt/kvm/vcpu-requests.rst",
            settings={"entry_order": "requests-then-mode"},
            expected=("use-after-free",),
        ),
        Mutant(
            name="P2",
            doc="interrupts are on once more between the last look at requests and VM entry: the kick ends "
            "nothing",
            source="local_irq_disable() in vcpu_enter_guest()",
            bugs=("P2",),
            expected=("use-after-free",),
        ),
        Mutant(
            name="P3",
            doc="whoever makes a request reads the mode first: both sides miss each other",
            source="Documentation/virt/kvm/vcpu-requests.rst",
            bugs=("P3",),
            expected=("use-after-free",),
        ),
        Mutant(
            name="P4",
            doc="whoever flushes does not wait until the interrupted pCPUs have left guest mode",
            source="kvm_request_needs_ipi() without KVM_REQUEST_WAIT",
            settings={"kick_wait": "no-wait"},
            expected=("use-after-free",),
        ),
        Mutant(
            name="P7",
            doc="a flush of all contexts uses INVVPID: guest-physical mappings stay",
            source="the comment in vmx_flush_tlb_all()",
            bugs=("P7",),
            expected=("use-after-free", "stale-after-revoke"),
        ),
        Mutant(
            name="P8",
            doc="a flush for the guest uses INVEPT single: too much, and nothing too little",
            source="vmx_flush_tlb_guest(); a bug only where L1 and L2 share a VPID",
            bugs=("P8",),
        ),
        Mutant(
            name="P9",
            doc="kvm_mmu_load does not flush: entries of an earlier root on the same page come back",
            source="the comment in kvm_mmu_load()",
            settings={"root_load": "none"},
            expected=("foreign-root",),
        ),
        Mutant(
            name="P10",
            doc="tables go to call_rcu, then rcu_read_unlock, then the flush: a grace period fits in between",
            source="the order that bd29677952fa (5.18) ended, kept with the batching of bb95dfb9e2df",
            settings={"zap_scope": "leafs-and-tables", "zap_yield": "unlock-then-flush"},
            expected=("walk-after-free",),
        ),
        Mutant(
            name="P11",
            doc="flush first, then zap: what is refilled in between stays",
            source="the order of kvm_handle_hva_range() turned round",
            bugs=("P11",),
            expected=("use-after-free",),
        ),
        Mutant(
            name="P13",
            doc="a fault maps over a FROZEN SPTE, whose owner then empties it without another flush",
            source="tdp_mmu_zap_spte_atomic() to 6.12, is_frozen_spte() in kvm_tdp_mmu_map()",
            base="linux-6.12",
            bugs=("P13",),
            expected=("use-after-free",),
        ),
        Mutant(
            name="P14",
            doc="children of a removed table are emptied, not frozen: a fault maps into it, where no zap "
            "finds it; a leak only, because the flush that is due takes every way to the table",
            source="handle_removed_pt()",
            bugs=("P14",),
        ),
        Mutant(
            name="P15",
            doc="a fault does not ask whether it raced an invalidation",
            source="mmu_invalidate_retry_gfn()",
            settings={"fault_retry": "none"},
            expected=("use-after-free",),
        ),
        Mutant(
            name="P15b",
            doc="a fault samples mmu_invalidate_seq after it has looked the frame up",
            source="kvm_faultin_pfn()",
            bugs=("P15b",),
            expected=("use-after-free",),
        ),
        Mutant(
            name="P15c",
            doc="a fault does not ask whether an invalidation of its gfn is in progress",
            source="mmu_invalidate_retry_gfn()",
            bugs=("P15c",),
            expected=("use-after-free",),
        ),
        Mutant(
            name="P16",
            doc="invalidate_range_start returns before the flush, which comes in range_end",
            source="kvm_handle_hva_range()",
            settings={"notifier_flush": "at-range-end"},
            expected=("use-after-free",),
        ),
        Mutant(
            name="P23",
            doc="root.cpu_flushed_mask as sketched: nothing clears it",
            source="the sketch of August 2025, patch 5",
            settings={"migration": "cpu-flushed-mask"},
            expected=("use-after-free", "guest-stale", "stale-after-revoke"),
        ),
        Mutant(
            name="P23b",
            doc="the masks are cleared after the kick: a vCPU has served the request by then, and moved on",
            source="where the repair of the sketch must not be",
            base="cpu-flushed-mask-cleared",
            bugs=("P23b",),
            expected=("use-after-free",),
        ),
        Mutant(
            name="P23d",
            doc="the repaired mask, without INVVPID on migration",
            source="what the guest invalidated on another pCPU",
            base="cpu-flushed-mask-cleared",
            settings={"migration_vpid": "with-ept"},
            expected=("guest-stale",),
        ),
        Mutant(
            name="P24",
            doc="a migration flushes the current root only, not the cached ones",
            source="the set of roots of August 2025, patch 4, without prev_roots",
            base="lkml-2025-active-roots",
            settings={"role_change": "keep-roots"},
            bugs=("P24",),
            expected=("use-after-free", "stale-after-revoke"),
        ),
        Mutant(
            name="P29",
            doc="CR0.PG is cleared and the guest's translations stay",
            source="b5f61c035d49, 5.18, without its flush",
            settings={"role_change": "no-guest-flush"},
            expected=("guest-stale",),
        ),
        Mutant(
            name="P31",
            doc="SMM does not change the address space of the root",
            source="kvm_smm_changed() without the new role",
            bugs=("P31",),
            expected=("use-after-free", "stale-after-revoke"),
        ),
        Mutant(
            name="P32",
            doc="the flush after reaping a dirty log comes before the last pages are write-protected",
            source="kvm_get_dirty_log_protect()",
            bugs=("P32",),
            expected=("stale-after-revoke",),
        ),
        Mutant(
            name="R1",
            doc="root-tlb-gen without the look at the generation before entry: cached roots are forgotten",
            source="a guard of root-tlb-gen",
            base="root-tlb-gen",
            settings={"role_change": "keep-roots"},
            bugs=("R1",),
            expected=("use-after-free", "stale-after-revoke"),
        ),
        Mutant(
            name="R2",
            doc="root-tlb-gen without INVVPID on migration",
            source="what the guest invalidated on another pCPU",
            base="root-tlb-gen",
            settings={"migration_vpid": "with-ept"},
            expected=("guest-stale",),
        ),
        Mutant(
            name="R3",
            doc="root-tlb-gen whose remote flush moves generations on after the kick",
            source="a guard of root-tlb-gen",
            base="root-tlb-gen",
            bugs=("P23b",),
            expected=("use-after-free",),
        ),
        Mutant(
            name="R4",
            doc="generations outlive the root: the next root on the page is believed to be flushed",
            source="a guard of root-tlb-gen",
            base="root-tlb-gen",
            bugs=("R4",),
            expected=("foreign-root",),
        ),
        Mutant(
            name="RFC02",
            doc="each removed table goes to RCU by way of a list, and the flush comes when RCU was left",
            source="[RFC 02/19] of November 2021 alone; asked in its review, mended by 03/19",
            base="lkml-2021-batch-list",
            bugs=("RFC02",),
            expected=("walk-after-free",),
        ),
        Mutant(
            name="S1",
            doc="no full barrier between mode = IN_GUEST_MODE and the last look at requests: the store may "
            "still be in the CPU's store buffer",
            source="smp_mb__after_srcu_read_unlock() in vcpu_enter_guest()",
            bugs=("S1",),
            expected=("use-after-free",),
            store_buffers=True,
        ),
        Mutant(
            name="S2",
            doc="a request is a plain store, and the mode is read before the cmpxchg: no barrier in between "
            "where the vCPU is outside",
            source="smp_mb__before_atomic() in kvm_vcpu_exiting_guest_mode()",
            bugs=("S2",),
            expected=("use-after-free",),
            store_buffers=True,
        ),
        Mutant(
            name="S3",
            doc="root-tlb-gen that makes no request to vCPUs outside, because they look at the generation "
            "before entry; and moves it on by a plain store, without a barrier before it reads the modes",
            source="atomic64_inc_return() in a remote flush under root-tlb-gen",
            base="root-tlb-gen",
            bugs=("S3",),
            expected=("use-after-free",),
            store_buffers=True,
        ),
        Mutant(
            name="S4",
            doc="S1 under root-tlb-gen: generation and requests are looked at before the mode is visible",
            source="smp_mb__after_srcu_read_unlock() in vcpu_enter_guest()",
            base="root-tlb-gen",
            bugs=("S1",),
            expected=("use-after-free",),
            store_buffers=True,
        ),
        Mutant(
            name="Z1",
            doc="kvm_zap_gfn_range() does not count as an invalidation: a fault that has looked before it "
            "installs what is being zapped",
            source="edb298c663fc, 5.15",
            bugs=("Z1",),
            expected=("stale-after-revoke",),
        ),
        Mutant(
            name="Z2",
            doc="a notifier leaves invalid roots out; whoever zaps them afterwards marks pages that are free",
            source="d62007edf01f, 5.18",
            base="linux-5.14",
            bugs=("Z2",),
            expected=("use-after-free",),
        ),
    )
}


def find_mutant(name: str, where: str = NAMED_BY) -> Mutant:
    """Return the mutant of that name, which may have the prefix or not."""
    short = name.removeprefix(PREFIX)
    try:
        return MUTANTS[short]
    except KeyError:
        close = closest(short, MUTANTS)
        guess = f" (did you mean {PREFIX}{close}?)" if close else ""
        names = ", ".join(PREFIX + known for known in MUTANTS)
        raise PolicyError(where, f"unknown mutant {shown(name)}", f"one of {names}{guess}") from None
