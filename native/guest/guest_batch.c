/* See guest_batch.h. */
#include "guest/guest_batch.h"

#include "core/counters.h"
#include "core/cpu_types.h"
#include "core/machine_types.h"
#include "guest/guest.h"
#include "guest/guest_insn.h"
#include "guest/guest_mapping.h"
#include "guest/guest_os.h"
#include "guest/guest_pages.h"
#include "guest/guest_shadow.h"
#include "guest/guest_tables.h"
#include "sync/cpu.h"
#include "vm/guest_state.h"
#include "vm/vm.h"
#include "walk/walk.h"

enum { SPIN_NANOSECONDS = 20000 };

/* --- one vCPU at a time ------------------------------------------------------------------------------------- */

/* Acquire and release: each vCPU in the OS sees what the one before did there. */
bool os_enter(struct walk *w)
{
	uint32_t none = 0, self = w->vcpu->id + 1;

	if (!os_batches(w))
		return true;
	return atomic_compare_exchange_strong_explicit(&w->guest->leader->os_lock, &none, self, memory_order_acquire,
						       memory_order_relaxed) ||
	       none == self;
}

enum walk_result os_leave(struct walk *w, enum walk_result r)
{
	if (os_batches(w) && (r != WALK_EXIT || w->exit->reason == EXIT_REASONS))
		atomic_store_explicit(&w->guest->leader->os_lock, 0, memory_order_release);
	return r;
}

bool os_inside(const struct walk *w)
{
	/* Relaxed: only this vCPU writes its own number there. */
	return atomic_load_explicit(&w->guest->leader->os_lock, memory_order_relaxed) == w->vcpu->id + 1;
}

uint32_t os_spin(struct walk *w)
{
	/* Interrupts are on meanwhile. */
	w->guest->flush.at = 0;
	cpu_guest_halt(w->m, w->cpu->id, monotonic_ns() + SPIN_NANOSECONDS);
	return EXIT_PREEMPTION_TIMER;
}

uint32_t os_exit_of(struct walk *w, enum walk_result r)
{
	return r == WALK_EXIT && w->exit->reason == EXIT_REASONS ? os_spin(w) : exit_of(w, r);
}

/* --- the batch ---------------------------------------------------------------------------------------------- */

static bool flushing(const struct guest_batch *b)
{
	return atomic_load_explicit(&b->flush, memory_order_relaxed) == os_batch_number(b);
}

/* Begin the next batch.  Release: pairs with the acquire of `number` in agreed_before_batch(), which then finds no change of
 * the batch before. */
static void begin(struct guest *leader)
{
	struct guest_batch *b = &leader->batch;

	b->most = 1 + (uint32_t)(guest_random(leader) % (leader->config.batch < GUEST_BATCH ? leader->config.batch : GUEST_BATCH));
	atomic_store_explicit(&b->changes, 0, memory_order_relaxed);
	atomic_store_explicit(&b->written, 0, memory_order_relaxed);
	atomic_store_explicit(&b->number, os_batch_number(b) + 1, memory_order_release);
}

void os_batch_reap(struct guest *g)
{
	struct guest_batch *b = &g->leader->batch;

	/* Acquire: pairs with the release in settled(); the vCPUs have stopped to read the batch. */
	if (os_batch_number(b) && (!flushing(b) || atomic_load_explicit(&b->left, memory_order_acquire)))
		return;
	for (uint32_t i = 0; i < os_batch_changes(b); i++)
		if (b->change[i].all)
			guest_gfn_put(g, b->change[i].gfn);
	begin(g->leader);
}

bool os_batch_flush(struct walk *w)
{
	struct guest *leader = w->guest->leader;
	struct guest_batch *b = &leader->batch;

	if (!os_batch_changes(b))
		return false;
	if (flushing(b))
		return true;
	atomic_store_explicit(&b->left, leader->vcpus, memory_order_relaxed);
	b->asked_by = w->vcpu->id;
	/* Release: pairs with the acquire in os_flush_due(). */
	atomic_store_explicit(&b->flush, os_batch_number(b), memory_order_release);
	return true;
}

static void add_change(struct guest_batch *b, struct guest_change change)
{
	uint32_t n = os_batch_changes(b);

	b->change[n] = change;
	/* Release: pairs with the acquire in agreed_before_batch(). */
	atomic_store_explicit(&b->changes, n + 1, memory_order_release);
}

/* Note the change before its entry is written: from then on the old translation is one that was there before. */
static void add(struct guest *g, uint32_t process, uint64_t page, bool all)
{
	struct guest_batch *b = &g->leader->batch;
	struct guest_page *gp = guest_page_find(g, process, page);
	struct guest_mapping was = guest_mapping_of(gp);
	uint64_t below = was.huge ? page & 511 : 0;

	add_change(b, (struct guest_change){ .page = page - below, .process = process,
					     .gfn = was.gfn - (uint32_t)below, .all = all, .huge = was.huge,
					     .global = page >= GUEST_KERNEL_BASE });
}

