#include "ept/ept.h"

#include "core/cpu_types.h"
#include "core/events.h"
#include "core/machine_types.h"
#include "ept/spte.h"
#include "ept/tdp_mmu.h"
#include "memory/frame.h"
#include "sync/rcu_callback.h"

int64_t ept_table_alloc(struct machine *m, uint32_t cpu, uint32_t kind)
{
	if (kind > FRAME_TABLE)
		return MACHINE_MISUSE;
	return frame_alloc(m, cpu, kind);
}

void ept_table_free(struct machine *m, uint32_t cpu, uint32_t table)
{
	/* Recorded before it can be the next root, or that root's event would come first. */
	if (frame_kind_of(m->frames, table) == FRAME_ROOT)
		event_record(m, cpu, EVENT_ROOT_FREE, table, 0);
	frame_free(m, cpu, table);
}

int ept_table_free_rcu(struct machine *m, uint32_t cpu, uint32_t table)
{
	return call_rcu(m, cpu, RCU_FREE_FRAME, table);
}

static void tdp_mmu_free_sp_rcu_callback(struct machine *m, struct cpu *cpu, uint64_t table)
{
	ept_table_free(m, cpu->id, (uint32_t)table);
}

uint64_t spte_read(struct machine *m, uint32_t table, uint32_t index)
{
	/* Acquire: pairs with the release store that published the SPTE. */
	return atomic_load_explicit(&ept_table(m, table)[index & 511], memory_order_acquire);
}

uint32_t ept_tables_below(struct machine *m, uint32_t table, uint32_t level)
{
	uint32_t found = 0;

	for (uint32_t index = 0; index < FRAME_WORDS; index++) {
		uint64_t spte = spte_read(m, table, index);

		if (is_nonleaf_spte(spte, level) && ept_is_table(m, spte_hfn(spte)))
			found += 1 + ept_tables_below(m, spte_hfn(spte), level - 1);
	}
	return found;
}

int tdp_mmu_get_walk(struct machine *m, uint32_t root, uint32_t root_level, uint64_t gfn, uint64_t *sptes,
		     uint32_t *tables)
{
	uint32_t level = root_level, table = root;

	for (;; level--) {
		uint64_t spte = spte_read(m, table, tdp_index(gfn, level));

		tables[level] = table;
		sptes[level] = spte;
		if (!is_nonleaf_spte(spte, level) || !ept_is_table(m, spte_hfn(spte)))
			return (int)level;
		table = spte_hfn(spte);
	}
}

void ept_register(void)
{
	rcu_register(RCU_FREE_FRAME, tdp_mmu_free_sp_rcu_callback);
}
