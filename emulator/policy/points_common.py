"""The decision points that are asked on every host: requests, roots, faults, notifiers, logging."""

from __future__ import annotations

from typing import Final

from emulator.kvm.decisions import Decisions
from emulator.policy.point import DecisionPoint, point

COMMON_POINTS: Final[tuple[DecisionPoint, ...]] = (
    point(
        Decisions.remote_flush,
        "The flush of a vCPU that services KVM_REQ_TLB_FLUSH (kvm_vcpu_flush_tlb_all).",
        {
            "all-contexts": "INVEPT global: all EPTPs, of all VMs that have run on the pCPU.",
        },
        proposed={
            "active-roots": "INVEPT single-context on the vCPU's current and previous roots.",
            "root-tlb-gen": (
                "INVEPT single-context on each current or previous root of the vCPU, if the root's "
                "generation has advanced since this pCPU last flushed the root, even for another vCPU."
            ),
        },
        wrong={
            "current-context": (
                "INVEPT single-context on the current root only, as before 5.7. Wrong as soon as a vCPU can "
                "return without a flush to a root that it used before (SMM, nested guests)."
            ),
        },
    ),
    point(
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
    point(
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
    point(
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
                "last advanced. Wrong with role_change=unload-all or smep_on=current, where the guest relies "
                "on this flush."
            ),
        },
        wrong={
            "none": (
                "No flush: entries of the page's earlier life as a root come back, unless the root's "
                "allocation flushed every pCPU, or its generation is compared before VM entry."
            ),
        },
    ),
    point(
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
    point(
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
                "As active-roots, but a root only if its generation has advanced since this pCPU last "
                "flushed it. A remote flush advances generations before it makes its requests."
            ),
        },
        proposed_wrong={
            "cpu-flushed-mask": (
                "As active-roots, but a root only if its cpu_flushed_mask does not have this pCPU, which "
                "then joins the mask (sketched in August 2025). An entry for a page that is zapped while the "
                "vCPU is elsewhere comes back."
            ),
        },
    ),
    point(
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
    point(
        Decisions.slot_delete,
        "The zap when a memslot is deleted or moved (kvm_arch_flush_shadow_memslot).",
        {
            "zap-all-roots": "Every root is invalidated, and vCPUs build new ones.",
            "zap-slot-leafs": (
                "The leaf SPTEs of the slot, with a flush (since 6.12, with the quirk disabled)."
            ),
        },
    ),
    point(
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
    point(
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
    point(
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
    point(
        Decisions.age_flush,
        "Flush when reclaim asks whether pages were used, and some were "
        "(kvm_mmu_notifier_clear_flush_young).",
        {
            "none": "No flush: pages that TLBs still map look unused, which costs little (since 6.13).",
            "if-young": "A remote flush (before 6.13).",
        },
    ),
    point(
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
    point(
        Decisions.fault_retry,
        "Whether a page fault that raced an invalidation is retried (is_page_fault_stale).",
        {
            "invalidate-seq": "It is retried: mmu_invalidate_retry_gfn().",
        },
        wrong={
            "none": "It is not retried, and maps the frame that it looked up before.",
        },
    ),
    point(
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
    point(
        Decisions.role_change,
        "What happens to a vCPU's roots when CR0, CR4, EFER, SMM or CPUID change (kvm_mmu_reset_context).",
        {
            "reset-context": (
                "All roots are dropped, and the root of the new role is looked up and loaded. With EPT a "
                "change of CR0.WP alone drops none. Flushes that the guest is due are requested separately."
            ),
            "unload-all": (
                "All roots are dropped, for CR0.WP, too. The flush of the load is also the flush that the "
                "guest is due (before 5.18)."
            ),
            "keep-roots": (
                "The root of the new role may be a cached one, which is not loaded. Flushes that the guest "
                "is due are requested separately (proposed in February 2022). Wrong without EPT: a cached "
                "root may be one that the guest's invalidations did not sync."
            ),
            "keep-roots-synced": (
                "As keep-roots, but a cached root is synced and its context flushed, as "
                "kvm_mmu_load() would. Without EPT the repair of keep-roots."
            ),
        },
        wrong={
            "no-guest-flush": "Roots are kept, and the guest does not get the flushes that it is due.",
        },
    ),
    point(
        Decisions.paging_off,
        "The flush that the guest is due when it clears CR0.PG (kvm_post_set_cr0).",
        {
            "flush": (
                "KVM_REQ_TLB_FLUSH_GUEST (since 5.18). Without EPT wrong with role_change=keep-roots: the "
                "guest may write to its tables before it sets CR0.PG again."
            ),
            "unload": "All roots are dropped, and the next load flushes (proposed in February 2022).",
        },
    ),
    point(
        Decisions.smep_on,
        "The flush that the guest is due when it sets CR4.SMEP or toggles CR4.PAE (kvm_post_set_cr4).",
        {
            "current": (
                "KVM_REQ_TLB_FLUSH_CURRENT. Wrong where the role change drops the root and its load flushes "
                "nothing, because without a root there is no current context; and without EPT with "
                "role_change=keep-roots, because it syncs no root."
            ),
            "guest": "KVM_REQ_TLB_FLUSH_GUEST: no guest-physical mapping is lost, and roots are synced.",
        },
        wrong={
            "none": "No flush. Wrong unless the role change loads a root, which flushes.",
        },
    ),
    point(
        Decisions.sregs_flush,
        "The flush after user space changed a vCPU's control registers (KVM_SET_SREGS).",
        {
            "guest": "KVM_REQ_TLB_FLUSH_GUEST, whatever has changed (since 4346db6e6e7a, 2023).",
            "none": (
                "No flush of its own (before 2023). Wrong unless the role change loads a root, which flushes "
                "and syncs."
            ),
        },
    ),
)
