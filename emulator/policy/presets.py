"""Named policies, for code that was merged or proposed, and when.

A proposal is encoded as posted, holes included.  A preset exists only if each of its answers does.
"""

from __future__ import annotations

from emulator.defaults import DEFAULT_POLICY
from emulator.errors import one_of, shown
from emulator.policy.mutants import PREFIX, find_mutant
from emulator.policy.policy import NAMED_BY, Policy, PolicyError

DEFAULT = DEFAULT_POLICY

# Answers that differ from those of Linux 7.3.  Bugs that were found later are not among them (they are
# mutants), and neither are differences without a decision point.
_LINUX_6_12 = {
    "mapped_fault": "remake",
    "huge_recovery": "zap-each",
    "age_lock": "mmu-lock",
    "age_flush": "if-young",
    "zapped_pfn": "set-dirty-accessed",
    "spte_update": "accessed-dirty",
}
_BEFORE_6_9 = {"invalid_roots": "include", "frozen_zap": "tables-first"}
_LINUX_5_14 = {
    "root_lock": "write",
    "root_put": "inline",
    "invalid_root_zap": "flush",
    "zap_scope": "leafs-and-tables",
    "zap": "flush-per-table",
    "zap_root": "root",
    # Harmless here: each table's flush comes before the table goes to RCU.
    "zap_yield": "unlock-then-flush",
    "role_change": "unload-all",
    "sregs_flush": "none",
    "eager_split": "none",
    "fault_split": "zap",
    **_BEFORE_6_9,
    **_LINUX_6_12,
}
_LINUX_5_18 = {
    "root_lock": "write",
    "root_put": "async",
    "zap_root": "1g-root",
    "split_alloc": "locked",
    "fault_split": "zap",
    "sregs_flush": "none",
    **_BEFORE_6_9,
    **_LINUX_6_12,
}
_LINUX_6_1 = {answer: value for answer, value in _LINUX_5_18.items() if answer != "root_put"}
# https://lore.kernel.org/kvm/?q=s:%22do+not+unload+MMU+roots+on+all+role+changes%22
# KVM_SET_SREGS flushed by the load of the root alone then, which the patch takes away.
_KEEP_ROOTS = {"role_change": "keep-roots", "paging_off": "unload", "sregs_flush": "none"}
# What 5.18 answers to each point of that thread, and since when.
_MERGED_INSTEAD = {
    "role_change": "reset-context",
    "paging_off": "flush",  # 5.18 (b5f61c035d49), as the next one
    "smep_on": "current",
    "pcide_on": "free",
    "noflush_root": "none",  # 4.19 (956bf3531fba)
    "commit_zap": "flush-then-free",
    "spte_replace": "flush",
    "table_protect": "mmu-writable",  # 5.15 (f81602958c11)
    "sregs_flush": "none",  # until 2023 (4346db6e6e7a)
}
_BATCH_LIST = {"zap": "disconnected-list"}
_GENERATIONS = dict.fromkeys(("remote_flush", "root_load", "migration"), "root-tlb-gen")

PRESETS: dict[str, Policy] = {
    policy.name: policy
    for policy in (
        Policy(name=DEFAULT),
        Policy(name="linux-6.12", **_LINUX_6_12),
        Policy(name="linux-6.1", **_LINUX_6_1),
        Policy(name="linux-5.18", **_LINUX_5_18),
        Policy(name="linux-5.14", **_LINUX_5_14),
        Policy(name="lkml-2021-single-context", **{**_LINUX_5_14, "remote_flush": "current-context"}),
        Policy(name="lkml-2021-batch-list", **{**_LINUX_5_14, **_BATCH_LIST}),
        Policy(name="lkml-2022-keep-roots", **_KEEP_ROOTS),
        Policy(name="lkml-2022-merged", **_MERGED_INSTEAD),
        Policy(
            name="lkml-2025-on-each-cpu",
            root_alloc="on-each-cpu",
            root_load="none",
            migration="none",
            migration_vpid="none",
        ),
        Policy(
            name="lkml-2025-vm-pcpu-mask",
            root_alloc="vm-pcpu-mask",
            root_load="none",
            migration="none",
            migration_vpid="none",
        ),
        Policy(name="lkml-2025-hyperv-flush", hv_local_flush="hypercall", migration="none"),
        Policy(name="lkml-2025-active-roots", migration="active-roots"),
        Policy(name="lkml-2025-cpu-flushed-mask", migration="cpu-flushed-mask"),
        Policy(
            name="cpu-flushed-mask-cleared",
            remote_flush="active-roots",
            migration="cpu-flushed-mask-cleared",
            migration_vpid="invvpid",
        ),
        Policy(name="root-tlb-gen", **_GENERATIONS, migration_vpid="invvpid", smep_on="guest"),
    )
}

