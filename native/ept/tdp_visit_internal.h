/* The visit of one SPTE by a walk over a range.
 *
 * Inlined into tdp_walk.c, which compiles its loop once for each kind of walk.
 */
#ifndef FLUSHLAB_TDP_VISIT_INTERNAL_H
#define FLUSHLAB_TDP_VISIT_INTERNAL_H

#include "core/machine_types.h"
#include "ept/ept.h"
#include "ept/spte.h"
#include "ept/tdp_mmu.h"
#include "ept/tdp_walk.h"
#include "memory/frame.h"
#include "oracle/ledger.h"

struct tdp_iter {
	struct machine *m;
	struct frames *frames;
	struct ledger_cursor ledger; /* held within one table page at most */
	struct tdp_chunk *c;
	uint32_t cpu;
	uint32_t vm;
	uint32_t min_level;
	uint32_t level;          /* level of the entries of `table` */
	uint32_t table;
	uint64_t link;           /* the SPTE that led here; 0: the root */
	uint64_t gfn;
	uint64_t start;          /* next_gfn at entry */
	uint64_t end;
	uint64_t budget;
	uint64_t most_changed;
	uint64_t first_changed;
};

enum step {
	STEP_NEXT,    /* this SPTE is done */
	STEP_RETRY,   /* it changed: read it again */
	STEP_DESCEND, /* it leads to a table: continue there */
	STEP_FROZEN,  /* another CPU has frozen it, or the page that it is in */
	STEP_TABLE,   /* the table page is done */
	STEP_STOP,    /* the call ends: found, out of budget, or at the end */
};

static inline void changed(struct tdp_iter *it, uint64_t gfn, uint64_t pages, uint64_t old_spte)
{
	if (!it->c->changed++)
		it->first_changed = gfn;
	it->c->pages += pages;
	it->c->old_spte |= old_spte;
}

/* Replace a present SPTE; *spte is the value actually replaced.  False: it changed during a shared walk. */
static inline bool replace(struct tdp_iter *it, _Atomic uint64_t *sptep, uint64_t *spte, uint64_t new_spte)
{
	if (!it->c->shared) {
		*spte = kvm_tdp_mmu_write_spte(sptep, *spte, new_spte, it->level);
		return true;
	}
	/* Orders as in kvm_tdp_mmu_write_spte(). */
	return atomic_compare_exchange_strong_explicit(sptep, spte, new_spte, memory_order_acq_rel,
						       memory_order_relaxed);
}

static inline __attribute__((always_inline)) enum step zap_leaf(struct tdp_iter *it, _Atomic uint64_t *sptep,
								 uint64_t gfn, uint64_t spte, uint64_t pages)
{
	if (!replace(it, sptep, &spte, 0))
		return STEP_RETRY;
	if (it->c->set_pfn)
		spte_set_pfn(it->m, it->cpu, it->vm, gfn, spte, it->level);
	if (pages == 1)
		ledger_ungrant_one(&it->ledger, it->frames, gfn, spte_hfn(spte), true, spte & SPTE_WRITABLE);
	else
		spte_ungrant_at(&it->ledger, it->frames, gfn, spte, it->level, true, spte & SPTE_WRITABLE);
	changed(it, gfn, pages, spte);
	return STEP_NEXT;
}

static inline enum step found(struct tdp_iter *it, uint64_t gfn, uint64_t spte)
{
	it->c->found_table = it->table;
	it->c->found_index = tdp_index(gfn, it->level);
	it->c->found_level = it->level;
	it->c->found_gfn = gfn;
	it->c->found_spte = spte;
	return STEP_STOP;
}

/* Clear an SPTE; if it led to a table, the caller removes that. */
static inline enum step zap_spte(struct tdp_iter *it, _Atomic uint64_t *sptep, uint64_t gfn, uint64_t spte,
			  uint64_t pages)
{
	if (spte_leaf(spte, it->level))
		return zap_leaf(it, sptep, gfn, spte, pages);
	ledger_release(&it->ledger);
	if (!replace(it, sptep, &spte, it->c->freeze ? FROZEN_SPTE : 0))
		return STEP_RETRY;
	changed(it, gfn, 0, spte);
	return found(it, gfn, spte);
}

