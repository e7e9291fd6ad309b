/* Two-dimensional walks: guest tables, of which each entry is itself reached through the EPT. */
#include "walk/walk_linear.h"

#include "core/counters.h"
#include "core/cpu_types.h"
#include "core/machine_types.h"
#include "memory/frame.h"
#include "oracle/oracle.h"
#include "tlb/psc.h"
#include "tlb/tlb.h"
#include "tlb/tlb_flush.h"
#include "vm/guest_state.h"
#include "vm/vm.h"
#include "walk/walk.h"

/* The guest table that the next step reads. */
struct table {
	uint64_t gfn;
	uint32_t hfn;
	uint32_t level;
};

static uint64_t span_of(uint32_t level)
{
	return UINT64_C(1) << level * 9;
}

static void cache_table(struct walk *w, uint64_t page, const struct table *t, uint32_t right)
{
	struct psc_entry p = {
		.page = page & ~(span_of(t->level) - 1),
		.gfn = t->gfn,
		.hfn = t->hfn,
		.right = right,
		.kind = KIND_COMBINED,
		.level = (uint8_t)t->level,
		.vm = w->vcpu->vm,
		.vcpu = w->vcpu->id,
		.clock = w->guest->clock,
	};

	psc_insert(w->tlb, &p);
}

/* Let the oracle judge a cached pointer to a guest table that fails the fast check. */
static bool table_check_slow(struct walk *w, uint64_t page, const struct psc_entry *p)
{
	struct tlb_entry e = {
		.page = p->gfn, .gfn = p->gfn, .hfn = p->hfn, .kind = KIND_GUEST_PHYSICAL,
		.right = { p->right, RIGHT_NONE, RIGHT_NONE },
		.ep4ta = p->ep4ta, .vpid = p->vpid, .pcid = p->pcid,
		.vm = p->vm, .vcpu = p->vcpu, .clock = p->clock,
		/* Psc entries carry no custody; the ledger decides. */
		.custody = (uint16_t)frame_host_tag(w->m->frames, p->hfn),
	};
	struct table t = { .gfn = p->gfn, .hfn = p->hfn, .level = p->level };
	struct judgement j;

	count(w->cpu->counters, COUNT_ORACLE_SLOW, 1);
	oracle_judge(w->m, w->vcpu, w->life_bits >> 16, &e, p->gfn, ACCESS_READ, &j);
	if (j.verdict == VERDICT_VIOLATION && w->speculative)
		return false;
	if (j.verdict == VERDICT_VIOLATION) {
		oracle_violation(w->m, w->cpu, w->vcpu, &e, p->gfn, ACCESS_READ, p->level, w->linear, &j);
		page_fault_invalidate(w->tlb, page);
		return false;
	}
	if (j.verdict == VERDICT_LEGAL_STALE)
		count(w->cpu->counters, COUNT_LEGAL_STALE, 1);
	cache_table(w, page, &t, j.right);
	return true;
}

/* Return whether the cached pointer to a guest table may be used.  As walk_check, for the page that it points
 * to. */
static inline bool table_check(struct walk *w, uint64_t page, const struct psc_entry *p)
{
	return right_holds(w, p->right, p->hfn) || table_check_slow(w, page, p);
}

static enum walk_result table_enter(struct walk *w, uint64_t gfn, uint32_t level, struct table *t,
				    uint32_t *right)
{
	struct tlb_entry e;
	enum walk_result r = walk_physical(w, gfn, ACCESS_READ, &e);

	if (r != WALK_DONE)
		return r;
	t->gfn = gfn;
	t->hfn = e.hfn + (uint32_t)(gfn - e.page);
	t->level = level;
	*right = e.right[ACCESS_READ];
	return WALK_DONE;
}

static enum walk_result walk_begin(struct walk *w, uint64_t page, struct table *t)
{
	const struct psc_entry *p = psc_search(w->tlb, KIND_COMBINED, page);
	uint32_t right;

