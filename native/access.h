/* Guest accesses: a trace's records, as long as nothing but memory is asked for.  Each takes one interrupt poll, one
 * TLB look-up and one custody check. */
#ifndef FLUSHLAB_ACCESS_H
#define FLUSHLAB_ACCESS_H

#include "walk.h"

/* One entry into guest mode's. */
struct accesses {
	uint64_t polls, lookups, checks, l1_misses;
	/* What the loop over records reads: in memory, since not all of it fits into registers. */
	const _Atomic uint32_t *attention;
	const _Atomic uint16_t *tag;
	uint8_t *memory;
	uint64_t clock; /* guest's at record *p, less p / 8 */
};

void accesses_begin(struct accesses *a, struct walk *w);
/* Records up to `n` as far as they can be done: WALK_DONE, which also means that attention is wanted, or why the
 * next one cannot.  *done: how many were. */
enum walk_result accesses_run(struct accesses *a, struct walk *w, const uint64_t *records, uint64_t n, uint64_t *done);
/* One record, whoever wants attention. */
enum walk_result accesses_one(struct walk *w, uint64_t record);

#endif
