/* Chunks of like steps over a range: the loops of tdp_mmu.c, native.
 *
 * One table page is walked in a tight loop; whenever the walk must go to another table it starts from the root
 * again, four loads in 512 SPTEs.  A tree that changes between two calls, or during one, therefore needs no
 * special treatment: the path is always fresh.
 */
#include "ept/tdp_walk.h"

#include <assert.h>

#include "core/counters.h"
#include "core/cpu_types.h"
#include "core/events.h"
#include "core/machine_types.h"
#include "ept/ept.h"
#include "ept/spte.h"
#include "ept/tdp_mmu.h"
#include "ept/tdp_visit_internal.h"
#include "memory/frame.h"
#include "oracle/ledger.h"
#include "sync/ipi.h"

/* Return whether the walk must go into the table behind this SPTE. */
static inline bool descends(const struct tdp_iter *it, uint64_t gfn, uint64_t spte, uint64_t pages,
			    enum tdp_walk walk)
{
	if (spte_leaf(spte, it->level) || it->level <= it->min_level)
		return false;
	return walk != TDP_ZAP_RANGE || gfn < it->start || gfn + pages > it->end;
}

/* A walk that removes rights must not pass over a change that another thread has under way; other walks may, as
 * the kernel's do: a frozen SPTE is not present. */
static inline bool waits_for_frozen(const struct tdp_iter *it, enum tdp_walk walk)
{
	return it->c->shared && (walk == TDP_ZAP_LEAFS || walk == TDP_ZAP_LEVEL || walk == TDP_ZAP_RANGE ||
				 walk == TDP_WRPROT || walk == TDP_CLEAR_DIRTY);
}

/* Walk the rest of one table page.  Compiled once for each kind of walk; the loop's counts are in registers. */
static inline __attribute__((always_inline)) enum step walk_table(struct tdp_iter *it, enum tdp_walk walk)
{
	_Atomic uint64_t *table = ept_table(it->m, it->table);
	uint64_t pages = kvm_pages_per_hpage(it->level), budget = it->budget, gfn = it->gfn;
	uint64_t in_table = FRAME_WORDS - tdp_index(gfn, it->level);
	uint64_t to_end = (it->end - gfn - 1 + (gfn & (pages - 1))) / pages + 1;
	enum step end = in_table <= to_end && in_table <= budget ? STEP_TABLE : STEP_STOP;
	_Atomic uint64_t *sptep = &table[FRAME_WORDS - in_table], *stop;

	stop = sptep + (in_table < to_end ? in_table : to_end);
	if (stop > sptep + budget)
		stop = sptep + budget;
	while (sptep < stop) {
		/* Acquire: pairs with the release store that published it; the table behind it is complete. */
		uint64_t spte = atomic_load_explicit(sptep, memory_order_acquire);
		enum step step = STEP_NEXT;

		assert(tdp_index(gfn, it->level) == sptep - table);
		if (is_shadow_present_pte(spte)) {
			if (descends(it, gfn & ~(pages - 1), spte, pages, walk)) {
				it->link = spte;
				end = STEP_DESCEND;
				break;
			}
			step = visit(it, sptep, gfn & ~(pages - 1), spte, pages, walk);
			if (step == STEP_RETRY)
				continue;
			if (it->c->changed >= it->most_changed)
				step = STEP_STOP;
		} else if (is_frozen_spte(spte) && waits_for_frozen(it, walk)) {
			end = STEP_FROZEN;
			break;
		}
		gfn = (gfn & ~(pages - 1)) + pages;
		budget--;
		sptep++;
		if (step == STEP_STOP) {
			end = STEP_STOP;
			break;
		}
	}
	ledger_release(&it->ledger);
	it->gfn = gfn;
	it->budget = budget;
	return end;
}

static enum step walk_one_table(struct tdp_iter *it)
{
	switch (it->c->walk) {
	case TDP_ZAP_LEAFS:
		return walk_table(it, TDP_ZAP_LEAFS);
	case TDP_ZAP_LEVEL:
		return walk_table(it, TDP_ZAP_LEVEL);
	case TDP_ZAP_RANGE:
		return walk_table(it, TDP_ZAP_RANGE);
	case TDP_WRPROT:
		return walk_table(it, TDP_WRPROT);
	case TDP_CLEAR_DIRTY:
		return walk_table(it, TDP_CLEAR_DIRTY);
	case TDP_AGE:
		return walk_table(it, TDP_AGE);
	case TDP_ACCESS_TRACK:
		return walk_table(it, TDP_ACCESS_TRACK);
	case TDP_COUNT:
		return walk_table(it, TDP_COUNT);
	case TDP_FIND_HUGE:
		return walk_table(it, TDP_FIND_HUGE);
	default:
		return walk_table(it, TDP_FIND_TABLE);
	}
}

/* Walk from the root down and along one table page.  A page that is freed while the walk is in it is detected
 * by its tag: in that case mmu_lock and RCU have failed. */
static enum step walk_from_root(struct tdp_iter *it)
{
	enum step step;

