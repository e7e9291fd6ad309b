#include "ept/kernel_spte.h"

#include "core/machine_types.h"
#include "ept/ept.h"
#include "ept/spte.h"
#include "memory/custody.h"
#include "memory/frame.h"

/* Do a step other than KERNEL_STORE: repeat compare-and-swap until no other thread changes the SPTE in between. */
static int locked_step(struct machine *m, uint32_t cpu, uint32_t vm, const struct spte_place *at, uint32_t step,
		       uint64_t *old, uint64_t value)
{
	for (;;) {
		uint64_t was = spte_read(m, at->table, at->index);
		int error;

		if (step == KERNEL_CMPXCHG && was != *old) {
			*old = was;
			return MACHINE_AGAIN;
		}
		error = spte_replace(m, cpu, vm, at, was, step == KERNEL_FETCH_AND ? was & value : value);
		if (error == MACHINE_AGAIN)
			continue;
		*old = was;
		return error;
	}
}

int kernel_spte_change(struct machine *m, uint32_t cpu, uint32_t vm, uint32_t table, uint32_t index, uint32_t level,
		       uint64_t gfn, uint32_t step, uint64_t *old, uint64_t value)
{
	struct spte_place at = { table, index, level, gfn };

	if (step == KERNEL_STORE)
		return spte_store(m, cpu, vm, &at, old, value);
	return locked_step(m, cpu, vm, &at, step, old, value);
}

void kernel_split_custody(struct machine *m, uint32_t table, uint64_t huge_spte, uint32_t level)
{
	const uint64_t mask = (uint64_t)FRAME_TAG_MASK << SPTE_CUSTODY_SHIFT;

	if (level - 1 != PG_LEVEL_4K)
		return;
	/* Relaxed: the page is invisible until it is linked, with release. */
	for (uint32_t i = 0; i < FRAME_WORDS; i++) {
		_Atomic uint64_t *sptep = &ept_table(m, table)[i];
		uint64_t spte = atomic_load_explicit(sptep, memory_order_relaxed), custody;

		if (!is_last_spte(spte, PG_LEVEL_4K) || spte_hfn(spte) >= m->frames->count)
			continue;
		custody = frame_custody_of_one(m->frames, spte_hfn(spte), spte_leaf_custody(huge_spte, level));
		atomic_store_explicit(sptep, (spte & ~mask) | custody << SPTE_CUSTODY_SHIFT, memory_order_relaxed);
	}
}

void kernel_set_pfn(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t gfn, uint64_t spte, uint32_t level)
{
	spte_set_pfn(m, cpu, vm, gfn, spte, level);
}

uint64_t kernel_frames(struct machine *m)
{
	return (uint64_t)(uintptr_t)frame_memory(m->frames, 0);
}
