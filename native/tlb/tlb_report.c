/* Drops counted by flush, ghosts, and dumps for tests and reports. */
#include "tlb/tlb_report.h"

#include "core/machine_types.h"
#include "tlb/tlb.h"
#include "tlb/tlb_l1.h"
#include "tlb/tlb_store.h"
#include "tlb/tlb_types.h"

void tlb_flush_begin(struct tlb *t, uint64_t flush)
{
	t->flush = flush;
	t->dropped = 0;
	t->epoch++;
}

uint64_t tlb_ghost_flush(struct tlb *t)
{
	return t->ghost_flush;
}

void tlb_ghost_forget(struct tlb *t)
{
	if (t->ghost)
		t->ghost->born = 0;
	t->ghost = NULL;
}

uint64_t tlb_dropped(struct tlb *t, int64_t vm)
{
	if (vm < 0 || vm >= t->vms || t->dropped_epoch[vm] != t->epoch)
		return t->dropped;
	return t->dropped - t->dropped_by_vm[vm];
}

uint32_t tlb_dump(struct tlb *t, struct tlb_entry *entries, uint32_t max)
{
	uint32_t n = 0;

	for (uint32_t cell = 0; cell < t->l2.cell_count; cell++) {
		if (!cell_live(&t->l2, cell))
			continue;
		if (n < max)
			entries[n] = slot_of(t, cell)->entry;
		n++;
	}
	return n;
}

bool tlb_maps_as_memory(struct tlb *t, uint32_t hfn, uint32_t apic_page)
{
	for (uint32_t cell = 0; cell < t->l2.cell_count; cell++) {
		if (!cell_live(&t->l2, cell))
			continue;
		const struct tlb_entry *e = &slot_of(t, cell)->entry;

		if (hfn - e->hfn < 1u << (9 * e->size) && e->apic_page != apic_page)
			return true;
	}
	return false;
}

uint32_t tlb_contexts(struct tlb *t)
{
	return t->live_count;
}

int tlb_l1_probe(struct tlb *t, uint64_t page, uint32_t *hfn, uint32_t *right)
{
	const struct tlb_hot *hot = tlb_l1_lookup(&t->l1, page & PAGE_NUMBER_MASK);

	if (!hot)
		return 0;
	*hfn = hot->hfn;
	for (uint32_t type = 0; type < ACCESS_TYPES; type++)
		right[type] = hot->right[type] ^ t->l1.life;
	return 1;
}
