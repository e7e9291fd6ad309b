"""The registry of decision points: where KVM could flush, kick, wait or order differently, and each answer.

KVM states the points and their answers (emulator.kvm.decisions); here they are described.  An answer that is
known to be wrong is a *mutant*: it exists so that the oracle can be seen to catch it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, get_args, get_type_hints

from emulator.kvm.decisions import Decisions

# The answer of a policy that acts itself; a table has no use for it.
DONE: Final = "done"


@dataclass(frozen=True, slots=True)
class Alternative:
    """One answer.  `mutant`: known to be wrong, by itself or together with answers that `doc` names.

    proposed: KVM does not know it: the class of that proposal decides (emulator.policy.proposals).
    """

    name: str
    doc: str
    mutant: bool = False
    proposed: bool = False


@dataclass(frozen=True, slots=True)
class DecisionPoint:
    """A question that a policy answers; `name` is also the method of `Policy`.

    acts: a policy's class may also answer `done`.
    """

    name: str
    doc: str
    alternatives: tuple[Alternative, ...]
    acts: bool = False

    @property
    def default(self) -> str:
        """Return the answer of Linux 7.3."""
        return self.alternatives[0].name

    def answers(self) -> tuple[str, ...]:
        """Return the answers that a class may give."""
        return (*self.names(), DONE) if self.acts else self.names()

    def proposals(self) -> tuple[str, ...]:
        """Return the alternatives that are proposals: their classes (emulator.policy.proposals) decide."""
        return tuple(alternative.name for alternative in self.alternatives if alternative.proposed)

    def names(self) -> tuple[str, ...]:
        return tuple(alternative.name for alternative in self.alternatives)

    def alternative(self, name: str) -> Alternative:
        return next(a for a in self.alternatives if a.name == name)


def answers_of(method: Callable[..., str]) -> tuple[str, ...]:
    """Return the answers to a decision point, a method of `Decisions`, in the order of its Literal."""
    answers: tuple[str, ...] = get_args(get_type_hints(method)["return"])
    return answers


def _point(
    method: Callable[..., str],
    doc: str,
    right: Mapping[str, str],
    *,
    wrong: Mapping[str, str] | None = None,
    proposed: Mapping[str, str] | None = None,
    proposed_wrong: Mapping[str, str] | None = None,
) -> DecisionPoint:
    """Describe a decision point: each of KVM's answers, the wrong ones in `wrong`, and the proposals."""
    answers, mutants = tuple(one for one in answers_of(method) if one != DONE), wrong or {}
    described = [*right, *mutants]
    if sorted(described) != sorted(answers):
        raise AssertionError(f"{method.__name__} has answers {answers}; described are {described}")
    alternatives = (Alternative(one, mutants.get(one) or right[one], one in mutants) for one in answers)
    proposals = (
        *(Alternative(one, text, proposed=True) for one, text in (proposed or {}).items()),
        *(Alternative(one, text, True, True) for one, text in (proposed_wrong or {}).items()),
    )
    return DecisionPoint(method.__name__, doc, (*alternatives, *proposals), DONE in answers_of(method))


