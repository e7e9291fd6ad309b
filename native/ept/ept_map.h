/* A page fault's last step in C, for programs that have no KVM in Python: tests and benchmarks. */
#ifndef FLUSHLAB_EPT_MAP_H
#define FLUSHLAB_EPT_MAP_H

#include "core/machine_types.h"
#include "ept/ept.h"
#include "ept/spte.h"
#include "ept/tdp_mmu.h"
#include "memory/frame.h"
#include "memory/mm.h"

/* Map a page as a writable 4K leaf, tables included (kvm_tdp_mmu_map()).  MACHINE_AGAIN: another CPU changed an
 * SPTE on the path meanwhile.  Under rcu_read_lock if other CPUs are in the tree. */
static inline int ept_map_page(struct machine *m, uint32_t cpu, uint32_t vm, uint32_t root, uint64_t gfn,
			       const struct mm_page *page)
{
	uint64_t sptes[6];
	uint32_t tables[6];
	int level, r;

	while ((level = tdp_mmu_get_walk(m, root, 4, gfn, sptes, tables)) > PG_LEVEL_4K) {
		int64_t child = ept_table_alloc(m, cpu, FRAME_TABLE);

		if (child < 0)
			return (int)child;
		r = tdp_mmu_set_spte_atomic(m, cpu, vm, tables[level], gfn >> 9 * (level - 1) & 511, (uint32_t)level,
					    gfn, sptes[level], make_nonleaf_spte(m, (uint32_t)child));
		if (r) {
			ept_table_free(m, cpu, (uint32_t)child);
			return r;
		}
	}
	return tdp_mmu_set_spte_atomic(m, cpu, vm, tables[1], gfn & 511, PG_LEVEL_4K, gfn, sptes[1],
				       make_spte(page->hfn, page->tag, PG_LEVEL_4K, 1, 1));
}

#endif
