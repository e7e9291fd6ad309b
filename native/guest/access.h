/* Guest accesses: a trace's records, as long as each needs nothing but memory.  Each takes one interrupt poll,
 * one TLB look-up and one custody check. */
#ifndef FLUSHLAB_ACCESS_H
#define FLUSHLAB_ACCESS_H

#include "core/machine_types.h"
#include "walk/walk.h"

/* The accesses of one entry into guest mode. */
struct accesses {
	uint64_t polls, lookups, checks, l1_misses;
	/* Read by the loop over records; kept in memory, since not all of it fits into registers. */
	const _Atomic uint32_t *attention;
	const _Atomic uint16_t *tag;
	uint8_t *memory;
	uint64_t clock; /* guest's clock at record *p, less p / 8 */
};

void accesses_begin(struct accesses *a, struct walk *w);
/* Do up to `n` records, as far as possible: WALK_DONE, also if attention is set, or the reason why the next
 * record cannot be done.  *done: the number of records done. */
enum walk_result accesses_run(struct accesses *a, struct walk *w, const uint64_t *records, uint64_t n, uint64_t *done);
/* Return whether the record is a store to this linear address. */
static inline bool record_stores_to(uint64_t record, uint64_t linear)
{
	return record >> 62 == ACCESS_WRITE && !((record ^ linear) & UINT64_C(0xffffffffffff));
}

/* Do one record, even if attention is set. */
enum walk_result accesses_one(struct walk *w, uint64_t record);

/* Do a guest access to a linear address outside the trace. */
enum walk_result guest_access_slow(struct walk *w, uint64_t record);
/* Without EPT: access a page as the guest's kernel does.  The first level of the TLB serves user mode alone. */
enum walk_result guest_access_as_kernel(struct walk *w, uint64_t record);
/* Do one half of guest_access_slow() each: find the translation; store through it if the record is a store. */
enum walk_result guest_translate(struct walk *w, uint64_t record, struct tlb_entry *e);
void guest_store(struct walk *w, uint64_t record, const struct tlb_entry *e);
/* Return whether KVM has emulated this store, and forget the emulated one. */
bool guest_store_emulated(struct walk *w, uint64_t record);

#endif
