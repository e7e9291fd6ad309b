/* The adversary of the architecture: a processor may fetch any translation that the tables permit, and forget any, at
 * any time (SDM vol. 3A, 4.10.2.3).  Neither is a use. */
#include "walk/adversary.h"

#include "core/counters.h"
#include "core/cpu_types.h"
#include "core/machine_types.h"
#include "tlb/tlb.h"
#include "tlb/tlb_account.h"
#include "tlb/tlb_l1.h"
#include "tlb/tlb_store.h"
#include "tlb/tlb_types.h"
#include "vm/guest_state.h"
#include "walk/vmcs.h"
#include "walk/walk.h"
#include "walk/walk_linear.h"
#include "walk/walk_shadow.h"

int walk_speculatively(const struct walk *w, uint64_t linear)
{
	struct walk s = *w;
	uint64_t page = linear >> 12 & GUEST_PAGE_MASK;
	bool paging = s.guest->config.paging;
	struct tlb_entry e;
	enum walk_result r;

	s.speculative = true;
	s.linear = linear;
	if (s.vmcs->ept && paging && s.guest->cr3_gfn == GUEST_NO_GFN)
		return 0;
	if (tlb_lookup(s.tlb, s.tlb->kind, page, &e) == 1)
		return 0;
	if (!s.vmcs->ept)
		r = walk_shadow(&s, page, ACCESS_READ, &e);
	else
		r = paging ? walk_linear(&s, page, ACCESS_READ, &e) : walk_physical(&s, page, ACCESS_READ, &e);
	if (r != WALK_DONE)
		return 0;
	count(s.cpu->counters, COUNT_SPECULATIVE, 1);
	return 1;
}

/* Return the cell of the n-th live mapping of a store, in the order of the dumps; NO_CELL: there are fewer. */
static uint32_t nth_live(const struct store *s, uint32_t *n)
{
	for (uint32_t cell = 0; cell < s->cell_count; cell++)
		if (cell_live(s, cell) && !(*n)--)
			return cell;
	return NO_CELL;
}

int tlb_evict(struct tlb *t, uint32_t n)
{
	uint32_t cell = nth_live(&t->l2, &n);

	if (cell == NO_CELL)
		return 0;
	cell_kill(t, cell);
	/* No ghost: no flush dropped it. */
	slot_of(t, cell)->born = 0;
	/* Finding the copies of this mapping is not worthwhile: dropped copies come back at their next use. */
	l1_clear(&t->l1);
	return 1;
}

int psc_evict(struct tlb *t, uint32_t n)
{
	for (uint32_t level = 0; level < PSC_LEVELS; level++) {
		uint32_t cell = nth_live(&t->psc[level], &n);

		if (cell == NO_CELL)
			continue;
		cell_mark_dead(&t->psc[level], cell);
		return 1;
	}
	return 0;
}

struct tlb *cpu_tlb(struct machine *m, uint32_t cpu)
{
	return m->cpus[cpu].tlb;
}
