"""The decision points: where KVM could flush, kick, wait or order differently, and every known answer.

The first alternative of each point is what Linux 7.3 does.  An alternative that is known to be wrong is a
*mutant*: it exists so that the oracle can be seen to catch it.
"""

from __future__ import annotations

from dataclasses import dataclass


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


POINTS: tuple[DecisionPoint, ...] = (
    DecisionPoint(
        "remote_flush",
        "what a vCPU drops when it serves KVM_REQ_TLB_FLUSH (kvm_vcpu_flush_tlb_all)",
        (
            Alternative("all-contexts", "INVEPT global: every EPTP, every VM on the pCPU"),
            Alternative("active-roots", "INVEPT single on the vCPU's current and previous roots"),
            Alternative(
                "root-tlb-gen",
                "... on those whose generation moved on since this pCPU flushed them, maybe for another vCPU",
            ),
            Alternative(
                "current-context",
                "INVEPT single on the current root only, as to 5.6; wrong as soon as a vCPU can go back to a "
                "root that it used before without a flush (SMM, nested guests)",
                mutant=True,
            ),
        ),
    ),
    DecisionPoint(
        "remote_kick",
        "which pCPUs a waiting request interrupts (kvm_make_vcpus_request_mask)",
        (
            Alternative("mode-not-outside", "those where a vCPU of the VM is not OUTSIDE_GUEST_MODE"),
            Alternative(
                "vm-pcpu-mask",
                "every pCPU on which a vCPU of the VM was ever loaded; a pCPU that joins is flushed",
            ),
            Alternative("all-pcpus", "every pCPU of the host"),
        ),
    ),
    DecisionPoint(
        "kick_wait",
        "does the flusher wait until the interrupted pCPUs have left guest mode (KVM_REQUEST_WAIT)",
        (
            Alternative("wait", "yes: smp_call_function_many() with wait"),
            Alternative(
                "no-wait",
                "no: guests go on for a moment after the flush is said to be done",
                mutant=True,
            ),
        ),
    ),
    DecisionPoint(
        "root_load",
        "a root becomes current through kvm_mmu_load",
        (
            Alternative("flush-current", "INVEPT single on it: its page may have been a root before"),
            Alternative(
                "root-tlb-gen",
                "... unless this pCPU has flushed it since its generation moved on; wrong with "
                "role_change=unload-all, where the guest relies on this flush",
            ),
            Alternative(
                "none",
                "nothing: entries of its page's earlier life as a root come back, unless its allocation "
                "flushed every pCPU, or its generation is looked at before entry",
                mutant=True,
            ),
        ),
    ),
    DecisionPoint(
        "cached_root",
        "a previous root becomes current without kvm_mmu_load (fast_pgd_switch)",
        (
            Alternative("none", "nothing: whatever makes entries stale flushes previous roots, too"),
            Alternative(
                "flush-current",
                "KVM_REQ_TLB_FLUSH_CURRENT, as with force_flush_and_sync_on_reuse; INVEPT single on it",
            ),
        ),
    ),
    DecisionPoint(
        "root_alloc",
        "a page becomes a root (kvm_tdp_mmu_alloc_root)",
        (
            Alternative("none", "nothing: whoever loads it flushes, on the pCPU where it does"),
            Alternative("on-each-cpu", "INVEPT single on it on every pCPU of the host (proposed July 2025)"),
            Alternative(
                "vm-pcpu-mask",
                "... on the pCPUs where a vCPU of the VM was ever loaded; one that joins is flushed (idea of "
                "August 2025)",
            ),
        ),
    ),
    DecisionPoint(
        "root_put",
        "the last reference to a root goes (kvm_tdp_mmu_put_root)",
        (
            Alternative(
                "sync-no-flush",
                "its page goes to RCU; the TDP MMU holds a reference of its own until the root is "
                "invalidated, and who invalidated it has zapped it by then (since 6.6)",
            ),
            Alternative("flush", "the same with a remote flush before"),
            Alternative(
                "async",
                "a worker zaps it first; a role change may drop the last reference and lose the whole tree "
                "(5.18 to 6.5)",
            ),
            Alternative(
                "inline",
                "unlinked and zapped on the spot, in one go, by whoever dropped it, which a role change may "
                "do (to 5.17)",
            ),
        ),
    ),
    DecisionPoint(
        "invalid_root_zap",
        "the SPTEs of an invalidated root were zapped",
        (
            Alternative(
                "no-flush", "no vCPU uses the root any more; its page's next life begins with a flush"
            ),
            Alternative("flush", "at yields and at the end (5.12 to 5.17)"),
        ),
    ),
    DecisionPoint(
        "migration",
        "EPT half of what happens when a VMCS is loaded on another pCPU (vmx_vcpu_load_vmcs)",
        (
            Alternative("all-contexts", "KVM_REQ_TLB_FLUSH: INVEPT global before the next entry"),
            Alternative(
                "active-roots",
                "INVEPT single on current and previous roots of root_mmu and guest_mmu (proposed in August "
                "2025)",
            ),
            Alternative(
                "cpu-flushed-mask",
                "the same, but not for a root whose cpu_flushed_mask has this pCPU, which it has from then "
                "on (sketched in August 2025); what is zapped while the vCPU is elsewhere comes back",
                mutant=True,
            ),
            Alternative(
                "cpu-flushed-mask-cleared",
                "the same, and a remote flush clears the masks of all roots before it makes requests",
            ),
            Alternative(
                "root-tlb-gen",
                "INVEPT single on those active roots whose generation moved on since this pCPU flushed them; "
                "a remote flush advances it before it makes requests",
            ),
            Alternative("none", "nothing: entries from an earlier stay on the pCPU come back", mutant=True),
        ),
    ),
    DecisionPoint(
        "migration_vpid",
        "guest-visible half of the same flush: what the guest invalidated natively while it ran elsewhere",
        (
            Alternative(
                "with-ept",
                "left to the EPT half: INVEPT drops combined mappings, too; wrong where that half elides it",
            ),
            Alternative("invvpid", "INVVPID single-context of the vCPU's VPID on the new pCPU"),
            Alternative(
                "none",
                "nothing; wrong together with an EPT half that does not drop the combined mappings",
                mutant=True,
            ),
        ),
    ),
    DecisionPoint(
        "slot_delete",
        "what goes when a memslot is deleted or moved (kvm_arch_flush_shadow_memslot)",
        (
            Alternative("zap-all-roots", "every root is invalidated, vCPUs build new ones"),
            Alternative("zap-slot-leafs", "leafs of the slot, with a flush (6.12 with the quirk disabled)"),
        ),
    ),
    DecisionPoint(
        "zap_scope",
        "what a range zap removes (tdp_mmu_zap_leafs)",
        (
            Alternative("leafs", "leaf SPTEs only; tables stay (since 5.18)"),
            Alternative("leafs-and-tables", "tables that lie wholly in the range go too (to 5.17)"),
        ),
    ),
    DecisionPoint(
        "zap",
        "tables lose their link: when they are flushed, and when given to RCU (handle_removed_pt)",
        (
            Alternative(
                "rcu-proxy",
                "to RCU at once; one flush for all of them, before this thread leaves its read section and a "
                "grace period can end (since 5.18)",
            ),
            Alternative(
                "disconnected-list",
                "collected, flushed once, then given to RCU (proposed November 2021)",
            ),
            Alternative("flush-per-table", "a flush before each is given to RCU, at every level (to 5.17)"),
        ),
    ),
    DecisionPoint(
        "zap_root",
        "in which passes an invalidated root is zapped; it can yield between two SPTEs of a pass only",
        (
            Alternative("4k-2m-1g-root", "level by level, so that no step is long (since 6.9)"),
            Alternative("1g-root", "what is below 1G in one step each (5.18 to 6.8)"),
            Alternative("root", "what is below each SPTE of the root page in one step (to 5.17)"),
        ),
    ),
    DecisionPoint(
        "zap_yield",
        "order in tdp_mmu_iter_cond_resched, and at the end of walks that remove tables",
        (
            Alternative("flush-then-unlock", "flush, then rcu_read_unlock, then mmu_lock (since 5.18)"),
            Alternative(
                "unlock-then-flush",
                "rcu_read_unlock, then the flush, then mmu_lock (5.12 to 5.17); harmless while only leafs "
                "go, or tables go to RCU after a flush of their own; wrong with zap=rcu-proxy",
                mutant=True,
            ),
            Alternative("no-flush", "yields without the flush and reports it done", mutant=True),
        ),
    ),
    DecisionPoint(
        "map_replace",
        "a fault installs a huge leaf over a table (tdp_mmu_map_handle_target_level)",
        (
            Alternative("flush", "kvm_flush_remote_tlbs_gfn before rcu_read_unlock"),
            Alternative("none", "nothing: cached pointers to the freed table stay in use", mutant=True),
        ),
    ),
    DecisionPoint(
        "eager_split",
        "dirty logging is armed or cleared: huge pages before a write fault meets them "
        "(kvm_mmu_try_split_huge_pages)",
        (
            Alternative(
                "split",
                "all that there are table pages for, without a flush (since 5.18, with eager_page_split)",
            ),
            Alternative("none", "left to the write faults, decision fault_split (before 5.18)"),
        ),
    ),
    DecisionPoint(
        "fault_split",
        "a fault that needs a 4K mapping finds a huge leaf in its way (kvm_tdp_mmu_map)",
        (
            Alternative("split", "a table that maps the same replaces it, without a flush (since 6.2)"),
            Alternative("zap", "it is zapped with a flush, and each 4K page faults again (before 6.2)"),
        ),
    ),
    DecisionPoint(
        "huge_recovery",
        "dirty logging ends: how tables become huge pages again",
        (
            Alternative("in-place", "the huge leaf replaces the table, one batched flush (since 6.13)"),
            Alternative("zap-each", "each table is zapped and flushed, faults bring 2M (to 6.12)"),
        ),
    ),
    DecisionPoint(
        "write_protect",
        "flush after SPTEs were write-protected for dirty logging: when it is armed, and after reaping",
        (
            Alternative("flush", "always when logging is armed, and when a bit was reaped"),
            Alternative(
                "if-changed",
                "only if some SPTE lost W just now (before b64d740ea7dd); wrong where W can be clear while a "
                "TLB still holds a writable translation, as with access tracking without A/D bits",
                mutant=True,
            ),
            Alternative("none", "never: writes through old translations are not logged", mutant=True),
        ),
    ),
    DecisionPoint(
        "notifier_flush",
        "flush of mmu_notifier_invalidate_range_start after SPTEs were zapped",
        (
            Alternative("before-return", "under mmu_lock, before it returns"),
            Alternative("at-range-end", "in invalidate_range_end: the page is free by then", mutant=True),
            Alternative("none", "never", mutant=True),
        ),
    ),
    DecisionPoint(
        "age_flush",
        "reclaim asks whether pages were used, and some were (kvm_mmu_notifier_clear_flush_young)",
        (
            Alternative(
                "none", "no flush: what TLBs still hold looks unused, which costs little (since 6.13)"
            ),
            Alternative("if-young", "a remote flush (before 6.13)"),
        ),
    ),
    DecisionPoint(
        "zapped_pfn",
        "a leaf SPTE is zapped, which may say that its page was accessed or written (handle_changed_spte)",
        (
            Alternative("none", "nothing: the page was marked when the SPTE was made (since 6.13)"),
            Alternative(
                "set-dirty-accessed",
                "kvm_set_pfn_dirty() and kvm_set_pfn_accessed() (before 6.13): KVM uses the page, so the zap "
                "of an SPTE must come before the host frees the frame, also where no vCPU can reach the SPTE",
            ),
        ),
    ),
    DecisionPoint(
        "fault_retry",
        "a page fault races an invalidation (is_page_fault_stale)",
        (
            Alternative("invalidate-seq", "mmu_invalidate_retry_gfn: the fault starts over"),
            Alternative("none", "the frame number taken before is mapped all the same", mutant=True),
        ),
    ),
    DecisionPoint(
        "entry_order",
        "order of mode = IN_GUEST_MODE and the last look at requests in vcpu_enter_guest",
        (
            Alternative("mode-then-requests", "mode, full barrier, requests (vcpu-requests.rst)"),
            Alternative(
                "requests-then-mode",
                "a request made in between sees OUTSIDE, sends no IPI, and is not seen at entry",
                mutant=True,
            ),
        ),
    ),
    DecisionPoint(
        "role_change",
        "what happens to a vCPU's roots when CR0, CR4, EFER, SMM or CPUID change (kvm_mmu_reset_context)",
        (
            Alternative(
                "reset-context",
                "all are dropped, the one of the new role is looked up and loaded; CR0.WP alone changes "
                "none, and flushes that the guest is due are requested apart",
            ),
            Alternative(
                "unload-all",
                "all are dropped for CR0.WP, too; the load's flush is also what the guest is due (to 5.17)",
            ),
            Alternative(
                "keep-roots",
                "the root of the new role may be a cached one, without a load; flushes that the guest is due "
                "are requested apart (proposed February 2022)",
            ),
            Alternative(
                "no-guest-flush",
                "roots are kept and the guest does not get the flushes that it is due",
                mutant=True,
            ),
        ),
    ),
)

BY_NAME = {point.name: point for point in POINTS}
