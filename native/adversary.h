/* The adversary of the architecture: entries go at any time, as hardware may evict them.  What it fetches without need:
 * guest_speculate() in guest.h. */
#ifndef FLUSHLAB_ADVERSARY_H
#define FLUSHLAB_ADVERSARY_H

#include "machine.h"
#include "tlb.h"

/* api */
/* Evicts the n-th entry of tlb_dump(), from both levels, or of psc_dump(), and none but that one; no flush is
 * charged for the refill.  1, or 0: there are not so many. */
int tlb_evict(struct tlb *t, uint32_t n);
int psc_evict(struct tlb *t, uint32_t n);
/* A pCPU's; for its own thread, or while nobody else is inside the machine. */
struct tlb *cpu_tlb(struct machine *m, uint32_t cpu);
/* end api */

#endif
