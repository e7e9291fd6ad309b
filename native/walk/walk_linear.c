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

/* SDM vol. 3A, 4.3 to 4.5.  levels: of tables in memory; bits: of an address that index a table. */
struct format {
	uint8_t levels, bits, entry_bytes, huge_level;
};

static const struct format formats[] = {
	[GUEST_TABLES_64] = { GUEST_LEVELS, 9, 8, 2 },
	[GUEST_TABLES_PAE] = { 2, 9, 8, 2 },
	[GUEST_TABLES_32] = { 2, 10, 4, 0 },
	[GUEST_TABLES_32_PSE] = { 2, 10, 4, 2 },
};

/* A part of a walk that is compiled twice: for tables of four levels, and for any format (walk_linear()). */
#define OF_FORMAT inline __attribute__((always_inline))

static OF_FORMAT uint32_t index_of(const struct format *f, uint64_t page, uint32_t level)
{
	return page >> (level - 1) * f->bits & ((1u << f->bits) - 1);
}

/* Entries of 4 bytes are halves of the words of guest memory. */
static OF_FORMAT _Atomic uint64_t *entry_word(const struct walk *w, const struct format *f, uint32_t hfn, uint32_t index,
					      uint32_t *shift)
{
	*shift = index * f->entry_bytes % sizeof(uint64_t) * 8;
	return guest_word(w->m, hfn, (uint32_t)(index * f->entry_bytes / sizeof(uint64_t)));
}

static OF_FORMAT uint64_t read_entry(const struct walk *w, const struct format *f, uint32_t hfn, uint32_t index)
{
	uint32_t shift;
	/* A statement of its own: in one with the shift, C would not order the two. */
	_Atomic uint64_t *at = entry_word(w, f, hfn, index, &shift);
	/* Relaxed: guest memory, which only the guest orders. */
	uint64_t word = atomic_load_explicit(at, memory_order_relaxed) >> shift;

	return f->entry_bytes == sizeof(uint64_t) ? word : word & UINT32_MAX;
}

/* The guest table that the next step reads. */
struct table {
	uint64_t gfn;
	uint32_t hfn;
	uint32_t level;
	int32_t ept12_delta;
};

static uint64_t span_of(uint32_t level)
{
	return UINT64_C(1) << level * 9;
}

static void cache_table(struct walk *w, uint64_t page, const struct table *t, uint32_t right)
{
	struct psc_entry p = {
		.page = page & ~(span_of(t->level) - 1),
		.gfn = t->gfn - (uint64_t)t->ept12_delta,
		.ept12_delta = t->ept12_delta,
		.hfn = t->hfn,
		.right = right,
		.kind = KIND_COMBINED,
		.level = (uint8_t)t->level,
		.vm = w->vcpu->vm,
		.vcpu = w->vcpu->id,
		.clock = w->guest->clock,
		.nested = w->guest->vmx.nested,
	};

	psc_insert(w->tlb, &p);
}

