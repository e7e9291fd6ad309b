"""Sentences for the dangers that litmus tests can need (emulator.litmus.model)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

DANGERS: Final[Mapping[str, str]] = {
    "averted": "a flush had removed the entry that this access would have used wrongly",
    "legal-stale": "the entry's SPTE is zapped and its flush is not complete: a use that is allowed",
    "stale-walk": "the walk goes on from a cached pointer to a table that is unlinked and not yet freed",
    "dead-root": "the root's page was a root before, and entries of that time are cached",
    "kicks": "another CPU's call interrupts the guest",
    "crossed-calls": "two pCPUs have called each other, and each runs the other's call while it waits",
    "retries": "the fault meets an mmu_notifier's invalidation, and is retried",
    "slot-retries": "the fault meets a memslot that is being deleted, and is retried",
    "slot-waits": "the update of the memslots waits until the mmu_notifier's invalidation has ended",
    "frozen": "the fault meets an SPTE that another CPU has frozen, and is retried",
    "yields": "the walk over SPTEs drops mmu_lock before its end",
    "pending-flush": "the walk drops mmu_lock with zapped SPTEs that are not flushed yet",
    "root-gone": "the walk's root was invalidated while it had dropped mmu_lock",
    "tables-freed": "KVM frees a table",
    "elided": "KVM elides a flush",
    "guest-invalidations": "the guest invalidates TLB entries",
    "overlaps": "an invalidation begins while another one of its pages is in progress",
    "dirty-compared": "a page that was written while it was logged is compared with its copy",
    "unsync": "the guest's table becomes writable, so its shadow page goes out of date",
    "syncs": "KVM compares a shadow page with the guest's table",
    "prefetched": "the fault maps a neighbour of its page as well",
    "readers": "the kick meets a vCPU that reads SPTEs without mmu_lock, and its sender waits for it",
    "table-stores": "KVM emulates the guest's store to its table",
    "mmio-sptes": "an MMIO SPTE is made",
    "apic-aliases": "the pCPU has cached the APIC-access page as memory as well, for another guest",
    "apic-withheld": "the nested guest gets no mapping of the page of L1's APIC",
}
# Words for a danger in a step that has no row otherwise; if there are none, its name.
ROWS: Final = {
    "retries": "the fault is retried",
    "slot-retries": "the fault is retried",
    "slot-waits": "the update waits",
    "frozen": "the fault is retried",
    "overlaps": "invalidations overlap",
    "dead-root": "the root page is reused",
    "crossed-calls": "runs the other's call",
}
