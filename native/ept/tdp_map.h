/* Many SPTEs of one table at once: splitting a huge page, and mapping around a fault. */
#ifndef FLUSHLAB_TDP_MAP_H
#define FLUSHLAB_TDP_MAP_H

#include "core/machine_types.h"

/* api */
/* make_small_spte(), 512 times: fill a table that is not linked yet with 512 leafs that map the block of
 * huge_spte.  0 or MACHINE_MISUSE.  Linking it with tdp_mmu_set_spte_atomic changes no right. */
/* call: step sptes; reads custody; writes table(table) */
int tdp_mmu_fill_split_table(struct machine *m, uint32_t cpu, uint32_t table, uint64_t huge_spte, uint32_t level);
/* Install 4K leafs for n gfns from `gfn` on in one table, from `index` on, where the SPTE is not present
 * (fault-around): hfns, host tags and writable flags from the arrays, hfn 0xffffffff: skip.  Returns the number
 * installed, or MACHINE_MISUSE if the gfn belongs to another index. */
/* call: step sptes; reads table(table), custody; writes ept */
int tdp_mmu_map_around(struct machine *m, uint32_t cpu, uint32_t vm, uint32_t table, uint32_t index, uint64_t gfn,
		       uint32_t n, const uint32_t *hfns, const uint32_t *tags, const uint32_t *writable);
/* end api */

#endif