/* A locked update, even under mmu_lock for write: hardware sets A and D at any time, and a fast page fault sets
 * W. */
static inline enum step clear_writable(struct tdp_iter *it, _Atomic uint64_t *sptep, uint64_t gfn, uint64_t spte,
			  uint64_t pages)
{
	if (!(spte & SPTE_WRITABLE)) {
		it->c->already++;
		return STEP_NEXT;
	}
	if (!atomic_compare_exchange_strong_explicit(sptep, &spte, spte & ~(uint64_t)SPTE_WRITABLE,
						     memory_order_acq_rel, memory_order_relaxed))
		return STEP_RETRY;
	spte_ungrant_at(&it->ledger, it->frames, gfn, spte, it->level, false, true);
	changed(it, gfn, pages, spte);
	return STEP_NEXT;
}

/* Clear A, or mark the SPTE access-tracked.  The ledger keeps the right to read, because ageing promises
 * nothing.  Not a blind AND: it would corrupt FROZEN.  A shared walk does not read an SPTE again that changed
 * meanwhile, as kvm_tdp_mmu_age_spte(): it is being zapped, or is still in use, and the walk has seen it young.
 * Under mmu_lock for write only hardware and fast page faults compete, and A is cleared for certain, as
 * tdp_mmu_clear_spte_bits() does. */
static inline enum step age(struct tdp_iter *it, _Atomic uint64_t *sptep, uint64_t gfn, uint64_t spte, uint64_t pages,
		     uint64_t new_spte)
{
	if (new_spte == spte)
		return STEP_NEXT;
	if (!atomic_compare_exchange_strong_explicit(sptep, &spte, new_spte, memory_order_acq_rel,
						     memory_order_relaxed)) {
		it->c->young += it->c->shared;
		return it->c->shared ? STEP_NEXT : STEP_RETRY;
	}
	it->c->young++;
	if (spte & ~new_spte & SPTE_WRITABLE)
		spte_ungrant_at(&it->ledger, it->frames, gfn, spte, it->level, false, true);
	changed(it, gfn, pages, spte);
	return STEP_NEXT;
}

static inline bool wanted_dirty(const struct tdp_iter *it, uint64_t gfn)
{
	return it->level == PG_LEVEL_4K && it->c->mask >> (gfn - it->start) & 1;
}

static inline enum step visit(struct tdp_iter *it, _Atomic uint64_t *sptep, uint64_t gfn, uint64_t spte,
			      uint64_t pages, enum tdp_walk walk)
{
	bool leaf = spte_leaf(spte, it->level);

	switch (walk) {
	case TDP_ZAP_LEAFS:
		return leaf ? zap_leaf(it, sptep, gfn, spte, pages) : STEP_NEXT;
	case TDP_ZAP_LEVEL:
		return it->level == it->min_level ? zap_spte(it, sptep, gfn, spte, pages) : STEP_NEXT;
	case TDP_ZAP_RANGE:
		return zap_spte(it, sptep, gfn, spte, pages);
	case TDP_WRPROT:
		return leaf ? clear_writable(it, sptep, gfn, spte, pages) : STEP_NEXT;
	case TDP_CLEAR_DIRTY:
		return wanted_dirty(it, gfn) ? clear_writable(it, sptep, gfn, spte, pages) : STEP_NEXT;
	case TDP_AGE:
		return leaf ? age(it, sptep, gfn, spte, pages, spte & ~(uint64_t)SPTE_ACCESSED) : STEP_NEXT;
	case TDP_ACCESS_TRACK:
		return leaf ? age(it, sptep, gfn, spte, pages, mark_spte_for_access_track(spte)) : STEP_NEXT;
	case TDP_COUNT:
		it->c->changed++;
		it->c->pages += pages;
		it->c->already += !(spte & SPTE_WRITABLE);
		return STEP_NEXT;
	case TDP_FIND_HUGE:
		return leaf ? found(it, gfn, spte) : STEP_NEXT;
	case TDP_FIND_TABLE:
		return !leaf ? found(it, gfn, spte) : STEP_NEXT;
	}
	return STEP_NEXT;
}

#endif