	it->table = it->c->root;
	it->level = it->c->root_level;
	it->link = 0;
	for (;;) {
		uint64_t link = it->link;

		step = walk_one_table(it);
		if (link && !spte_child_holds(it->m, it->cpu, it->vm, link, it->level + 1, it->gfn))
			return step == STEP_FROZEN || step == STEP_DESCEND ? STEP_STOP : step;
		if (step != STEP_DESCEND)
			return step;
		if (!spte_child_holds(it->m, it->cpu, it->vm, it->link, it->level, it->gfn)) {
			it->gfn = (it->gfn | (kvm_pages_per_hpage(it->level) - 1)) + 1;
			return STEP_TABLE;
		}
		it->table = spte_hfn(it->link);
		it->level--;
	}
}

static void walk_range(struct tdp_iter *it)
{
	uint64_t frozen_at = UINT64_MAX;

	for (;;) {
		switch (walk_from_root(it)) {
		case STEP_FROZEN:
			/* The page may be one that another thread has just unlinked: then the path from the
			 * root leads elsewhere by now.  If it leads here again, the thread that froze the SPTE
			 * must run first. */
			if (frozen_at == it->gfn)
				return;
			frozen_at = it->gfn;
			break;
		case STEP_TABLE:
			if (it->gfn >= it->end || !it->budget)
				return;
			break;
		default:
			return;
		}
	}
}

static void record(const struct tdp_iter *it, uint32_t kind)
{
	event_record_more(it->m, it->cpu, event_of(it->vm, kind), it->first_changed, it->c->pages,
			  it->gfn - it->first_changed);
}

/* All changes of a walk need a flush, or none does. */
static void account(struct tdp_iter *it)
{
	struct counters *counters = it->m->cpus[it->cpu].counters;

	switch (it->c->walk) {
	case TDP_ZAP_LEAFS:
	case TDP_ZAP_LEVEL:
	case TDP_ZAP_RANGE:
		it->c->flush = it->c->changed;
		count(counters, COUNT_SPTES_ZAPPED, it->c->pages);
		if (it->c->changed)
			record(it, EVENT_ZAP);
		break;
	case TDP_WRPROT:
	case TDP_CLEAR_DIRTY:
		it->c->flush = it->c->changed;
		if (it->c->changed)
			record(it, EVENT_PROTECT);
		break;
	default:
		break;
	}
}

static uint32_t min_level_of(const struct tdp_chunk *c)
{
	switch (c->walk) {
	case TDP_ZAP_LEVEL:
	case TDP_WRPROT:
		return c->level ? c->level : PG_LEVEL_4K;
	case TDP_FIND_HUGE:
		return (c->level ? c->level : PG_LEVEL_4K) + 1;
	case TDP_FIND_TABLE:
		return PG_LEVEL_2M;
	default:
		return PG_LEVEL_4K;
	}
}

/* Return whether the root page is still the root: a walk ends if its root page was freed, and maybe reused. */
static bool root_holds(const struct tdp_iter *it)
{
	const struct tdp_chunk *c = it->c;

	return !c->root_link || spte_child_holds(it->m, it->cpu, it->vm, c->root_link, c->root_level + 1, it->gfn);
}

static void chunk_begin(struct tdp_iter *it, struct tdp_chunk *c)
{
	uint64_t limit = kvm_pages_per_hpage(c->root_level + 1);

	c->changed = c->old_spte = c->pages = c->flush = c->already = c->young = 0;
	c->found_level = 0;
	c->zapped = c->next_gfn;
	it->most_changed = c->most_changed && c->walk != TDP_COUNT ? c->most_changed : UINT64_MAX;
	it->min_level = min_level_of(c);
	it->gfn = it->start = c->next_gfn;
	it->end = c->end_gfn < limit ? c->end_gfn : limit;
	if (c->walk == TDP_CLEAR_DIRTY && it->end > it->start + 64)
		it->end = it->start + 64;
}

static void chunk_end(const struct tdp_iter *it, struct tdp_chunk *c)
{
	uint64_t moved = it->gfn - it->start;

	c->next_gfn = it->gfn;
	c->done = it->gfn >= it->end;
	if (c->walk == TDP_CLEAR_DIRTY) {
		c->mask = moved < 64 ? c->mask >> moved : 0;
		c->done |= !c->mask;
	}
}

int tdp_walk_chunk(struct machine *m, uint32_t cpu, uint32_t vm, struct tdp_chunk *chunk, uint32_t max)
{
	struct tdp_iter it = { .m = m, .frames = m->frames, .ledger = ledger_cursor(m, vm), .c = chunk, .cpu = cpu,
			       .vm = vm, .budget = max ? max : 1 };

	ipi_drain(m, cpu);
	chunk_begin(&it, chunk);
	if (!root_holds(&it))
		it.gfn = it.end;
	if (it.gfn < it.end)
		walk_range(&it);
	chunk_end(&it, chunk);
	chunk->looked_at = (max ? max : 1) - it.budget;
	account(&it);
	return 0;
}
