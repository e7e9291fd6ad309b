/* Guest accesses.  See access.h. */
#include "guest/access.h"

#include "core/counters.h"
#include "core/cpu_types.h"
#include "core/machine_types.h"
#include "guest/guest_fault.h"
#include "guest/guest_os.h"
#include "memory/frame.h"
#include "tlb/tlb.h"
#include "tlb/tlb_l1.h"
#include "tlb/tlb_types.h"
#include "vm/guest_state.h"
#include "walk/vmcs.h"
#include "walk/walk.h"
#include "walk/walk_linear.h"
#include "walk/walk_fast.h"
#include "walk/walk_shadow.h"
#include "walk/walk_shadow_fast.h"

#define RECORD_PAGE(record) ((record) >> 12 & GUEST_PAGE_MASK)
/* RECORD_PAGE in fewer instructions, if bits 48 to 61 are 0, as they should be. */
#define RECORD_PAGE_FAST(record) ((record) << 2 >> 14)
#define RECORD_TYPE(record) ((uint32_t)((record) >> 62))

enum {
	FAULTS_IN_A_ROW = 16,
	LINE = CACHELINE / sizeof(uint64_t), /* records */
	NOTE_EVERY = 4,
	FETCH_AHEAD = 2048, /* bytes: the loop needs as long for them as memory needs to answer */
};

/* Relaxed: guest memory, which only the guest orders. */
static inline void store(uint8_t *memory, uint32_t hfn, uint64_t record, uint64_t value)
{
	atomic_store_explicit((_Atomic uint64_t *)(void *)(memory + ((uint64_t)hfn << 12) + (record & 0xff8)), value,
			      memory_order_relaxed);
}

void guest_store(struct walk *w, uint64_t record, const struct tlb_entry *e)
{
	if (RECORD_TYPE(record) == ACCESS_WRITE)
		store(w->m->frames->memory, e->hfn + (uint32_t)(RECORD_PAGE(record) - e->page), record,
		      w->guest->clock);
}

/* Walk KVM's shadow tables.  A page fault exits; if KVM injects it, the guest's OS handles it before it repeats the
 * access. */
static __attribute__((noinline)) enum walk_result walk_without_ept(struct walk *w, uint64_t record, struct tlb_entry *e)
{
	enum walk_result r = walk_shadow(w, RECORD_PAGE(record), RECORD_TYPE(record), e);

	if (r == WALK_EXIT && RECORD_TYPE(record) == ACCESS_WRITE)
		guest_store_faulted(w, w->guest->clock);
	return r;
}

/* Walk, with the page faults on the way. */
static enum walk_result walk(struct walk *w, uint64_t record, struct tlb_entry *e)
{
	uint64_t page = RECORD_PAGE(record);
	uint32_t type = RECORD_TYPE(record);
	enum walk_result r = WALK_GUEST_FAULT;

	if (!w->vmcs->ept)
		return walk_without_ept(w, record, e);
	for (int i = 0; i < FAULTS_IN_A_ROW && r == WALK_GUEST_FAULT; i++) {
		r = w->guest->config.paging ? walk_linear(w, page, type, e) : walk_physical(w, page, type, e);
		if (r == WALK_GUEST_FAULT && os_page_fault(w, page, type) == WALK_EXIT)
			return WALK_EXIT;
	}
	return r;
}

/* Handle a miss of both levels.  ghost: the result of tlb_ghost(), or NULL. */
static inline __attribute__((always_inline)) enum walk_result access_miss(struct walk *w, uint64_t record,
									  const struct tlb_entry *ghost,
									  struct tlb_entry *e)
{
	w->linear = record & (GUEST_PAGE_MASK << 12 | 0xfff);
	/* With EPT and without paging the walk looks up this translation again, and handles the ghost. */
	if (ghost && (w->guest->config.paging || !w->vmcs->ept))
		walk_ghost(w, ghost, RECORD_PAGE(record), RECORD_TYPE(record));
	return walk(w, record, e);
}

