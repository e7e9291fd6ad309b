/* Tables that are no longer linked: handle_removed_pt(), divided into steps. */
#include "ept/tdp_remove.h"

#include <assert.h>

#include "core/counters.h"
#include "core/cpu_types.h"
#include "core/events.h"
#include "core/machine_types.h"
#include "ept/ept.h"
#include "ept/spte.h"
#include "ept/tdp_mmu.h"
#include "memory/frame.h"
#include "oracle/ledger.h"
#include "sync/cpu.h"
#include "sync/ipi.h"

static _Atomic uint64_t *entry(const struct machine *m, const struct tdp_removal *r)
{
	return &ept_table(m, r->table[r->level])[r->index[r->level]];
}

/* Exchange a child's entry, so that nothing can be installed in its place any more; false: another CPU has
 * frozen it.
 *
 * The link above is gone already, but CPUs set A and D through their cached mappings until the flush, and
 * threads that hold mmu_lock for read may be in the page: only an exchange returns the last value.  An entry
 * that another CPU has frozen must be waited for, because that CPU will still write to it.
 */
static bool freeze(const struct tdp_removal *r, _Atomic uint64_t *sptep, uint64_t *old)
{
	uint64_t new_spte = r->freeze ? FROZEN_SPTE : 0;

	if (!r->shared) {
		*old = atomic_load_explicit(sptep, memory_order_acquire);
		if (is_shadow_present_pte(*old))
			*old = kvm_tdp_mmu_write_spte(sptep, *old, new_spte, r->level);
		return true;
	}
	/* Without freezing, another CPU's FROZEN would be overwritten. */
	if (!r->freeze && is_frozen_spte(atomic_load_explicit(sptep, memory_order_relaxed)))
		return false;
	/* acq_rel: we see the last writer's stores before we take its subtree apart, and later CPUs see that it
	 * is gone. */
	*old = atomic_exchange_explicit(sptep, new_spte, memory_order_acq_rel);
	return !is_frozen_spte(*old);
}

static void descend(const struct machine *m, struct tdp_removal *r, uint32_t table)
{
	uint32_t level = --r->level;

	frame_set_unlinked(m->frames, table, true);
	r->table[level] = table;
	r->index[level] = 0;
}

/* All entries of a page are done: the page is the caller's now, and the walk is back in its parent. */
static void page_done(struct tdp_removal *r)
{
	r->page = r->table[r->level];
	r->page_level = r->level;
	r->level = r->level == r->top ? 0 : r->level + 1;
}

/* Remove one entry; false: another CPU has frozen it. */
static bool remove_child(struct machine *m, uint32_t cpu, uint32_t vm, struct ledger_cursor *ledger,
			 struct tdp_removal *r, bool *nothing)
{
	uint64_t gfn = r->gfn, pages = kvm_pages_per_hpage(r->level), old;
	uint32_t level = r->level;

	assert(tdp_index(gfn, level) == r->index[level]);
	if (!freeze(r, entry(m, r), &old))
		return false;
	r->index[level]++;
	*nothing = !is_shadow_present_pte(old);
	if (is_nonleaf_spte(old, level)) {
		ledger_release(ledger);
		if (r->recurse && spte_child_holds(m, cpu, vm, old, level, gfn)) {
			descend(m, r, spte_hfn(old));
			return true;
		}
	} else if (!*nothing) {
		if (r->set_pfn)
			spte_set_pfn(m, cpu, vm, gfn, old, level);
		spte_ungrant_at(ledger, m->frames, gfn, old, level, true, old & SPTE_WRITABLE);
		r->leafs += pages;
		r->old_spte |= old;
	}
	r->gfn += pages;
	return true;
}

int tdp_removal_begin(struct machine *m, uint32_t cpu, uint32_t vm, struct tdp_removal *removal, uint64_t spte,
		      uint32_t level, uint64_t gfn, int shared)
{
	if (!is_nonleaf_spte(spte, level) || level > 5)
		return cpu_misuse(m, cpu, "removal of what is no table (0x%llx)", (unsigned long long)spte);
	*removal = (struct tdp_removal){ .shared = shared != 0, .freeze = 1, .recurse = 1 };
	if (!spte_child_holds(m, cpu, vm, spte, level, gfn))
		return 0;
	removal->gfn = gfn & ~(kvm_pages_per_hpage(level) - 1);
	removal->top = level - 1;
	removal->level = level;
	descend(m, removal, spte_hfn(spte));
	return 0;
}

int tdp_removal_step(struct machine *m, uint32_t cpu, uint32_t vm, struct tdp_removal *removal, uint32_t max)
{
	struct ledger_cursor ledger = ledger_cursor(m, vm);
	uint64_t first = removal->gfn;
	uint32_t budget = max ? max : 1;
	bool nothing;
	int rc = 0;

	ipi_drain(m, cpu);
	removal->page = 0;
	removal->leafs = 0;
	removal->old_spte = 0;
	while (removal->level && !rc) {
		if (removal->index[removal->level] == FRAME_WORDS) {
			page_done(removal);
			break;
		}
		if (!budget)
			break;
		if (!remove_child(m, cpu, vm, &ledger, removal, &nothing))
			rc = MACHINE_AGAIN;
		else /* under the write lock, passing an empty entry is invisible to other CPUs */
			budget -= removal->single ? (nothing ? 0 : budget) : removal->shared || !nothing;
	}
	ledger_release(&ledger);
	count(m->cpus[cpu].counters, COUNT_SPTES_ZAPPED, removal->leafs);
	if (removal->leafs)
		event_record_more(m, cpu, event_of(vm, EVENT_ZAP), first, removal->leafs,
				  removal->gfn - first);
	return rc;
}
