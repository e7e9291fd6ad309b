"""Mutants: bugs that KVM had, and plausible ones, each a policy `mutant:NAME` (names: mutant_names.py).

A mutant is a base preset with other answers (`settings`), or with `bugs` that KVM's code has under it
(`"B6" in kvm.policy.bugs`), at the place and in the order in which the kernel had them.  Those that only cost
flushes or memory must not trip the oracle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from emulator.errors import closest, shown
from emulator.policy.mutant_names import NAMES, PREFIX
from emulator.policy.policy import NAMED_BY, Policy, PolicyError


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """A mutant.

    id: an alias of the name, and in most cases the name of the bug in KVM's code.  source: the commit that
    fixed the bug, or the code that the mutant reverses.  expected: the kinds of violation that catch it; none
    if it only costs flushes or memory.  store_buffers: it is caught only where stores become visible late,
    that is, by `flushlab explore --store-buffers`.
    """

    id: str
    doc: str
    source: str
    expected: tuple[str, ...] = ()
    base: str = "linux-7.3"
    settings: Mapping[str, str] = field(default_factory=dict)
    bugs: tuple[str, ...] = ()
    store_buffers: bool = False

    @property
    def name(self) -> str:
        return NAMES[self.id]

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
            id="B1",
            doc=(
                "A zap yields without the flush that an earlier root left pending, because the pending flush "
                "was not passed on."
            ),
            source="a835429cda91, 5.12",
            bugs=("B1",),
            expected=("use-after-free",),
        ),
        Mutant(
            id="B1b",
            doc="A flush that an earlier root left pending is forgotten when a later root needs none.",
            source="cf3e26427c08, reverted by 873dd122172f before 5.18",
            bugs=("B1b",),
            expected=("use-after-free",),
        ),
        Mutant(
            id="B2",
            doc="The recovery of huge pages does not report that the TDP MMU needs a flush.",
            source=(
                "048f49809c52, 5.12, for NX huge pages; here for huge pages that come back after dirty "
                "logging"
            ),
            bugs=("B2",),
            expected=("walk-after-free",),
        ),
        Mutant(
            id="B3",
            doc=(
                "The recovery of huge pages calls a function that yields, and goes on with the iterator from "
                "before."
            ),
            source=(
                "33a3164161fc, 5.12, for NX huge pages; here for huge pages that come back after dirty "
                "logging"
            ),
            bugs=("B3",),
            expected=("walk-after-free",),
        ),
        Mutant(
            id="B4",
            doc="A flush that a yield has made is made once more.",
            source="c7785d85b6c6 and 8ed716ca7dc9, 5.16",
            bugs=("B4",),
        ),
        Mutant(
            id="B6",
            doc=(
                "After a yield the iterator is restarted and then advanced, so one SPTE is skipped and "
                "survives the zap."
            ),
            source="3a0f64de479c, 5.16",
            bugs=("B6",),
            expected=("use-after-free",),
        ),
        Mutant(
            id="B7",
            doc=(
                "Arming the dirty log flushes only if some SPTE loses W just now. With access tracking "
                "(eptad = 0), aging may have taken W before, and a TLB still has the writable translation."
            ),
            source="b64d740ea7dd, 6.0",
            settings={"write_protect": "if-changed"},
            expected=("stale-after-revoke",),
        ),
        Mutant(
            id="B10",
            doc=(
                "A zap leaves its flush to the next flush of any kind (kvm->tlbs_dirty), and a notifier that "
                "finds nothing to zap makes none."
            ),
            source="6bc6db000295, 5.15, removed it",
            bugs=("B10",),
            expected=("use-after-free", "stale-after-revoke"),
        ),
        Mutant(
            id="B21",
            doc=(
                "A remote flush drops the current context only, and a vCPU goes back to a root that it had "
                "before."
            ),
            source="Flush all EPTP/VPID contexts on remote TLB flush, 5.8; with cached roots for SMM",
            settings={"remote_flush": "current-context", "role_change": "keep-roots"},
            expected=("use-after-free", "stale-after-revoke"),
        ),
        Mutant(
            id="B25",
            doc=(
                "A notifier holds no reference on the root that it walks, and yields; the root is freed "
                "meanwhile."
            ),
            source="7533377215b6, 5.16",
            bugs=("B25",),
            expected=("walk-after-free",),
        ),
        Mutant(
            id="B27",
            doc=(
                "A fault on a slot that is being deleted installs an MMIO SPTE over the SPTE that is still "
                "there."
            ),
            source="e0c378684b65, 6.0",
            bugs=("B27",),
            expected=("use-after-free", "stale-after-revoke"),
        ),
        Mutant(
            id="B32",
            doc="The TDP MMU holds no reference of its own on a root, so a role change zaps the whole tree.",
            source="edbdb43fc96b, 6.4",
            settings={"root_put": "inline"},
        ),
        Mutant(
            id="I1",
            doc=(
                "INIT resets a vCPU without a flush, and so do the writes to CR4 and CR0 with which the vCPU "
                "boots."
            ),
            source="kvm_vcpu_reset() and vmx_vcpu_reset(); the boot's flushes alone would suffice",
            settings={"role_change": "no-guest-flush"},
            bugs=("I1",),
            expected=("guest-stale",),
        ),
        Mutant(
            id="L1",
            doc=(
                "Reading a dirty log does not write-protect the pages that it reports, so nothing logs the "
                "next write."
            ),
            source="2673127d8ae2 and similar ones, 6.8",
            bugs=("L1",),
            expected=("lost-dirty",),
        ),
        Mutant(
            id="L2",
            doc=(
                "A dirty log is write-protected before its marks are taken, and the mark of a write in "
                "between is lost with them."
            ),
            source="edde99ce0529, 2.6.34",
            bugs=("L2",),
            expected=("lost-dirty",),
        ),
        Mutant(
            id="L3",
            doc=(
                "fast_page_fault() marks the page before it makes the SPTE writable, and the log is read in "
                "between."
            ),
            source="the comment in fast_pf_fix_direct_spte()",
            bugs=("L3",),
            expected=("lost-dirty",),
        ),
        Mutant(
            id="P1",
            doc=(
                "VM entry checks for requests before mode = IN_GUEST_MODE, so the vCPU and the requester "
                "miss each other."
            ),
            source="Documentation/virt/kvm/vcpu-requests.rst",
            settings={"entry_order": "requests-then-mode"},
            expected=("use-after-free",),
        ),
        Mutant(
            id="P2",
            doc=(
                "Interrupts are enabled once more between the last check for requests and VM entry, so the "
                "kick ends no guest mode."
            ),
            source="local_irq_disable() in vcpu_enter_guest()",
            bugs=("P2",),
            expected=("use-after-free",),
        ),
        Mutant(
            id="P3",
            doc=(
                "The requester reads the mode before it makes the request, so the vCPU and the requester "
                "miss each other."
            ),
            source="Documentation/virt/kvm/vcpu-requests.rst",
            bugs=("P3",),
            expected=("use-after-free",),
        ),
        Mutant(
            id="P4",
            doc="The flusher does not wait until the interrupted pCPUs have left guest mode.",
            source="kvm_request_needs_ipi() without KVM_REQUEST_WAIT",
            settings={"kick_wait": "no-wait"},
            expected=("use-after-free",),
        ),
        Mutant(
            id="P7",
            doc="A flush of all contexts uses INVVPID, which leaves guest-physical mappings.",
            source="the comment in vmx_flush_tlb_all()",
            bugs=("P7",),
            expected=("use-after-free", "stale-after-revoke"),
        ),
        Mutant(
            id="P8",
            doc=(
                "A flush for the guest uses INVEPT single-context, which drops too much and nothing too "
                "little."
            ),
            source="vmx_flush_tlb_guest(); a bug only where L1 and L2 share a VPID",
            bugs=("P8",),
        ),
        Mutant(
            id="P9",
            doc="kvm_mmu_load() does not flush, so entries of an earlier root on the same page come back.",
            source="the comment in kvm_mmu_load()",
            settings={"root_load": "none"},
            expected=("foreign-root",),
        ),
        Mutant(
            id="P10",
            doc=(
                "Tables are given to call_rcu(), then RCU is left, then the flush is made; a grace period "
                "can end before the flush."
            ),
            source="the order that bd29677952fa, 5.18, ended, with the batching of bb95dfb9e2df",
            settings={"zap_scope": "leafs-and-tables", "zap_yield": "unlock-then-flush"},
            expected=("walk-after-free",),
        ),
        Mutant(
            id="P11",
            doc="The flush comes before the zap, so an entry that is refilled in between stays.",
            source="kvm_handle_hva_range(), with its order reversed",
            bugs=("P11",),
            expected=("use-after-free",),
        ),
        Mutant(
            id="P13",
            doc=(
                "A fault maps over a FROZEN SPTE, and the zap that froze it empties it without another flush."
            ),
            source="tdp_mmu_zap_spte_atomic() before 6.13, is_frozen_spte() in kvm_tdp_mmu_map()",
            base="linux-6.12",
            bugs=("P13",),
            expected=("use-after-free",),
        ),
        Mutant(
            id="P14",
            doc=(
                "The children of a removed table are emptied, not frozen, so a fault maps into it where no "
                "zap finds the SPTE. Only a leak, because the flush that is due drops every way to the "
                "table."
            ),
            source="handle_removed_pt()",
            bugs=("P14",),
        ),
        Mutant(
            id="P15",
            doc="A fault does not check whether it raced an invalidation.",
            source="mmu_invalidate_retry_gfn()",
            settings={"fault_retry": "none"},
            expected=("use-after-free",),
        ),
        Mutant(
            id="P15b",
            doc="A fault samples mmu_invalidate_seq after it has looked the frame up, not before.",
            source="kvm_faultin_pfn()",
            bugs=("P15b",),
            expected=("use-after-free",),
        ),
        Mutant(
            id="P15c",
            doc="A fault does not check whether an invalidation of its gfn is in progress.",
            source="mmu_invalidate_retry_gfn()",
            bugs=("P15c",),
            expected=("use-after-free",),
        ),
        Mutant(
            id="P16",
            doc="invalidate_range_start returns before the flush, which invalidate_range_end makes.",
            source="kvm_handle_hva_range()",
            settings={"notifier_flush": "at-range-end"},
            expected=("use-after-free",),
        ),
        Mutant(
            id="P23",
            doc="root.cpu_flushed_mask as sketched: nothing clears it.",
            source="the sketch of August 2025, patch 5",
            settings={"migration": "cpu-flushed-mask"},
            expected=("use-after-free", "guest-stale", "stale-after-revoke"),
        ),
        Mutant(
            id="P23b",
            doc=(
                "The masks are cleared after the kick, when a vCPU may have serviced the request and moved "
                "on."
            ),
            source="a wrong place for the repair of the sketch",
            base="cpu-flushed-mask-cleared",
            bugs=("P23b",),
            expected=("use-after-free",),
        ),
        Mutant(
            id="P23d",
            doc="The repaired mask (cpu-flushed-mask-cleared) without INVVPID on migration.",
            source="native invalidations by the guest on another pCPU",
            base="cpu-flushed-mask-cleared",
            settings={"migration_vpid": "with-ept"},
            expected=("guest-stale",),
        ),
        Mutant(
            id="P24",
            doc="A migration flushes the current root only, not the cached ones.",
            source="the set of roots of August 2025, patch 4, without prev_roots",
            base="lkml-2025-active-roots",
            settings={"role_change": "keep-roots"},
            bugs=("P24",),
            expected=("use-after-free", "stale-after-revoke"),
        ),
        Mutant(
            id="P29",
            doc="Clearing CR0.PG leaves the guest's translations cached.",
            source="b5f61c035d49, 5.18, without its flush",
            settings={"role_change": "no-guest-flush"},
            expected=("guest-stale",),
        ),
        Mutant(
            id="P31",
            doc="SMM does not change the address space of the root.",
            source="kvm_smm_changed() without the new role",
            bugs=("P31",),
            expected=("use-after-free", "stale-after-revoke"),
        ),
        Mutant(
            id="P32",
            doc="The flush after reading a dirty log comes before the last pages are write-protected.",
            source="kvm_get_dirty_log_protect()",
            bugs=("P32",),
            expected=("stale-after-revoke",),
        ),
        Mutant(
            id="R1",
            doc="root-tlb-gen does not compare generations before VM entry, so cached roots are forgotten.",
            source="a guard of root-tlb-gen",
            base="root-tlb-gen",
            settings={"role_change": "keep-roots"},
            bugs=("R1",),
            expected=("use-after-free", "stale-after-revoke"),
        ),
        Mutant(
            id="R2",
            doc="root-tlb-gen without INVVPID on migration.",
            source="native invalidations by the guest on another pCPU",
            base="root-tlb-gen",
            settings={"migration_vpid": "with-ept"},
            expected=("guest-stale",),
        ),
        Mutant(
            id="R3",
            doc="A remote flush under root-tlb-gen advances the generations after the kick.",
            source="a guard of root-tlb-gen",
            base="root-tlb-gen",
            bugs=("P23b",),
            expected=("use-after-free",),
        ),
        Mutant(
            id="R4",
            doc="Generations outlive the root, so the next root on the page counts as flushed.",
            source="a guard of root-tlb-gen",
            base="root-tlb-gen",
            bugs=("R4",),
            expected=("foreign-root",),
        ),
        Mutant(
            id="RFC02",
            doc=(
                "Removed tables are collected on a list and given to RCU, and the flush comes after RCU has "
                "been left."
            ),
            source="[RFC 02/19] of November 2021 alone; found in its review, fixed by 03/19",
            base="lkml-2021-batch-list",
            bugs=("RFC02",),
            expected=("walk-after-free",),
        ),
        Mutant(
            id="S1",
            doc=(
                "VM entry has no full barrier between mode = IN_GUEST_MODE and the last check for requests: "
                "the store may still be in the CPU's store buffer."
            ),
            source="smp_mb__after_srcu_read_unlock() in vcpu_enter_guest()",
            bugs=("S1",),
            expected=("use-after-free",),
            store_buffers=True,
        ),
        Mutant(
            id="S2",
            doc=(
                "The requester makes its request by a plain store and reads the mode before the cmpxchg, so "
                "no barrier separates the two where the vCPU is outside guest mode."
            ),
            source="smp_mb__before_atomic() in kvm_vcpu_exiting_guest_mode()",
            bugs=("S2",),
            expected=("use-after-free",),
            store_buffers=True,
        ),
        Mutant(
            id="S3",
            doc=(
                "Under root-tlb-gen, vCPUs outside guest mode get no request, because they compare "
                "generations before entry; and a remote flush advances the generation by a plain store, "
                "without a barrier before it reads the modes."
            ),
            source="atomic64_inc_return() in a remote flush under root-tlb-gen",
            base="root-tlb-gen",
            bugs=("S3",),
            expected=("use-after-free",),
            store_buffers=True,
        ),
        Mutant(
            id="S4",
            doc=(
                "entry-without-barrier under root-tlb-gen: generations and requests are checked before the "
                "mode is visible."
            ),
            source="smp_mb__after_srcu_read_unlock() in vcpu_enter_guest()",
            base="root-tlb-gen",
            bugs=("S1",),
            expected=("use-after-free",),
            store_buffers=True,
        ),
        Mutant(
            id="Z1",
            doc=(
                "kvm_zap_gfn_range() does not count as an invalidation, so a fault that looked a frame up "
                "before it installs the page that is being zapped."
            ),
            source="edb298c663fc, 5.15",
            bugs=("Z1",),
            expected=("stale-after-revoke",),
        ),
        Mutant(
            id="Z2",
            doc=(
                "A notifier leaves out invalid roots, and the worker that zaps them afterwards marks pages "
                "that are free."
            ),
            source="d62007edf01f, 5.18",
            base="linux-5.14",
            bugs=("Z2",),
            expected=("use-after-free",),
        ),
    )
}


def find_mutant(name: str, where: str = NAMED_BY) -> Mutant:
    """Return the mutant of that name or id, which may have the prefix or not."""
    short = name.removeprefix(PREFIX)
    short = NAMES.get(short, short)
    try:
        return MUTANTS[short]
    except KeyError:
        close = closest(short, MUTANTS)
        guess = f" (did you mean {PREFIX}{close}?)" if close else ""
        names = ", ".join(PREFIX + known for known in MUTANTS)
        raise PolicyError(where, f"unknown mutant {shown(name)}", f"one of {names}{guess}") from None
