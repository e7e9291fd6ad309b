#include "ept/tdp_mmu.h"

#include "core/machine_types.h"
#include "ept/spte.h"
#include "memory/frame.h"
#include "sync/cpu.h"

int tdp_check_index(struct machine *m, uint32_t cpu, uint32_t index, uint32_t level, uint64_t gfn)
{
	if (index == tdp_index(gfn, level))
		return 0;
	return cpu_misuse(m, cpu, "set SPTE: the gfn does not belong to this index (0x%llx)",
			  (unsigned long long)gfn);
}

/* Return the place of an SPTE; the step checks the rest of it. */
static int place_of(struct machine *m, uint32_t cpu, uint32_t table, uint32_t index, uint32_t level, uint64_t gfn,
		    struct spte_place *at)
{
	*at = (struct spte_place){ table, index, level, gfn };
	if (level < PG_LEVEL_4K || level > 5)
		return 0;
	at->gfn &= ~(kvm_pages_per_hpage(level) - 1);
	return tdp_check_index(m, cpu, index, level, gfn);
}

int tdp_mmu_set_spte_atomic(struct machine *m, uint32_t cpu, uint32_t vm, uint32_t table, uint32_t index,
			    uint32_t level, uint64_t gfn, uint64_t old_spte, uint64_t new_spte)
{
	struct spte_place at;
	int error = place_of(m, cpu, table, index, level, gfn, &at);

	return error ? error : spte_set_atomic(m, cpu, vm, &at, old_spte, new_spte);
}

uint64_t tdp_mmu_set_spte(struct machine *m, uint32_t cpu, uint32_t vm, uint32_t table, uint32_t index,
			  uint32_t level, uint64_t gfn, uint64_t new_spte)
{
	struct spte_place at;

	if (place_of(m, cpu, table, index, level, gfn, &at))
		return UINT64_MAX;
	return spte_set(m, cpu, vm, &at, new_spte);
}
