/* The adversary of the architecture: entries may go at any time, as hardware may evict them.  For translations
 * that hardware fetches without need, see guest_speculate() in run.h. */
#ifndef FLUSHLAB_ADVERSARY_H
#define FLUSHLAB_ADVERSARY_H

#include "core/machine_types.h"

struct tlb;
struct walk;

/* api */
/* calls: anything */
/* Evict the n-th entry of tlb_dump(), from both levels, or of psc_dump(), and no other; no flush is charged for
 * the refill.  Returns 1, or 0 if there are not so many. */
int tlb_evict(struct tlb *t, uint32_t n);
int psc_evict(struct tlb *t, uint32_t n);
/* Return a pCPU's TLB; for its own thread, or while no other thread is inside the machine. */
/* call: anything; keeps-gil */
struct tlb *cpu_tlb(struct machine *m, uint32_t cpu);
/* end api */

/* Fetch a translation without an access, as guest_speculate() says (run.h). */
int walk_speculatively(const struct walk *w, uint64_t linear);

#endif
