/* Single steps of the TDP MMU.  In its tables the place of an SPTE implies the gfn. */
#ifndef FLUSHLAB_TDP_MMU_H
#define FLUSHLAB_TDP_MMU_H

#include "core/machine_types.h"

/* api */
/* gfn: any that the SPTE covers.  MACHINE_MISUSE if the gfn belongs to another index. */

/* __tdp_mmu_set_spte_atomic(): cmpxchg under mmu_lock for read.  0, or MACHINE_AGAIN if the SPTE changed.
 * Keeps the ledger for leaf SPTEs; the caller takes care of removed tables (handle_removed_pt). */
/* call: step spte; reads ept, table(table), rights(new_spte, level); writes ept if result == 0; keeps-gil */
int tdp_mmu_set_spte_atomic(struct machine *m, uint32_t cpu, uint32_t vm, uint32_t table, uint32_t index,
			    uint32_t level, uint64_t gfn, uint64_t old_spte, uint64_t new_spte);
/* tdp_mmu_set_spte(): under mmu_lock for write; returns the SPTE actually replaced.  (All ones: invalid
 * arguments, named by machine_error_text() as for MACHINE_MISUSE of the other steps.) */
/* call: step spte; reads table(table), rights(new_spte, level); writes ept */
uint64_t tdp_mmu_set_spte(struct machine *m, uint32_t cpu, uint32_t vm, uint32_t table, uint32_t index,
			  uint32_t level, uint64_t gfn, uint64_t new_spte);
/* end api */

static inline uint32_t tdp_index(uint64_t gfn, uint32_t level)
{
	return (uint32_t)(gfn >> 9 * (level - 1)) & 511;
}

/* Return 0 if the gfn belongs to this index, or MACHINE_MISUSE with a message on `cpu`. */
int tdp_check_index(struct machine *m, uint32_t cpu, uint32_t index, uint32_t level, uint64_t gfn);

#endif
