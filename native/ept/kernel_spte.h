/* Changes of SPTEs by a kernel's own code, which is compiled from a source tree and holds pointers to the SPTEs.
 *
 * Each step is one instruction of that code on an SPTE, and updates the ledger as the functions of spte.h do.  A plain
 * store stays a plain store: if the code should have used a locked instruction, a CPU's change of the SPTE in between
 * (an accessed or dirty flag) is lost here as it would be in the kernel.
 */
#ifndef FLUSHLAB_KERNEL_SPTE_H
#define FLUSHLAB_KERNEL_SPTE_H

#include "core/machine_types.h"

/* api */
enum kernel_spte_step {
	KERNEL_CMPXCHG,   /* from *old to value; MACHINE_AGAIN, with the SPTE in *old, if the SPTE differs from *old */
	KERNEL_XCHG,      /* to value */
	KERNEL_STORE,     /* to value, with a plain store */
	KERNEL_FETCH_AND, /* and value */
};
/* Change an SPTE, and store the former one in *old.  Return 0, MACHINE_AGAIN, or, with a message, MACHINE_MISUSE if
 * the new SPTE can only be a bug. */
/* call: anything */
int kernel_spte_change(struct machine *m, uint32_t cpu, uint32_t vm, uint32_t table, uint32_t index, uint32_t level,
		       uint64_t gfn, uint32_t step, uint64_t *old, uint64_t value);
/* Finish a table that splits a huge leaf, before it is linked: the kernel has filled it with the huge leaf's custody;
 * give each of its SPTEs the custody of its own frame. */
/* call: anything */
void kernel_split_custody(struct machine *m, uint32_t table, uint64_t huge_spte, uint32_t level);
/* Do kvm_set_pfn_dirty() or kvm_set_pfn_accessed() for a leaf that was zapped (spte_set_pfn()). */
/* call: anything */
void kernel_set_pfn(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t gfn, uint64_t spte, uint32_t level);
/* Return the address of frame 0; the others follow it. */
/* call: anything */
uint64_t kernel_frames(struct machine *m);
/* end api */

#endif