static enum walk_result access_by_walk(struct walk *w, uint64_t record, const struct tlb_entry *ghost)
{
	struct tlb_entry e;
	enum walk_result r = access_miss(w, record, ghost, &e);

	if (r == WALK_DONE)
		guest_store(w, record, &e);
	return r;
}

enum walk_result guest_translate(struct walk *w, uint64_t record, struct tlb_entry *e)
{
	uint64_t page = RECORD_PAGE(record);
	struct tlb_entry ghost;
	int hit;

	w->linear = page << 12 | (record & 0xfff);
	hit = tlb_refill_l1(w->tlb, page, e);
	if (hit != 1) {
		count(w->cpu->counters, COUNT_L2_MISSES, 1);
		if (hit)
			ghost = *e;
		return access_miss(w, record, hit ? &ghost : NULL, e);
	}
	if ((e->supervisor && !w->supervisor) || !walk_check(w, e, page, RECORD_TYPE(record), 0))
		return walk(w, record, e);
	return WALK_DONE;
}

enum walk_result guest_access_slow(struct walk *w, uint64_t record)
{
	struct tlb_entry e;
	enum walk_result r = guest_translate(w, record, &e);

	if (r == WALK_DONE)
		guest_store(w, record, &e);
	return r;
}

static inline enum walk_result unless_skipped(enum walk_result r)
{
	return r == WALK_SKIPPED ? WALK_DONE : r;
}

bool guest_store_emulated(struct walk *w, uint64_t record)
{
	struct guest_store *store = &w->guest->store;
	bool done = store->done && record_stores_to(record, store->linear);

	store->done = false;
	return done;
}

enum walk_result guest_access_as_kernel(struct walk *w, uint64_t record)
{
	uint32_t type = RECORD_TYPE(record);
	struct tlb_entry e;
	enum walk_result r;

	w->linear = record & (GUEST_PAGE_MASK << 12 | 0xfff);
	w->supervisor = true;
	r = walk_shadow_cached(w, RECORD_PAGE(record), type, &e);
	w->supervisor = false;
	if (r == WALK_DONE)
		guest_store(w, record, &e);
	else if (r == WALK_EXIT && type == ACCESS_WRITE)
		guest_store_faulted(w, w->guest->clock);
	return unless_skipped(r);
}

static inline bool tag_is(const _Atomic uint16_t *tag, const struct tlb_hot *hot, uint32_t type)
{
	/* Relaxed: the tag is compared and nothing is read through it; see oracle.h for its ordering. */
	return atomic_load_explicit(&tag[hot->hfn], memory_order_relaxed) == hot->right[type];
}

/* Do one access after a wrong hint or a failed check, or a single one. */
__attribute__((noinline)) enum walk_result accesses_one(struct walk *w, uint64_t record)
{
	struct tlb_hot *hot = tlb_l1_miss(w->tlb, RECORD_PAGE(record));
	uint32_t type = RECORD_TYPE(record), hfn;

	if (__builtin_expect(!hot, 0)) {
		count(w->cpu->counters, COUNT_L2_MISSES, 1);
		if (!(w->vmcs->ept ? walk_fast(w, RECORD_PAGE(record), type, &hfn)
				   : walk_shadow_fast(w, RECORD_PAGE(record), type, &hfn)))
			return unless_skipped(access_by_walk(w, record, tlb_ghost(w->tlb)));
		if (type == ACCESS_WRITE)
			store(w->m->frames->memory, hfn, record, w->guest->clock);
		return WALK_DONE;
	}
	tlb_l1_touch(hot, tlb_l1_view(&w->tlb->l1));
	if (__builtin_expect(!tag_is(w->m->frames->tag, hot, type), 0))
		return unless_skipped(guest_access_slow(w, record));
	if (type == ACCESS_WRITE)
		store(w->m->frames->memory, hot->hfn, record, w->guest->clock);
	return WALK_DONE;
}