	if (p) {
		t->gfn = p->gfn;
		t->hfn = p->hfn;
		t->level = p->level;
		if (table_check(w, page, p))
			return WALK_DONE;
		if (w->speculative)
			return WALK_EXIT;
	}
	return table_enter(w, w->guest->cr3_gfn, GUEST_LEVELS, t, &right);
}

/* Set accessed and dirty flags: a guest write to the table page. */
static enum walk_result set_flags(struct walk *w, const struct table *t, uint32_t index, uint64_t gpte,
				  uint64_t flags)
{
	struct tlb_entry e;
	enum walk_result r;

	if ((gpte & flags) == flags)
		return WALK_DONE;
	r = walk_physical(w, t->gfn, ACCESS_WRITE, &e);
	if (r != WALK_DONE)
		return r;
	/* Relaxed: guest memory, which only the guest orders. */
	atomic_fetch_or_explicit(guest_word(w->m, e.hfn + (uint32_t)(t->gfn - e.page), index), flags,
				 memory_order_relaxed);
	return WALK_DONE;
}

/* Combine the guest page and the guest-physical page behind it, in *e, into one mapping of the smaller size. */
static void combine(struct walk *w, uint64_t page, uint64_t gpte, uint32_t guest_size, bool dirty, uint64_t gfn,
		    struct tlb_entry *e)
{
	uint32_t size = e->size < guest_size ? e->size : guest_size;
	uint64_t span = UINT64_C(1) << size * 9, below = page & (span - 1);

	e->kind = KIND_COMBINED;
	e->gfn = gfn - below;
	e->hfn += (uint32_t)(e->gfn - e->page);
	e->page = page - below;
	e->size = (uint8_t)size;
	e->global = (gpte & GPTE_GLOBAL) != 0;
	e->fractured = size < guest_size ? (uint8_t)(guest_size + 1) : 0;
	e->clock = w->guest->clock;
	if (!(gpte & GPTE_WRITABLE) || !dirty)
		e->right[ACCESS_WRITE] = RIGHT_NONE;
}

static enum walk_result finish(struct walk *w, uint64_t page, uint32_t type, const struct table *t,
			       uint64_t gpte, struct tlb_entry *out)
{
	uint32_t guest_size = t->level - 1, index = page >> guest_size * 9 & 511;
	uint64_t offset = page & ((UINT64_C(1) << guest_size * 9) - 1);
	uint64_t gfn = ((gpte & GPTE_ADDRESS) >> 12) + offset;
	uint64_t flags = GPTE_ACCESSED | (type == ACCESS_WRITE ? GPTE_DIRTY : 0);
	enum walk_result r;

	if (type == ACCESS_WRITE && !(gpte & GPTE_WRITABLE))
		return WALK_GUEST_FAULT;
	r = set_flags(w, t, index, gpte, flags);
	if (r != WALK_DONE)
		return r;
	r = walk_physical(w, gfn, type, out);
	if (r != WALK_DONE)
		return r;
	combine(w, page, gpte, guest_size, (gpte | flags) & GPTE_DIRTY, gfn, out);
	tlb_insert(w->tlb, out, page);
	return WALK_DONE;
}

enum walk_result walk_linear(struct walk *w, uint64_t page, uint32_t type, struct tlb_entry *out)
{
	struct table t;
	enum walk_result r = walk_begin(w, page, &t);

	while (r == WALK_DONE) {
		uint32_t index = page >> (t.level - 1) * 9 & 511, right;
		uint64_t gpte = atomic_load_explicit(guest_word(w->m, t.hfn, index), memory_order_relaxed);

		count(w->cpu->counters, COUNT_WALK_REFERENCES, 1);
		if (!(gpte & GPTE_PRESENT))
			return WALK_GUEST_FAULT;
		if (t.level == 1 || (t.level == 2 && (gpte & GPTE_PAGE_SIZE)))
			return finish(w, page, type, &t, gpte, out);
		r = set_flags(w, &t, index, gpte, GPTE_ACCESSED);
		if (r != WALK_DONE)
			break;
		r = table_enter(w, (gpte & GPTE_ADDRESS) >> 12, t.level - 1, &t, &right);
		if (r == WALK_DONE)
			cache_table(w, page, &t, right);
	}
	return r;
}
