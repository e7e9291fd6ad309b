/* Hardware page walks: EPT walks, and two-dimensional walks for linear addresses (SDM vol. 3C, 29.3.2).
 *
 * Every table entry read or written, in either dimension, is an access that the oracle judges.
 */
#ifndef FLUSHLAB_WALK_H
#define FLUSHLAB_WALK_H

#include "frame.h"
#include "guest_state.h"
#include "machine.h"

struct walk {
	struct machine *m;
	struct cpu *cpu;
	struct tlb *tlb;
	struct vcpu *vcpu;
	struct guest *guest;
	uint32_t life_bits;    /* life of the root page, << 16 */
	uint64_t linear;       /* address under translation, for reports */
	struct vcpu_exit *exit;
	bool speculative;      /* nobody's access: nothing is reported, faults have no effects (adversary.c) */
};

enum walk_result {
	WALK_DONE,
	WALK_GUEST_FAULT,  /* #PF */
	WALK_EPT_VIOLATION, /* w->exit says where */
	WALK_SKIPPED,      /* the access hit MMIO that user space has emulated: treat it as done */
};

/* Translate a guest-physical page for an access of `type`, through the TLB or by an EPT walk. */
enum walk_result walk_physical(struct walk *w, uint64_t gfn, uint32_t type, struct tlb_entry *out);
/* Translate a linear page by a two-dimensional walk, and cache the result. */
enum walk_result walk_linear(struct walk *w, uint64_t page, uint32_t type, struct tlb_entry *out);
/* The same for a page that was just looked for and is in neither level, where nothing is unusual: *hfn is its frame.
 * False: nothing has happened, walk_linear() must. */
bool walk_usual(struct walk *w, uint64_t page, uint32_t type, uint32_t *hfn);
/* guest_speculate() */
int walk_speculatively(const struct walk *w, uint64_t linear);
/* A right that the fast check refused: the oracle's turn.  As walk_check. */
bool walk_check_slow(struct walk *w, struct tlb_entry *entry, uint64_t page, uint32_t type, uint32_t level);
/* A miss that met a ghost: a refill that a flush caused, perhaps an averted use.  The ghost is met no more. */
void walk_ghost(struct walk *w, const struct tlb_entry *ghost, uint64_t page, uint32_t type);

static inline bool right_holds(const struct walk *w, uint32_t right, uint32_t hfn)
{
	return (frame_tag(w->m->frames, hfn) | w->life_bits) == right;
}

/* The custody check of a cached translation.  True: it may be used (its right has been refreshed if need
 * be).  False: there is no right of that type in it (walk), or it was a violation, is reported and dropped. */
static inline bool walk_check(struct walk *w, struct tlb_entry *entry, uint64_t page, uint32_t type, uint32_t level)
{
	if (right_holds(w, entry->right[type], entry->hfn + (uint32_t)(page - entry->page)))
		return true;
	return walk_check_slow(w, entry, page, type, level);
}

/* One 64-bit word of guest memory. */
static inline _Atomic uint64_t *guest_word(const struct machine *m, uint32_t hfn, uint32_t index)
{
	return frame_words(m->frames, hfn) + index;
}

#endif
