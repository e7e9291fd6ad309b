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

const struct guest_page *guest_page_place(const struct guest *g, uint64_t page)
{
	const struct guest_process *p = &g->process[g->current];
	uint32_t mask, at;

	if (!p->place || page >= GUEST_KERNEL_BASE)
		return guest_page_find(g, g->current, page);
	mask = (1u << p->place_bits) - 1;
	for (at = guest_place_of(p, page); p->place[at]; at = (at + 1) & mask)
		if (p->pages[p->place[at] - 1] == page)
			return &p->page[p->place[at] - 1];
	return NULL;
}

static uint32_t process_of(const struct guest *g, uint32_t pcid)
{
	return g->config.pcid && pcid && pcid <= g->processes ? pcid - 1 : g->current;
}

bool guest_invalidated(const struct vcpu *vcpu, const struct tlb_entry *entry, uint64_t page, uint32_t type, bool by_l1)
{
	const struct guest *g = vcpu->guest;
	const struct guest_page *gp;

	if (entry->kind == KIND_LINEAR)
		return !by_l1 && guest_contradicts(vcpu, entry, page, type) == GUEST_CONTRADICTS;
	if (entry->kind != KIND_COMBINED || entry->vcpu != vcpu->id || !g || !g->processes)
		return false;
	/* Another guest's mapping is judged by its filler (VIOLATION_CROSS_GUEST); this guest's records say nothing. */
	gp = entry->nested == g->vmx.nested ? guest_page_find(g, process_of(g, entry->pcid), page) : NULL;
	if (!gp)
		return false;
	if (gp->changed > entry->clock && gp->gfn != entry->gfn + (page - entry->page) && gp->l1_changed == by_l1)
		return true;
	return type == ACCESS_WRITE && gp->protected_ > entry->clock && !gp->writable && gp->l1_protected == by_l1;
}

static enum guest_agreement agreement(bool agrees)
{
	return agrees ? GUEST_AGREES : GUEST_CONTRADICTS;
}

/* Return whether the guest's tables said so before a change that it has not invalidated yet.  All processes share the
 * kernel's tables. */
static bool agreed_before(const struct guest *g, uint64_t page, uint64_t gfn)
{
	for (uint32_t i = 0; i < g->changes; i++)
		if (g->change[i].page == page && g->change[i].gfn == gfn &&
		    (g->change[i].process == g->current || page >= GUEST_KERNEL_BASE))
			return true;
	return false;
}

/* Times do not matter here, unlike with EPT, where each fill reads the guest's tables: KVM may derive a translation from
 * what the tables said long ago. */
enum guest_agreement guest_contradicts(const struct vcpu *vcpu, const struct tlb_entry *entry, uint64_t page,
				       uint32_t type)
{
	uint64_t gfn = entry->gfn + (page - entry->page);
	const struct guest *g = vcpu->guest;
	const struct guest_page *gp;

	/* A global translation may be another address space's. */
	if (!g || entry->global)
		return GUEST_AGREES;
	if (!g->config.paging)
		return agreement(gfn == page);
	if (page >= GUEST_DIRECT_BASE)
		return agreement(gfn == page - GUEST_DIRECT_BASE);
	gp = guest_page_place(g, page);
	if (!gp || (gp->gfn == gfn && (type != ACCESS_WRITE || gp->writable)))
		return GUEST_AGREES;
	return agreed_before(g, page, gfn) ? GUEST_AGREED : GUEST_CONTRADICTS;
}
