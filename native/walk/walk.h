/* Hardware page walks: EPT walks, and two-dimensional walks for linear addresses (SDM vol. 3C, 29.3.2).
 *
 * Every table entry read or written, in either dimension, is an access that the oracle judges.
 */
#ifndef FLUSHLAB_WALK_H
#define FLUSHLAB_WALK_H

#include "core/machine_types.h"
#include "memory/frame.h"
#include "tlb/tlb.h"

struct guest;
struct vcpu_exit;
struct vm;
struct vmcs;

/* The walks of one pCPU for one vCPU. */
struct walk {
	struct machine *m;
	struct cpu *cpu;
	struct tlb *tlb;
	struct vcpu *vcpu;
	const struct vm *vm; /* the vCPU's */
	struct guest *guest;
	const struct vmcs *vmcs; /* current VMCS of the pCPU */
	uint32_t life_bits;    /* life of the root page, << 16 */
	uint64_t linear;       /* address under translation, for reports */
	struct vcpu_exit *exit;
	bool speculative;      /* not an access: nothing is reported, faults have no effects (adversary.c) */
	bool supervisor;       /* the access is the guest's OS's own (without EPT) */
};

enum walk_result {
	WALK_DONE,
	WALK_GUEST_FAULT,  /* #PF */
	WALK_EXIT,         /* VM exit: w->exit says why and where */
	WALK_SKIPPED,      /* the access hit MMIO that user space has emulated: it counts as done */
};

/* Translate a guest-physical page for an access of `type`, through the TLB or by an EPT walk. */
enum walk_result walk_physical(struct walk *w, uint64_t gfn, uint32_t type, struct tlb_entry *out);
/* Let the oracle judge a right that the fast check refused.  Returns as walk_check. */
bool walk_check_slow(struct walk *w, struct tlb_entry *entry, uint64_t page, uint32_t type, uint32_t level);
/* Account for a miss that met a ghost: a refill that a flush caused, and perhaps an averted use.  The ghost is
 * not reported again. */
void walk_ghost(struct walk *w, const struct tlb_entry *ghost, uint64_t page, uint32_t type);

static inline bool right_holds(const struct walk *w, uint32_t right, uint32_t hfn)
{
	return (frame_tag(w->m->frames, hfn) | w->life_bits) == right;
}

/* The custody check of a cached translation.  True: it may be used (its right has been refreshed if necessary).
 * False: the entry has no right of that type (walk), or the use was a violation, which is reported and the
 * entry dropped. */
static inline bool walk_check(struct walk *w, struct tlb_entry *entry, uint64_t page, uint32_t type, uint32_t level)
{
	if (right_holds(w, entry->right[type], entry->hfn + (uint32_t)(page - entry->page)))
		return true;
	return walk_check_slow(w, entry, page, type, level);
}

/* Return one 64-bit word of guest memory. */
static inline _Atomic uint64_t *guest_word(const struct machine *m, uint32_t hfn, uint32_t index)
{
	return frame_words(m->frames, hfn) + index;
}

#endif
