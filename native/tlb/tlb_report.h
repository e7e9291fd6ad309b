/* Reports: the translations that flushes dropped, with their ghosts, and those that are cached. */
#ifndef FLUSHLAB_TLB_REPORT_H
#define FLUSHLAB_TLB_REPORT_H

#include "core/machine_types.h"

struct tlb;
struct tlb_entry;

/* api */
/* calls: anything */
/* Name the flush that the following INVEPT and INVVPID belong to, for ghosts: a number that tlb_ghost_flush()
 * returns.  Drops by the guest's own instructions and by hardware always count as flush 0. */
void tlb_flush_begin(struct tlb *t, uint64_t flush);
/* Return the flush that made the ghost that the last tlb_lookup returned 2 for; 0: none of KVM's, or forgotten. */
uint64_t tlb_ghost_flush(struct tlb *t);
/* Report that ghost no more: it has been counted, and a retried access would find it again. */
void tlb_ghost_forget(struct tlb *t);
/* Return how many live second-level translations were dropped since tlb_flush_begin that a VM other than `vm`
 * filled, or all of them with vm -1.  Exact unless two VMs filled one context at a time (equal VPIDs or a
 * shared EPT root page): if such a context is dropped whole, entries of the VM that came second count as
 * another VM's, whichever VM asks. */
uint64_t tlb_dropped(struct tlb *t, int64_t vm);

/* Copy all valid entries, for tests and reports: fills up to max, returns how many there are. */
uint32_t tlb_dump(struct tlb *t, struct tlb_entry *entries, uint32_t max);
/* Return the number of contexts that may hold a valid entry. */
uint32_t tlb_contexts(struct tlb *t);
/* Look `page` up in the first level.  1: found, with the frame of the piece and right[3]. */
int tlb_l1_probe(struct tlb *t, uint64_t page, uint32_t *hfn, uint32_t *right);
/* end api */

/* Return whether the second level maps the frame `hfn` under another APIC-access page than `apic_page`, in any context. */
bool tlb_maps_as_memory(struct tlb *t, uint32_t hfn, uint32_t apic_page);

#endif