static void record_one(struct guest_page *gp, bool all)
{
	if (all)
		guest_page_unmap(gp);
	else
		guest_page_protect(gp);
}

/* Record the change for all pages of the trace that share the mapping. */
static void record(struct guest *g, const struct guest_change *change)
{
	struct guest_process *p = &g->process[change->process];
	uint64_t i;

	if (!change->huge) {
		record_one(guest_page_find(g, change->process, change->page), change->all);
		return;
	}
	for (i = 0; i < p->page_count && p->pages[i] < change->page; i++)
		;
	for (; i < p->page_count && p->pages[i] < change->page + 512; i++)
		if (guest_mapping_of(&p->page[i]).huge)
			record_one(&p->page[i], change->all);
}

/* Clear the entry of a page that is unmapped; for a kernel page, in each process if each has its own kernel tables. */
static enum walk_result clear_entries(struct walk *w, const struct guest_change *change)
{
	struct guest *g = w->guest;
	bool everywhere = change->global && os_own_kernel(w), huge = change->huge || change->table;
	enum walk_result r = WALK_DONE;

	if (!everywhere)
		return os_clear_entry(w, &g->process[change->process], change->page, huge);
	for (uint32_t i = 0; i < g->processes && r != WALK_EXIT; i++)
		if (os_has_tables(g, i))
			r = os_clear_entry(w, &g->process[i], change->page, huge);
	return r;
}

enum walk_result os_change_resumed(struct walk *w)
{
	struct guest *g = w->guest;
	struct guest_batch *b = &g->leader->batch;
	const struct guest_change *change = &b->change[os_batch_changes(b) - 1];
	struct guest_process *p = &g->process[change->process];
	struct guest_mapping now = { change->gfn, false, change->huge };
	enum walk_result r = change->all ? clear_entries(w, change) : os_install(w, p, change->page, now);

	g->choices.changing = r == WALK_EXIT;
	if (r == WALK_EXIT)
		return r;
	/* WALK_GUEST_FAULT: the host lost the table's contents; the OS's records are still valid. */
	atomic_store_explicit(&b->written, os_batch_changes(b), memory_order_release);
	if (os_batch_changes(b) >= b->most)
		os_batch_flush(w);
	return WALK_DONE;
}

enum walk_result os_change(struct walk *w, uint32_t process, uint64_t page, bool all)
{
	struct guest *g = w->guest;
	struct guest_batch *b = &g->leader->batch;

	os_batch_reap(g);
	if (flushing(b) || os_batch_changes(b) >= b->most || !os_has_tables(g, process))
		return WALK_DONE;
	add(g, process, page, all);
	record(g, &b->change[os_batch_changes(b) - 1]);
	return os_change_resumed(w);
}

/* Return the pages of 2 MiB that are mapped, and the first one of the trace there.  A 2 MiB page counts as too many. */
static uint32_t mapped_in(const struct guest_process *p, uint64_t region, uint64_t *first)
{
	uint64_t i = 0;
	uint32_t n = 0;

	while (i < p->page_count && p->pages[i] >> 9 < region)
		i++;
	*first = i;
	for (; i < p->page_count && p->pages[i] >> 9 == region; i++)
		if (guest_page_mapped(&p->page[i]))
			n += guest_mapping_of(&p->page[i]).huge ? GUEST_BATCH : 1;
	return n;
}

enum walk_result os_drop_table(struct walk *w, uint32_t process, uint64_t page)
{
	struct guest *g = w->guest;
	struct guest_batch *b = &g->leader->batch;
	struct guest_process *p = &g->process[process];
	uint64_t region = page >> 9, table, entry, first;
	enum walk_result r;

	os_batch_reap(g);
	if (flushing(b) || !os_has_tables(g, process) ||
	    os_batch_changes(b) + mapped_in(p, region, &first) + 1 > GUEST_BATCH)
		return WALK_DONE;
	r = os_find_table(w, p, page, 2, false, &table, &entry);
	if (r == WALK_EXIT)
		return r;
	if (r != WALK_DONE || !(entry & GPTE_PRESENT) || entry & GPTE_PAGE_SIZE)
		return WALK_DONE;
	for (uint64_t i = first; i < p->page_count && p->pages[i] >> 9 == region; i++)
		if (guest_page_mapped(&p->page[i])) {
			add(g, process, p->pages[i], true);
			record_one(&p->page[i], true);
		}
	add_change(b, (struct guest_change){ .page = region << 9, .process = process, .all = true, .table = true,
					     .gfn = (uint32_t)((entry & GPTE_ADDRESS) >> 12) });
	return os_change_resumed(w);
}