POINTS: tuple[DecisionPoint, ...] = (
    _point(
        Decisions.remote_flush,
        "The flush of a vCPU that services KVM_REQ_TLB_FLUSH (kvm_vcpu_flush_tlb_all).",
        {
            "all-contexts": "INVEPT global: all EPTPs, of all VMs that have run on the pCPU.",
        },
        proposed={
            "active-roots": "INVEPT single-context on the vCPU's current and previous roots.",
            "root-tlb-gen": (
                "INVEPT single-context on those of the vCPU's current and previous roots whose generation "
                "has advanced since this pCPU last flushed them, possibly for another vCPU."
            ),
        },
        wrong={
            "current-context": (
                "INVEPT single-context on the current root only, as before 5.7. Wrong as soon as a vCPU can "
                "return without a flush to a root that it used before (SMM, nested guests)."
            ),
        },
    ),
    _point(
        Decisions.remote_kick,
        "Which pCPUs a request that waits interrupts (kvm_make_vcpus_request_mask).",
        {
            "mode-not-outside": "The pCPUs on which a vCPU of the VM is not OUTSIDE_GUEST_MODE.",
            "all-pcpus": "Every pCPU of the host.",
        },
        proposed={
            "vm-pcpu-mask": (
                "Every pCPU on which a vCPU of the VM was ever loaded. A pCPU that joins the mask is flushed."
            ),
        },
    ),
    _point(
        Decisions.kick_wait,
        "Whether a flusher waits until the interrupted pCPUs have left guest mode (KVM_REQUEST_WAIT).",
        {
            "wait": "It waits: smp_call_function_many() with wait.",
        },
        wrong={
            "no-wait": (
                "It does not wait, so guests keep running for a moment after the flush is reported done."
            ),
        },
    ),
    _point(
        Decisions.root_load,
        "Flush when kvm_mmu_load() makes a root current.",
        {
            "flush-current": (
                "INVEPT single-context on the root, because its page may have been a root before."
            ),
        },
        proposed={
            "root-tlb-gen": (
                "INVEPT single-context on the root, unless this pCPU has flushed it since its generation "
                "last advanced. Wrong with role_change=unload-all, where the guest relies on this flush."
            ),
        },
        wrong={
            "none": (
                "No flush: entries of the page's earlier life as a root come back, unless the root's "
                "allocation flushed every pCPU, or its generation is compared before VM entry."
            ),
        },
    ),
    _point(
        Decisions.cached_root,
        "Flush when a previous root becomes current without kvm_mmu_load() (fast_pgd_switch).",
        {
            "none": "No flush: every operation that makes entries stale flushes previous roots, too.",
            "flush-current": (
                "KVM_REQ_TLB_FLUSH_CURRENT, as with force_flush_and_sync_on_reuse: INVEPT single-context on "
                "the root."
            ),
        },
    ),
    _point(
        Decisions.root_alloc,
        "Flush when a page becomes a root (kvm_tdp_mmu_alloc_root).",
        {
            "none": "No flush: a vCPU that loads the root flushes it, on the pCPU where it loads it.",
        },
        proposed={
            "vm-pcpu-mask": (
                "INVEPT single-context on the root, on the pCPUs where a vCPU of the VM was ever loaded. A "
                "pCPU that joins is flushed (an idea of August 2025)."
            ),
            "on-each-cpu": (
                "INVEPT single-context on the root, on every pCPU of the host (proposed in July 2025)."
            ),
        },
    ),
    _point(
        Decisions.root_lock,
        "How a vCPU holds mmu_lock while it takes or drops roots (kvm_mmu_load, kvm_mmu_free_roots).",
        {
            "read": "For read, as page faults do (since 6.9).",
            "write": "For write: no page fault and no zap runs meanwhile (before 6.9).",
        },
    ),
    _point(
        Decisions.root_put,
        "The end of a root, when its last reference is put (kvm_tdp_mmu_put_root).",
        {
            "sync-no-flush": (
                "The root's page is given to RCU. The TDP MMU holds a reference of its own until the root "
                "is invalidated and zapped (since 6.6)."
            ),
            "flush": (
                "A remote flush is made, and then the root's page is given to RCU as with sync-no-flush."
            ),
            "async": (
                "A worker zaps the root first. A role change may put the last reference and lose the whole "
                "tree (5.18 to 6.5)."
            ),
            "inline": (
                "The thread that puts the last reference unlinks and zaps the root at once, in one step. A "
                "role change may be that thread (before 5.18)."
            ),
        },
    ),
    _point(
        Decisions.invalid_root_zap,
        "Flush when the SPTEs of an invalidated root have been zapped.",
        {
            "no-flush": (
                "No flush: no vCPU uses the root any more, and the next life of its page begins with a flush."
            ),
            "flush": "A remote flush at each yield and at the end (5.12 to 5.17).",
        },
    ),
    _point(
        Decisions.migration,
        "EPT half of the flush when a VMCS is loaded on another pCPU (vmx_vcpu_load_vmcs).",
        {
            "all-contexts": "KVM_REQ_TLB_FLUSH: INVEPT global before the next VM entry.",
        },
        wrong={
            "none": "No flush: entries of the vCPU's earlier stay on the pCPU come back.",
        },
        proposed={
            "active-roots": (
                "INVEPT single-context on the current and previous roots of root_mmu and guest_mmu "
                "(proposed in August 2025)."
            ),
            "cpu-flushed-mask-cleared": (
                "As cpu-flushed-mask, but a remote flush clears the masks of all roots before it makes its "
                "requests."
            ),
            "root-tlb-gen": (
                "As active-roots, but only roots whose generation has advanced since this pCPU last flushed "
                "them. A remote flush advances generations before it makes its requests."
            ),
        },
        proposed_wrong={
            "cpu-flushed-mask": (
                "As active-roots, but only roots whose cpu_flushed_mask does not have this pCPU, which then "
                "joins the mask (sketched in August 2025). An entry for a page that is zapped while the "
                "vCPU is elsewhere comes back."
            ),
        },
    ),
    _point(
        Decisions.migration_vpid,
        "VPID half of the flush when a VMCS is loaded on another pCPU: entries that the guest invalidated "
        "natively while its vCPU ran elsewhere.",
        {
            "with-ept": (
                "No flush of its own: INVEPT drops combined mappings, too. Wrong where the EPT half elides "
                "that INVEPT."
            ),
            "invvpid": "INVVPID single-context of the vCPU's VPID, on the new pCPU.",
        },
        wrong={
            "none": "No flush. Wrong together with an EPT half that does not drop the combined mappings.",
        },
    ),
    _point(
        Decisions.slot_delete,
        "The zap when a memslot is deleted or moved (kvm_arch_flush_shadow_memslot).",
        {
            "zap-all-roots": "Every root is invalidated, and vCPUs build new ones.",
            "zap-slot-leafs": (
                "The leaf SPTEs of the slot, with a flush (since 6.12, with the quirk disabled)."
            ),
        },
    ),
    _point(
        Decisions.zap_scope,
        "The SPTEs that the zap of a range removes (tdp_mmu_zap_leafs).",
        {
            "leafs": "Leaf SPTEs only; tables stay (since 5.18).",
            "leafs-and-tables": "Leaf SPTEs, and tables that lie wholly in the range (before 5.18).",
        },
    ),
    _point(
        Decisions.zap,
        "When tables that are unlinked are flushed, and when they are given to RCU (handle_removed_pt).",
        {
            "rcu-proxy": (
                "They are given to RCU at once. One flush for all of them comes before this thread leaves "
                "its read section, and so before a grace period can end (since 5.18)."
            ),
            "flush-per-table": (
                "Each table is flushed before it is given to RCU, at every level (before 5.18)."
            ),
        },
        proposed={
            "disconnected-list": (
                "They are collected on a list, flushed once, and then given to RCU (proposed in November "
                "2021)."
            ),
        },
    ),
    _point(
        Decisions.zap_root,
        "In which passes an invalidated root is zapped. A zap can yield only between two SPTEs of a pass.",
        {
            "4k-2m-1g-root": "Level by level, so that no step is long (since 6.9).",
            "1g-root": "Everything below each 1G SPTE in one step, then the root's SPTEs (5.18 to 6.8).",
            "root": "Everything below each SPTE of the root page in one step (before 5.18).",
        },
    ),
    _point(
        Decisions.zap_yield,
        "Order of flush and unlock in tdp_mmu_iter_cond_resched(), and at the end of walks that remove "
        "tables.",
        {
            "flush-then-unlock": "Flush, then rcu_read_unlock(), then drop mmu_lock (since 5.18).",
        },
        wrong={
            "unlock-then-flush": (
                "rcu_read_unlock(), then flush, then drop mmu_lock (5.12 to 5.17). Harmless while only leaf "
                "SPTEs are zapped, or while each table is flushed before it is given to RCU. Wrong with "
                "zap=rcu-proxy."
            ),
            "no-flush": "The walk yields without the flush, and reports it done.",
        },
    ),
    _point(
        Decisions.map_replace,
        "Flush when a fault installs a huge leaf over a table (tdp_mmu_map_handle_target_level).",
        {
            "flush": "kvm_flush_remote_tlbs_gfn() before rcu_read_unlock().",
        },
        wrong={
            "none": "No flush: cached pointers to the freed table stay in use.",
        },
    ),
    _point(
        Decisions.eager_split,
        "Whether huge pages are split when dirty logging is armed or cleared, before a write fault meets "
        "them (kvm_mmu_try_split_huge_pages).",
        {
            "split": (
                "All huge pages are split for which table pages are free, without a flush (since 5.18, with "
                "eager_page_split)."
            ),
            "none": "Huge pages are left to the write faults, decision fault_split (before 5.18).",
        },
    ),
    _point(
        Decisions.split_alloc,
        "Locks that are dropped while an eager split allocates a table (tdp_mmu_split_huge_pages_root).",
        {
            "unlocked": "RCU and mmu_lock, always; the walk then reads the SPTE again (6.12 and later).",
            "locked": "Neither, unless no table page is left at once (5.18 to 6.1).",
        },
    ),
    _point(
        Decisions.fault_split,
        "A huge leaf in the way of a fault that needs a 4K mapping (kvm_tdp_mmu_map).",
        {
            "split": "A table that maps the same frames replaces the leaf, without a flush (since 6.2).",
            "zap": "The leaf is zapped with a flush, and each 4K page faults again (before 6.2).",
        },
    ),
    _point(
        Decisions.huge_recovery,
        "How tables become huge pages again when dirty logging ends.",
        {
            "in-place": "A huge leaf replaces each table, with one flush for all (since 6.13).",
            "zap-each": "Each table is zapped and flushed, and faults install the 2M leafs (before 6.13).",
        },
    ),
    _point(
        Decisions.write_protect,
        "Flush after SPTEs were write-protected for dirty logging: when it is armed, and when the log is "
        "read.",
        {
            "flush": "Always when logging is armed, and when the log reported a page.",
        },
        wrong={
            "if-changed": (
                "Only if some SPTE lost W just now (before b64d740ea7dd). Wrong where W can be clear while "
                "a TLB still holds a writable translation, as with access tracking without A/D bits."
            ),
            "none": "No flush: writes through old translations are not logged.",
        },
    ),
    _point(
        Decisions.notifier_flush,
        "Flush of mmu_notifier_invalidate_range_start() after SPTEs were zapped.",
        {
            "before-return": "Under mmu_lock, before the notifier returns.",
        },
        wrong={
            "at-range-end": "In invalidate_range_end(), when the host has freed the page already.",
            "none": "No flush.",
        },
    ),
    _point(
        Decisions.age_lock,
        "Lock that is held while the host asks which pages a guest used (kvm_age_gfn).",
        {
            "rcu": "RCU alone: one read section over all valid roots, without references (since 6.15).",
            "mmu-lock": (
                "mmu_lock for write, over the walks of all roots and the flush that age_flush decides "
                "(before 6.15)."
            ),
        },
    ),
    _point(
        Decisions.age_flush,
        "Flush when reclaim asks whether pages were used, and some were "
        "(kvm_mmu_notifier_clear_flush_young).",
        {
            "none": "No flush: pages that TLBs still map look unused, which costs little (since 6.13).",
            "if-young": "A remote flush (before 6.13).",
        },
    ),
    _point(
        Decisions.zapped_pfn,
        "The accessed and dirty bits of a leaf SPTE that is zapped (handle_changed_spte).",
        {
            "none": "Nothing: KVM marked the page when it made the SPTE (since 6.13).",
            "set-dirty-accessed": (
                "kvm_set_pfn_dirty() and kvm_set_pfn_accessed() (before 6.13). KVM uses the page, so the "
                "zap of an SPTE must come before the host frees the frame, even where no vCPU can reach the "
                "SPTE."
            ),
        },
    ),
    _point(
        Decisions.fault_retry,
        "Whether a page fault that raced an invalidation is retried (is_page_fault_stale).",
        {
            "invalidate-seq": "It is retried: mmu_invalidate_retry_gfn().",
        },
        wrong={
            "none": "It is not retried, and maps the frame that it looked up before.",
        },
    ),
    _point(
        Decisions.entry_order,
        "Order of mode = IN_GUEST_MODE and the last check for requests in vcpu_enter_guest().",
        {
            "mode-then-requests": "Mode, full barrier, requests (vcpu-requests.rst).",
        },
        wrong={
            "requests-then-mode": (
                "Requests, then mode: a requester in between sees OUTSIDE_GUEST_MODE and sends no IPI, and "
                "VM entry does not see its request."
            ),
        },
    ),
    _point(
        Decisions.role_change,
        "What happens to a vCPU's roots when CR0, CR4, EFER, SMM or CPUID change (kvm_mmu_reset_context).",
        {
            "reset-context": (
                "All roots are dropped, and the root of the new role is looked up and loaded. A change of "
                "CR0.WP alone drops none. Flushes that the guest is due are requested separately."
            ),
            "unload-all": (
                "All roots are dropped, for CR0.WP, too. The flush of the load is also the flush that the "
                "guest is due (before 5.18)."
            ),
            "keep-roots": (
                "The root of the new role may be a cached one, which is not loaded. Flushes that the guest "
                "is due are requested separately (proposed in February 2022)."
            ),
        },
        wrong={
            "no-guest-flush": "Roots are kept, and the guest does not get the flushes that it is due.",
        },
    ),
)

BY_NAME = {point.name: point for point in POINTS}
