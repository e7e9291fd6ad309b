/* SPTEs changed by a kernel's own code, compiled from a source tree, which holds pointers to them.
 *
 * Each step is one instruction of that code on an SPTE, and keeps the ledger as the steps of spte.h do.  A plain
 * store stays a plain store: if the code should have used a locked instruction, what a CPU changed meanwhile is lost
 * here, too.
 */
#ifndef FLUSHLAB_KERNEL_SPTE_H
#define FLUSHLAB_KERNEL_SPTE_H

#include "core/machine_types.h"

/* api */
enum kernel_spte_step {
	KERNEL_CMPXCHG,   /* from *old to value; MACHINE_AGAIN, with the SPTE in *old, if it is another */
	KERNEL_XCHG,      /* to value */
	KERNEL_STORE,     /* to value, with a plain store */
	KERNEL_FETCH_AND, /* and value */
};
/* Change an SPTE, and return the one that was replaced in *old.  0, MACHINE_AGAIN, or MACHINE_MISUSE with a message,
 * if the new SPTE could not be meant by any kernel. */
/* call: anything */
int kernel_spte_change(struct machine *m, uint32_t cpu, uint32_t vm, uint32_t table, uint32_t index, uint32_t level,
		       uint64_t gfn, uint32_t step, uint64_t *old, uint64_t value);
/* A huge leaf is being split: give the custody of one frame to each SPTE of a table that was filled with copies of the
 * huge leaf's and is not linked yet. */
/* call: anything */
void kernel_split_custody(struct machine *m, uint32_t table, uint64_t huge_spte, uint32_t level);
/* kvm_set_pfn_dirty() or kvm_set_pfn_accessed() for a leaf that was zapped (spte_set_pfn()). */
/* call: anything */
void kernel_set_pfn(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t gfn, uint64_t spte, uint32_t level);
/* Return the address of frame 0; the others follow it. */
/* call: anything */
uint64_t kernel_frames(struct machine *m);
/* end api */

#endif