/* The loop's state that stays in registers. */
struct loop {
	const struct accesses *a;
	struct tlb_l1 *l1;
	struct tlb_view view;
	const _Atomic uint32_t *attention;
	const _Atomic uint16_t *tag;
};

/* Do record p[i], if a hint leads to it.  touch: record the use for replacement. */
static inline __attribute__((always_inline)) bool hit(struct loop l, const uint64_t *p, uint32_t i, bool touch)
{
	uint64_t record = p[i];
	uint32_t type = RECORD_TYPE(record);
	struct tlb_hot *hot;

	/* The poll.  Relaxed: a CPU that sees the bit acquires when it takes the queue. */
	if (__builtin_expect(atomic_load_explicit(l.attention, memory_order_relaxed), 0))
		return false;
	/* The look-up. */
	hot = tlb_l1_hinted(l.l1, l.view, RECORD_PAGE_FAST(record));
	if (__builtin_expect(!hot, 0))
		return false;
	if (touch)
		tlb_l1_touch(hot, l.view);
	/* The check. */
	if (__builtin_expect(!tag_is(l.tag, hot, type), 0))
		return false;
	if (__builtin_expect(type == ACCESS_WRITE, 0))
		store(l.a->memory, hot->hfn, record, l.a->clock + i + (uintptr_t)p / sizeof(*p));
	return true;
}

/* Do records as far as hints lead to them; returns the first that was not done.
 *
 * Eight are done in a row, a line of the host's cache, since the loop's own instructions cost a tenth of the
 * time of an access, and the store that records a use another tenth.  One use in four is recorded, which adds a
 * few misses per hundred misses (an L1 that replaces in order of first use has a fifth more).
 *
 * A trace is read once and is larger than the host's caches.  Prefetching it early, with a non-temporal hint,
 * keeps it from evicting the guest's tables and the second level.
 */
static inline __attribute__((always_inline)) const uint64_t *run_hits(const struct accesses *a, struct tlb_l1 *l1,
								       const uint64_t *p, const uint64_t *end)
{
	struct loop l = { a, l1, tlb_l1_view(l1), a->attention, a->tag };
	const uint64_t *lines = p + ((end - p) & ~(ptrdiff_t)(LINE - 1));

	for (; p != lines; p += LINE) {
		__builtin_prefetch((const char *)p + FETCH_AHEAD, 0, 0);
#pragma GCC unroll 8
		for (uint32_t i = 0; i < LINE; i++)
			if (__builtin_expect(!hit(l, p, i, i % NOTE_EVERY == 0), 0))
				return p + i;
	}
	while (p != end && hit(l, p, 0, true))
		p++;
	return p;
}

void accesses_begin(struct accesses *a, struct walk *w)
{
	*a = (struct accesses){ .attention = &w->cpu->attention, .tag = w->m->frames->tag,
				.memory = w->m->frames->memory };
}

enum walk_result accesses_run(struct accesses *a, struct walk *w, const uint64_t *records, uint64_t n, uint64_t *done)
{
	const uint64_t *p = records, *end = records + n;
	uint64_t misses = w->tlb->l1_misses, i;
	enum walk_result r = WALK_DONE;

	for (;;) {
		a->clock = w->guest->clock - (uintptr_t)p / sizeof(*p);
		p = run_hits(a, &w->tlb->l1, p, end);
		w->guest->clock = a->clock + (uintptr_t)p / sizeof(*p);
		if (p == end || atomic_load_explicit(a->attention, memory_order_relaxed))
			break;
		/* A page fault may advance the guest's clock. */
		r = accesses_one(w, *p);
		if (__builtin_expect(r != WALK_DONE, 0))
			break;
		w->guest->clock++;
		p++;
	}
	i = (uint64_t)(p - records);
	a->polls += i + (i < n);
	a->lookups += i + (r != WALK_DONE);
	a->checks += i + (r != WALK_DONE);
	a->l1_misses += w->tlb->l1_misses - misses;
	*done = i;
	return r;
}
