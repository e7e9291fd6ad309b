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
			       (struct guest_page *)&g->leader->kernel[page - GUEST_KERNEL_BASE] : NULL;
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
	struct guest_mapping now;
	uint64_t gfn;

	if (entry->kind == KIND_LINEAR)
		return !by_l1 && guest_contradicts(vcpu, entry, page, type) == GUEST_CONTRADICTS;
	if (entry->kind != KIND_COMBINED || entry->vcpu != vcpu->id || !g || !g->processes)
		return false;
	/* Another guest's mapping is judged by its filler (VIOLATION_CROSS_GUEST); this guest's records say nothing. */
	gp = entry->nested == g->vmx.nested ? guest_page_find(g, process_of(g, entry->pcid), page) : NULL;
	if (!gp)
		return false;
	now = guest_mapping_of(gp);
	gfn = entry->gfn + (page - entry->page) + (uint64_t)entry->ept12_delta;
	if (gp->changed > entry->clock && now.gfn != gfn && gp->l1_changed == by_l1)
		return true;
	return type == ACCESS_WRITE && gp->protected_ > entry->clock && !now.writable && gp->l1_protected == by_l1;
}

static enum guest_agreement agreement(bool agrees)
{
	return agrees ? GUEST_AGREES : GUEST_CONTRADICTS;
}

/* Return whether the change took away the translation of `page` to `gfn` from the current process.  All processes share
 * the kernel's tables. */
static bool took_away(const struct guest *g, const struct guest_change *change, uint64_t page, uint64_t gfn)
{
	uint64_t below = change->huge ? page & 511 : 0;

	return !change->table && change->page == page - below && change->gfn == gfn - below &&
	       (change->process == g->current || page >= GUEST_KERNEL_BASE);
}

/* Look into the batch of the OS.  Acquire: pairs with the releases in guest_batch.c.  A vCPU that has invalidated all of
 * the batch does not read it, because others may refill it. */
static bool agreed_before_batch(const struct guest *g, uint64_t page, uint64_t gfn)
{
	const struct guest_batch *b = &g->leader->batch;
	uint32_t number = atomic_load_explicit(&b->number, memory_order_acquire), n;

	if (!number || number == g->settled)
		return false;
	n = atomic_load_explicit(&b->changes, memory_order_acquire);
	for (uint32_t i = 0; i < n; i++)
		if (took_away(g, &b->change[i], page, gfn) &&
		    !(g->covered_batch == number && g->covered >> i & 1))
			return true;
	return false;
}

/* Return whether the guest's tables said so before a change that it has not invalidated yet. */
static bool agreed_before(const struct guest *g, uint64_t page, uint64_t gfn)
{
	for (uint32_t i = 0; i < g->changes; i++)
		if (took_away(g, &g->change[i], page, gfn))
			return true;
	return agreed_before_batch(g, page, gfn);
}

/* Times do not matter here, unlike with EPT, where each fill reads the guest's tables: KVM may derive a translation from
 * what the tables said long ago. */
enum guest_agreement guest_contradicts(const struct vcpu *vcpu, const struct tlb_entry *entry, uint64_t page,
				       uint32_t type)
{
	uint64_t gfn = entry->gfn + (page - entry->page);
	const struct guest *g = vcpu->guest;
	const struct guest_page *gp;
	struct guest_mapping now;

	/* A global translation may be another address space's. */
	if (!g || entry->global)
		return GUEST_AGREES;
	if (!g->config.paging)
		return agreement(gfn == page);
	if (page >= GUEST_DIRECT_BASE)
		return agreement(gfn == page - GUEST_DIRECT_BASE);
	gp = guest_page_place(g, page);
	if (!gp)
		return GUEST_AGREES;
	now = guest_mapping_of(gp);
	/* With CR0.WP clear the kernel may write whatever the tables say; user mode may not. */
	if (now.gfn == gfn && (type != ACCESS_WRITE || now.writable || (entry->supervisor && g->wp_clear)))
		return GUEST_AGREES;
	return agreed_before(g, page, gfn) ? GUEST_AGREED : GUEST_CONTRADICTS;
}