PRESET_DOCS = {
    "linux-7.3": "Linux 7.3 (October 2026), the newest version that the model follows.",
    "linux-6.12": (
        "Linux 6.12: a flush for each table that becomes a huge page again, and for each range that reclaim "
        "finds used."
    ),
    "linux-6.1": (
        "Linux 6.1 with the fixes of its stable releases (6.1.192): as 5.18, but the TDP MMU keeps a "
        "reference to each root, and the thread that invalidates roots zaps them; there is no worker."
    ),
    "linux-5.18": (
        "Linux 5.18, after the overhaul of zaps and flushes: RCU is the proxy of the flush; a worker zaps "
        "roots; under dirty logging a write fault zaps and flushes a huge page that was not split before."
    ),
    "linux-5.14": (
        "Linux 5.14: a flush for each removed table; the thread that puts the last reference to a root zaps "
        "the root at once; under dirty logging write faults zap and flush huge pages, which are never split."
    ),
    "lkml-2021-single-context": (
        "Proposed in August 2021: KVM_REQ_TLB_FLUSH flushes the current context only. Sound while a vCPU has "
        "one root."
    ),
    "lkml-2021-batch-list": (
        "Proposed in November 2021: removed tables are collected on a list until one flush has been made for "
        "all."
    ),
    "lkml-2022-keep-roots": (
        "Proposed in February 2022, patch 12: a change of CR0, CR4, EFER or SMM keeps the cached roots, and "
        "may go back to one without a load. Clearing CR0.PG drops all. As posted, without a flush of "
        "KVM_SET_SREGS, but with the flushes of 5.18 for CR4."
    ),
    "lkml-2022-merged": (
        "Merged for 5.18 instead, on top of the other answers of 7.3: a change of CR0, CR4, EFER or SMM "
        "drops the roots, and the flushes that the guest is due are requested by themselves. KVM_SET_SREGS "
        "requests none: it relies on the load."
    ),
    "lkml-2025-on-each-cpu": (
        "Proposed in July 2025: a new root is flushed on every pCPU; loads and migrations flush nothing."
    ),
    "lkml-2025-vm-pcpu-mask": (
        "An idea of August 2025: a new root is flushed on the pCPUs where the VM ever ran; loads and "
        "migrations flush nothing."
    ),
    "lkml-2025-hyperv-flush": (
        "Proposed in June 2025, for hosts that are guests of Hyper-V: the flush of a loaded root is a "
        "hypercall, for which Hyper-V flushes all pCPUs; migrations flush nothing."
    ),
    "lkml-2025-active-roots": (
        "Proposed in August 2025, patch 4: a migration flushes the current and previous roots only."
    ),
    "lkml-2025-cpu-flushed-mask": (
        "Sketched in August 2025, patch 5: a migration flushes the current and previous roots only, and each "
        "only if this pCPU has not flushed it before. Nothing clears the mask."
    ),
    "cpu-flushed-mask-cleared": (
        "The sketch of August 2025, repaired: a remote flush clears the masks before it makes its requests, "
        "and a migration executes INVVPID."
    ),
    "root-tlb-gen": (
        "A generation per root, advanced by each remote flush, and compared with the pCPU's where roots are "
        "flushed today and once more before VM entry. A migration executes INVVPID, and so does a vCPU that "
        "sets CR4.SMEP, because the load of its root may flush nothing."
    ),
}


def preset(name: str, where: str = NAMED_BY) -> Policy:
    """Return a preset or a mutant (`mutant:NAME`) by name; raises PolicyError, which names `where`."""
    if name.startswith(PREFIX):
        mutant = find_mutant(name, where)
        return mutant.policy(preset(mutant.base))
    try:
        return PRESETS[name]
    except KeyError:
        raise PolicyError(where, f"unknown policy {shown(name)}", one_of(name, PRESETS)) from None
