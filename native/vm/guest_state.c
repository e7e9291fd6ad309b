#include "vm/guest_state.h"

#include "core/cpu_types.h"
#include "core/machine_types.h"
#include "tlb/tlb.h"
#include "vm/vm.h"

struct guest_page *guest_page_find(const struct guest *g, uint32_t process, uint64_t page)
{
	const struct guest_process *p = &g->process[process];
	uint64_t low = 0, high = p->page_count;

	if (page >= GUEST_KERNEL_BASE)
		return page - GUEST_KERNEL_BASE < GUEST_KERNEL_PAGES ?
			       (struct guest_page *)&g->kernel[page - GUEST_KERNEL_BASE] : NULL;
	while (low < high) {
		uint64_t middle = (low + high) / 2;

		if (p->pages[middle] < page)
			low = middle + 1;
		else
			high = middle;
	}
	return low < p->page_count && p->pages[low] == page ? &p->page[low] : NULL;
}

static uint32_t process_of(const struct guest *g, uint32_t pcid)
{
	return g->config.pcid && pcid && pcid <= g->processes ? pcid - 1 : g->current;
}

bool guest_invalidated(const struct vcpu *vcpu, const struct tlb_entry *entry, uint64_t page, uint32_t type)
{
	const struct guest *g = vcpu->guest;
	const struct guest_page *gp;

	if (entry->kind != KIND_COMBINED || entry->vcpu != vcpu->id || !g || !g->processes)
		return false;
	gp = guest_page_find(g, process_of(g, entry->pcid), page);
	if (!gp)
		return false;
	if (gp->changed > entry->clock && gp->gfn != entry->gfn + (page - entry->page))
		return true;
	return type == ACCESS_WRITE && gp->protected_ > entry->clock && !gp->writable;
}
