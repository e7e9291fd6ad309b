"""The registry of decision points: where KVM could flush, kick, wait or order differently, and each answer.

KVM states the points and their answers (emulator.kvm.decisions); here they are described.  An answer that is
known to be wrong is a *mutant*: it exists so that the oracle can be seen to catch it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import get_args, get_type_hints

from emulator.kvm.decisions import Decisions


@dataclass(frozen=True, slots=True)
class Alternative:
    """One answer.  `mutant`: known to be wrong, by itself or together with answers that `doc` names."""

    name: str
    doc: str
    mutant: bool = False


@dataclass(frozen=True, slots=True)
class DecisionPoint:
    """A question that a policy answers; `name` is also the method of `Policy`."""

    name: str
    doc: str
    alternatives: tuple[Alternative, ...]

    @property
    def default(self) -> str:
        """Return the answer of Linux 7.3."""
        return self.alternatives[0].name

    def names(self) -> tuple[str, ...]:
        return tuple(alternative.name for alternative in self.alternatives)

    def alternative(self, name: str) -> Alternative:
        return next(a for a in self.alternatives if a.name == name)


def answers_of(method: Callable[..., str]) -> tuple[str, ...]:
    """Return the answers to a decision point, a method of `Decisions`, in the order of its Literal."""
    answers: tuple[str, ...] = get_args(get_type_hints(method)["return"])
    return answers


def _point(
    method: Callable[..., str], doc: str, right: Mapping[str, str], *, wrong: Mapping[str, str] | None = None
) -> DecisionPoint:
    """Describe a decision point: each of its answers, those known to be wrong in `wrong`."""
    answers, mutants = answers_of(method), wrong or {}
    described = [*right, *mutants]
    if sorted(described) != sorted(answers):
        raise AssertionError(f"{method.__name__} has answers {answers}; described are {described}")
    alternatives = (Alternative(one, mutants.get(one) or right[one], one in mutants) for one in answers)
    return DecisionPoint(method.__name__, doc, tuple(alternatives))


POINTS: tuple[DecisionPoint, ...] = (
    _point(
        Decisions.remote_flush,
        "what a vCPU drops when it serves KVM_REQ_TLB_FLUSH (kvm_vcpu_flush_tlb_all)",
        {
            "all-contexts": "INVEPT global: every EPTP, every VM on the pCPU",
            "active-roots": "INVEPT single on the vCPU's current and previous roots",
            "root-tlb-gen": "... on those whose generation moved on since this pCPU flushed them, maybe for "
            "another vCPU",
        },
        wrong={
            "current-context": "INVEPT single on the current root only, as to 5.6; wrong as soon as a vCPU "
            "can go back to a root that it used before without a flush (SMM, nested guests)",
        },
    ),
    _point(
        Decisions.remote_kick,
        "which pCPUs a waiting request interrupts (kvm_make_vcpus_request_mask)",
        {
            "mode-not-outside": "those where a vCPU of the VM is not OUTSIDE_GUEST_MODE",
            "vm-pcpu-mask": "every pCPU on which a vCPU of the VM was ever loaded; a pCPU that joins is "
            "flushed",
            "all-pcpus": "every pCPU of the host",
        },
    ),
    _point(
        Decisions.kick_wait,
        "does the flusher wait until the interrupted pCPUs have left guest mode (KVM_REQUEST_WAIT)",
        {
            "wait": "yes: smp_call_function_many() with wait",
        },
        wrong={
            "no-wait": "no: guests go on for a moment after the flush is said to be done",
        },
    ),
    _point(
        Decisions.root_load,
        "a root becomes current through kvm_mmu_load",
        {
            "flush-current": "INVEPT single on it: its page may have been a root before",
            "root-tlb-gen": "... unless this pCPU has flushed it since its generation moved on; wrong with "
            "role_change=unload-all, where the guest relies on this flush",
        },
        wrong={
            "none": "nothing: entries of its page's earlier life as a root come back, unless its allocation "
            "flushed every pCPU, or its generation is looked at before entry",
        },
    ),
    _point(
        Decisions.cached_root,
        "a previous root becomes current without kvm_mmu_load (fast_pgd_switch)",
        {
            "none": "nothing: whatever makes entries stale flushes previous roots, too",
            "flush-current": "KVM_REQ_TLB_FLUSH_CURRENT, as with force_flush_and_sync_on_reuse; INVEPT "
            "single on it",
        },
    ),
    _point(
        Decisions.root_alloc,
        "a page becomes a root (kvm_tdp_mmu_alloc_root)",
        {
            "none": "nothing: whoever loads it flushes, on the pCPU where it does",
            "on-each-cpu": "INVEPT single on it on every pCPU of the host (proposed July 2025)",
            "vm-pcpu-mask": "... on the pCPUs where a vCPU of the VM was ever loaded; one that joins is "
            "flushed (idea of August 2025)",
        },
    ),
    _point(
        Decisions.root_put,
        "the last reference to a root goes (kvm_tdp_mmu_put_root)",
        {
            "sync-no-flush": "its page goes to RCU; the TDP MMU holds a reference of its own until the root "
            "is invalidated, and who invalidated it has zapped it by then (since 6.6)",
            "flush": "the same with a remote flush before",
            "async": "a worker zaps it first; a role change may drop the last reference and lose the whole "
            "tree (5.18 to 6.5)",
            "inline": "unlinked and zapped on the spot, in one go, by whoever dropped it, which a role "
            "change may do (to 5.17)",
        },
    ),
    _point(
        Decisions.invalid_root_zap,
        "the SPTEs of an invalidated root were zapped",
        {
            "no-flush": "no vCPU uses the root any more; its page's next life begins with a flush",
            "flush": "at yields and at the end (5.12 to 5.17)",
        },
    ),
    _point(
        Decisions.migration,
        "EPT half of what happens when a VMCS is loaded on another pCPU (vmx_vcpu_load_vmcs)",
        {
            "all-contexts": "KVM_REQ_TLB_FLUSH: INVEPT global before the next entry",
            "active-roots": "INVEPT single on current and previous roots of root_mmu and guest_mmu "
            "(proposed in August 2025)",
            "cpu-flushed-mask-cleared": "the same, and a remote flush clears the masks of all roots before "
            "it makes requests",
            "root-tlb-gen": "INVEPT single on those active roots whose generation moved on since this pCPU "
            "flushed them; a remote flush advances it before it makes requests",
        },
        wrong={
            "cpu-flushed-mask": "the same, but not for a root whose cpu_flushed_mask has this pCPU, which "
            "it has from then on (sketched in August 2025); what is zapped while the vCPU is elsewhere "
            "comes back",
            "none": "nothing: entries from an earlier stay on the pCPU come back",
        },
    ),
    _point(
        Decisions.migration_vpid,
        "guest-visible half of the same flush: what the guest invalidated natively while it ran elsewhere",
        {
            "with-ept": "left to the EPT half: INVEPT drops combined mappings, too; wrong where that half "
            "elides it",
            "invvpid": "INVVPID single-context of the vCPU's VPID on the new pCPU",
        },
        wrong={
            "none": "nothing; wrong together with an EPT half that does not drop the combined mappings",
        },
    ),
    _point(
        Decisions.slot_delete,
        "what goes when a memslot is deleted or moved (kvm_arch_flush_shadow_memslot)",
        {
            "zap-all-roots": "every root is invalidated, vCPUs build new ones",
            "zap-slot-leafs": "leafs of the slot, with a flush (6.12 with the quirk disabled)",
        },
    ),
    _point(
        Decisions.zap_scope,
        "what a range zap removes (tdp_mmu_zap_leafs)",
        {
            "leafs": "leaf SPTEs only; tables stay (since 5.18)",
            "leafs-and-tables": "tables that lie wholly in the range go too (to 5.17)",
        },
    ),
    _point(
        Decisions.zap,
        "tables lose their link: when they are flushed, and when given to RCU (handle_removed_pt)",
        {
            "rcu-proxy": "to RCU at once; one flush for all of them, before this thread leaves its read "
            "section and a grace period can end (since 5.18)",
            "disconnected-list": "collected, flushed once, then given to RCU (proposed November 2021)",
            "flush-per-table": "a flush before each is given to RCU, at every level (to 5.17)",
        },
    ),
    _point(
        Decisions.zap_root,
        "in which passes an invalidated root is zapped; it can yield between two SPTEs of a pass only",
        {
            "4k-2m-1g-root": "level by level, so that no step is long (since 6.9)",
            "1g-root": "what is below 1G in one step each (5.18 to 6.8)",
            "root": "what is below each SPTE of the root page in one step (to 5.17)",
        },
    ),
    _point(
        Decisions.zap_yield,
        "order in tdp_mmu_iter_cond_resched, and at the end of walks that remove tables",
        {
            "flush-then-unlock": "flush, then rcu_read_unlock, then mmu_lock (since 5.18)",
        },
        wrong={
            "unlock-then-flush": "rcu_read_unlock, then the flush, then mmu_lock (5.12 to 5.17); harmless "
            "while only leafs go, or tables go to RCU after a flush of their own; wrong with zap=rcu-proxy",
            "no-flush": "yields without the flush and reports it done",
        },
    ),
    _point(
        Decisions.map_replace,
        "a fault installs a huge leaf over a table (tdp_mmu_map_handle_target_level)",
        {
            "flush": "kvm_flush_remote_tlbs_gfn before rcu_read_unlock",
        },
        wrong={
            "none": "nothing: cached pointers to the freed table stay in use",
        },
    ),
    _point(
        Decisions.eager_split,
        "dirty logging is armed or cleared: huge pages before a write fault meets them "
        "(kvm_mmu_try_split_huge_pages)",
        {
            "split": "all that there are table pages for, without a flush (since 5.18, with "
            "eager_page_split)",
            "none": "left to the write faults, decision fault_split (before 5.18)",
        },
    ),
    _point(
        Decisions.fault_split,
        "a fault that needs a 4K mapping finds a huge leaf in its way (kvm_tdp_mmu_map)",
        {
            "split": "a table that maps the same replaces it, without a flush (since 6.2)",
            "zap": "it is zapped with a flush, and each 4K page faults again (before 6.2)",
        },
    ),
    _point(
        Decisions.huge_recovery,
        "dirty logging ends: how tables become huge pages again",
        {
            "in-place": "the huge leaf replaces the table, one batched flush (since 6.13)",
            "zap-each": "each table is zapped and flushed, faults bring 2M (to 6.12)",
        },
    ),
    _point(
        Decisions.write_protect,
        "flush after SPTEs were write-protected for dirty logging: when it is armed, and after reaping",
        {
            "flush": "always when logging is armed, and when a bit was reaped",
        },
        wrong={
            "if-changed": "only if some SPTE lost W just now (before b64d740ea7dd); wrong where W can be "
            "clear while a TLB still holds a writable translation, as with access tracking without A/D bits",
            "none": "never: writes through old translations are not logged",
        },
    ),
    _point(
        Decisions.notifier_flush,
        "flush of mmu_notifier_invalidate_range_start after SPTEs were zapped",
        {
            "before-return": "under mmu_lock, before it returns",
        },
        wrong={
            "at-range-end": "in invalidate_range_end: the page is free by then",
            "none": "never",
        },
    ),
    _point(
        Decisions.age_flush,
        "reclaim asks whether pages were used, and some were (kvm_mmu_notifier_clear_flush_young)",
        {
            "none": "no flush: what TLBs still hold looks unused, which costs little (since 6.13)",
            "if-young": "a remote flush (before 6.13)",
        },
    ),
    _point(
        Decisions.zapped_pfn,
        "a leaf SPTE is zapped, which may say that its page was accessed or written (handle_changed_spte)",
        {
            "none": "nothing: the page was marked when the SPTE was made (since 6.13)",
            "set-dirty-accessed": "kvm_set_pfn_dirty() and kvm_set_pfn_accessed() (before 6.13): KVM uses "
            "the page, so the zap of an SPTE must come before the host frees the frame, also where no vCPU "
            "can reach the SPTE",
        },
    ),
    _point(
        Decisions.fault_retry,
        "a page fault races an invalidation (is_page_fault_stale)",
        {
            "invalidate-seq": "mmu_invalidate_retry_gfn: the fault starts over",
        },
        wrong={
            "none": "the frame number taken before is mapped all the same",
        },
    ),
    _point(
        Decisions.entry_order,
        "order of mode = IN_GUEST_MODE and the last look at requests in vcpu_enter_guest",
        {
            "mode-then-requests": "mode, full barrier, requests (vcpu-requests.rst)",
        },
        wrong={
            "requests-then-mode": "a request made in between sees OUTSIDE, sends no IPI, and is not seen at "
            "entry",
        },
    ),
    _point(
        Decisions.role_change,
        "what happens to a vCPU's roots when CR0, CR4, EFER, SMM or CPUID change (kvm_mmu_reset_context)",
        {
            "reset-context": "all are dropped, the one of the new role is looked up and loaded; CR0.WP "
            "alone changes none, and flushes that the guest is due are requested apart",
            "unload-all": "all are dropped for CR0.WP, too; the load's flush is also what the guest is due "
            "(to 5.17)",
            "keep-roots": "the root of the new role may be a cached one, without a load; flushes that the "
            "guest is due are requested apart (proposed February 2022)",
        },
        wrong={
            "no-guest-flush": "roots are kept and the guest does not get the flushes that it is due",
        },
    ),
)

BY_NAME = {point.name: point for point in POINTS}