/* Let the oracle judge a cached pointer to a guest table that fails the fast check. */
static bool table_check_slow(struct walk *w, uint64_t page, const struct psc_entry *p)
{
	uint64_t table = p->gfn + (uint64_t)p->ept12_delta;
	struct tlb_entry e = {
		.page = table, .gfn = p->gfn, .ept12_delta = p->ept12_delta, .hfn = p->hfn, .kind = KIND_GUEST_PHYSICAL,
		.right = { p->right, RIGHT_NONE, RIGHT_NONE },
		.ep4ta = p->ep4ta, .vpid = p->vpid, .pcid = p->pcid,
		.vm = p->vm, .vcpu = p->vcpu, .clock = p->clock, .nested = p->nested,
		/* Psc entries carry no custody; the ledger decides. */
		.custody = (uint16_t)frame_host_tag(w->m->frames, p->hfn),
	};
	struct table t = { .gfn = table, .hfn = p->hfn, .level = p->level, .ept12_delta = p->ept12_delta };
	struct judgement j;

	count(w->cpu->counters, COUNT_ORACLE_SLOW, 1);
	oracle_judge(w->m, w->vcpu, w->life_bits >> 16, &e, table, ACCESS_READ, &j);
	/* It is a guest-physical page that is judged here, and the pointer to it that another guest may have filled. */
	oracle_judge_guest(w->vcpu, p->nested, &j);
	if (j.verdict == VERDICT_VIOLATION && w->speculative)
		return false;
	if (j.verdict == VERDICT_VIOLATION) {
		oracle_violation(w->m, w->cpu, w->vcpu, &e, table, ACCESS_READ, p->level, w->linear, &j);
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
	t->ept12_delta = e.ept12_delta;
	*right = e.right[ACCESS_READ];
	return WALK_DONE;
}

static OF_FORMAT enum walk_result walk_begin(struct walk *w, uint64_t page, const struct format *f, struct table *t)
{
	const struct psc_entry *p = psc_search(w->tlb, KIND_COMBINED, page);
	uint64_t top = w->guest->cr3_gfn;
	uint32_t right;

	if (p) {
		t->gfn = p->gfn + (uint64_t)p->ept12_delta;
		t->hfn = p->hfn;
		t->level = p->level;
		t->ept12_delta = p->ept12_delta;
		if (table_check(w, page, p))
			return WALK_DONE;
		if (w->speculative)
			return WALK_EXIT;
	}
	if (f == &formats[GUEST_TABLES_PAE]) {
		uint64_t pdpte = w->guest->pdpte[page >> 18 & (GUEST_PDPTES - 1)];

		if (!(pdpte & GPTE_PRESENT))
			return WALK_GUEST_FAULT;
		top = (pdpte & GPTE_ADDRESS) >> 12;
	}
	return table_enter(w, top, f->levels, t, &right);
}

/* Set accessed and dirty flags: a guest write to the table page. */
static enum walk_result write_flags(struct walk *w, const struct table *t, uint32_t index, uint64_t flags)
{
	_Atomic uint64_t *word;
	struct tlb_entry e;
	enum walk_result r;
	uint32_t shift;

	r = walk_physical(w, t->gfn, ACCESS_WRITE, &e);
	if (r != WALK_DONE)
		return r;
	word = entry_word(w, &formats[w->guest->tables], e.hfn + (uint32_t)(t->gfn - e.page), index, &shift);
	/* Relaxed: guest memory, which only the guest orders. */
	atomic_fetch_or_explicit(word, flags << shift, memory_order_relaxed);
	return WALK_DONE;
}

static inline enum walk_result set_flags(struct walk *w, const struct table *t, uint32_t index, uint64_t gpte,
					 uint64_t flags)
{
	return (gpte & flags) == flags ? WALK_DONE : write_flags(w, t, index, flags);
}

/* Combine the guest page and the guest-physical page behind it, in *e, into one mapping of the smaller size. */
static OF_FORMAT void combine(struct walk *w, uint64_t page, uint64_t gpte, uint32_t guest_size, bool dirty, uint64_t gfn,
			      struct tlb_entry *e)
{
	uint32_t size = e->size < guest_size ? e->size : guest_size;
	uint64_t span = UINT64_C(1) << size * 9, below = page & (span - 1);

	e->kind = KIND_COMBINED;
	e->gfn += gfn - below - e->page;
	e->hfn += (uint32_t)(gfn - below - e->page);
	e->page = page - below;
	e->size = (uint8_t)size;
	e->global = (gpte & GPTE_GLOBAL) != 0;
	e->fractured = size < guest_size ? (uint8_t)(guest_size + 1) : 0;
	e->clock = w->guest->clock;
	/* The guest-physical mapping may be another vCPU's. */
	e->vcpu = w->vcpu->id;
	e->nested = w->guest->vmx.nested;
	if (!(gpte & GPTE_WRITABLE) || !dirty)
		e->right[ACCESS_WRITE] = RIGHT_NONE;
}

static OF_FORMAT enum walk_result finish(struct walk *w, uint64_t page, uint32_t type, const struct format *f,
					 const struct table *t, uint64_t gpte, struct tlb_entry *out)
{
	uint32_t guest_size = t->level - 1, index = index_of(f, page, t->level);
	uint64_t below = (UINT64_C(1) << guest_size * f->bits) - 1;
	uint64_t gfn = ((gpte & GPTE_ADDRESS) >> 12 & ~below) + (page & below);
	uint64_t flags = GPTE_ACCESSED | (type == ACCESS_WRITE ? GPTE_DIRTY : 0);
	enum walk_result r;

	if (f->entry_bytes == sizeof(uint32_t) && guest_size)
		gfn += (gpte & GPTE32_PSE36) << 7;
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

static OF_FORMAT enum walk_result walk_tables(struct walk *w, uint64_t page, uint32_t type, const struct format *f,
					      struct tlb_entry *out)
{
	struct table t;
	enum walk_result r = walk_begin(w, page, f, &t);

	while (r == WALK_DONE) {
		uint32_t index = index_of(f, page, t.level), right;
		uint64_t gpte = read_entry(w, f, t.hfn, index);

		count(w->cpu->counters, COUNT_WALK_REFERENCES, 1);
		if (!(gpte & GPTE_PRESENT))
			return WALK_GUEST_FAULT;
		if (t.level == 1 || (t.level == f->huge_level && (gpte & GPTE_PAGE_SIZE)))
			return finish(w, page, type, f, &t, gpte, out);
		r = set_flags(w, &t, index, gpte, GPTE_ACCESSED);
		if (r != WALK_DONE)
			break;
		r = table_enter(w, (gpte & GPTE_ADDRESS) >> 12, t.level - 1, &t, &right);
		if (r == WALK_DONE)
			cache_table(w, page, &t, right);
	}
	return r;
}

static __attribute__((noinline)) enum walk_result walk_other(struct walk *w, uint64_t page, uint32_t type,
							     struct tlb_entry *out)
{
	return walk_tables(w, page, type, &formats[w->guest->tables], out);
}

enum walk_result walk_linear(struct walk *w, uint64_t page, uint32_t type, struct tlb_entry *out)
{
	if (__builtin_expect(w->guest->tables != GUEST_TABLES_64, 0))
		return walk_other(w, page, type, out);
	return walk_tables(w, page, type, &formats[GUEST_TABLES_64], out);
}
