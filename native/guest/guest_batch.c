/* See guest_batch.h. */
#include "guest/guest_batch.h"

#include "core/counters.h"
#include "core/cpu_types.h"
#include "core/events.h"
#include "core/machine_types.h"
#include "guest/guest.h"
#include "guest/guest_insn.h"
#include "guest/guest_mapping.h"
#include "guest/guest_os.h"
#include "guest/guest_pages.h"
#include "guest/guest_shadow.h"
#include "guest/guest_tables.h"
#include "oracle/ledger.h"
#include "sync/cpu.h"
#include "vm/guest_state.h"
#include "vm/vm.h"
#include "walk/walk.h"

enum {
	FEW = 4,            /* changes that are mostly invalidated page by page */
	SPIN_NANOSECONDS = 20000,
	LONG_LATENCY_ONE_IN = 4,
};

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

static uint32_t number_of(const struct guest_batch *b)
{
	/* Relaxed: read by the vCPU in the OS, or after an acquire of `flush`. */
	return atomic_load_explicit(&b->number, memory_order_relaxed);
}

static uint32_t changes_of(const struct guest_batch *b)
{
	return atomic_load_explicit(&b->changes, memory_order_relaxed);
}

static bool flushing(const struct guest_batch *b)
{
	return atomic_load_explicit(&b->flush, memory_order_relaxed) == number_of(b);
}

/* Begin the next batch.  Release: pairs with the acquire of `number` in agreed_before_batch(), which then finds no change of
 * the batch before. */
static void begin(struct guest *leader)
{
	struct guest_batch *b = &leader->batch;

	b->most = 1 + (uint32_t)(guest_random(leader) % (leader->config.batch < GUEST_BATCH ? leader->config.batch : GUEST_BATCH));
	atomic_store_explicit(&b->changes, 0, memory_order_relaxed);
	atomic_store_explicit(&b->written, 0, memory_order_relaxed);
	atomic_store_explicit(&b->number, number_of(b) + 1, memory_order_release);
}

void os_batch_reap(struct guest *g)
{
	struct guest_batch *b = &g->leader->batch;

	/* Acquire: pairs with the release in settled(); the vCPUs have stopped to read the batch. */
	if (number_of(b) && (!flushing(b) || atomic_load_explicit(&b->left, memory_order_acquire)))
		return;
	for (uint32_t i = 0; i < changes_of(b); i++)
		if (b->change[i].all)
			guest_gfn_put(g, b->change[i].gfn);
	begin(g->leader);
}

bool os_batch_flush(struct walk *w)
{
	struct guest *leader = w->guest->leader;
	struct guest_batch *b = &leader->batch;

	if (!changes_of(b))
		return false;
	if (flushing(b))
		return true;
	atomic_store_explicit(&b->left, leader->vcpus, memory_order_relaxed);
	b->asked_by = w->vcpu->id;
	/* Release: pairs with the acquire in os_flush_due. */
	atomic_store_explicit(&b->flush, number_of(b), memory_order_release);
	return true;
}

static void add_change(struct guest_batch *b, struct guest_change change)
{
	uint32_t n = changes_of(b);

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
	const struct guest_change *change = &b->change[changes_of(b) - 1];
	struct guest_process *p = &g->process[change->process];
	struct guest_mapping now = { change->gfn, false, change->huge };
	enum walk_result r = change->all ? clear_entries(w, change) : os_install(w, p, change->page, now);

	g->choices.changing = r == WALK_EXIT;
	if (r == WALK_EXIT)
		return r;
	/* WALK_GUEST_FAULT: the host lost the table's contents; the OS's records are still valid. */
	atomic_store_explicit(&b->written, changes_of(b), memory_order_release);
	if (changes_of(b) >= b->most)
		os_batch_flush(w);
	return WALK_DONE;
}

enum walk_result os_change(struct walk *w, uint32_t process, uint64_t page, bool all)
{
	struct guest *g = w->guest;
	struct guest_batch *b = &g->leader->batch;

	os_batch_reap(g);
	if (flushing(b) || changes_of(b) >= b->most || !os_has_tables(g, process))
		return WALK_DONE;
	add(g, process, page, all);
	record(g, &b->change[changes_of(b) - 1]);
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
	    changes_of(b) + mapped_in(p, region, &first) + 1 > GUEST_BATCH)
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

/* --- invalidating it ---------------------------------------------------------------------------------------- */

/* The old translation is stale from here on, and each use of it asks the oracle. */
static void announce(struct walk *w, const struct guest_change *change)
{
	for (uint32_t i = 0; !change->table && i < (change->huge ? 512u : 1u); i++)
		ledger_announce(w->m, w->vcpu->vm, change->gfn + i);
}

void os_batch_covered(struct walk *w, uint64_t changes)
{
	struct guest *g = w->guest;
	const struct guest_batch *b = &g->leader->batch;
	/* Acquire: pairs with the release in begin(). */
	uint32_t number = atomic_load_explicit(&b->number, memory_order_acquire), n;

	if (!number || number == g->settled)
		return;
	if (g->covered_batch != number)
		g->covered = 0;
	g->covered_batch = number;
	/* Acquire: pairs with the release in os_change_resumed().  An entry that another vCPU has still to write may be read,
	 * and cached, again. */
	n = atomic_load_explicit(&b->written, memory_order_acquire);
	for (uint32_t i = 0; i < n; i++)
		if ((changes & ~g->covered) >> i & 1) {
			g->covered |= UINT64_C(1) << i;
			announce(w, &b->change[i]);
		}
}

void os_process_flushed(struct walk *w, uint32_t process)
{
	struct guest *g = w->guest;
	const struct guest_batch *b = &g->leader->batch;
	uint64_t of_process = 0;
	uint32_t n;

	g->stale &= ~(1u << process);
	/* As in os_batch_covered(). */
	if (atomic_load_explicit(&b->number, memory_order_acquire) == g->settled)
		return;
	n = atomic_load_explicit(&b->changes, memory_order_acquire);
	for (uint32_t i = 0; i < n; i++)
		if (b->change[i].process == process && !b->change[i].global)
			of_process |= UINT64_C(1) << i;
	os_batch_covered(w, of_process);
}

/* Return for how many accesses the vCPU keeps interrupts off: mostly few, with an order of magnitude drawn evenly;
 * one time in four a number drawn evenly up to the most, so that the host has time to act meanwhile. */
static uint64_t latency(struct guest *g)
{
	uint64_t most = g->leader->config.interrupts_off;
	uint32_t orders = most > 1 ? 63 - (uint32_t)__builtin_clzll(most) : 1;

	if (most && guest_random(g) % LONG_LATENCY_ONE_IN == 0)
		return guest_random(g) % (most + 1);
	return guest_random(g) % (UINT64_C(1) << guest_random(g) % orders);
}

bool os_flush_due(struct guest *g)
{
	const struct guest_batch *b = &g->leader->batch;
	/* Acquire: pairs with the release in os_batch_flush. */
	uint32_t flush = atomic_load_explicit(&b->flush, memory_order_acquire);

	if (!flush || flush != number_of(b) || flush == g->settled)
		return false;
	if (g->flush.noticed != flush) {
		g->flush.noticed = flush;
		g->flush.at = g->clock;
		/* The vCPU that has asked invalidates before the others, or after some of them. */
		if (b->asked_by != g->clock >> GUEST_CLOCK_VCPU || guest_random(g) % 2)
			g->flush.at += latency(g);
	}
	return g->clock >= g->flush.at;
}

/* Linux flushes a few pages one by one, more of them all at once. */
static enum guest_flush_kind choose(struct guest *g, const struct guest_batch *b)
{
	uint64_t random = guest_random(g) % 8;
	bool global = false;

	for (uint32_t i = 0; i < changes_of(b); i++)
		global |= b->change[i].global;
	if (random < 2 || (changes_of(b) <= FEW && random < 5))
		return GUEST_FLUSH_EACH;
	if (random == 2)
		return GUEST_FLUSH_ALL;
	if (random == 3)
		return GUEST_FLUSH_PGE;
	if (random == 4 && !global)
		return GUEST_FLUSH_RETAIN;
	return random == 5 ? GUEST_FLUSH_CONTEXTS : GUEST_FLUSH_LATER;
}

static enum walk_result insn(struct walk *w, uint32_t what, uint64_t operand)
{
	w->exit->reason = exit_instruction(w, what, operand);
	return WALK_EXIT;
}

static enum walk_result insn_invpcid(struct walk *w, uint32_t type, uint64_t pcid, uint64_t linear)
{
	w->exit->invpcid_type = type;
	w->exit->invpcid_pcid = pcid;
	return insn(w, GUEST_INSN_INVPCID, canonical_address(linear));
}

/* The instructions that invalidate everything. */
static enum walk_result flush_everything(struct walk *w)
{
	struct guest *g = w->guest;
	uint32_t step = g->flush.next++;

	if (g->flush.kind == GUEST_FLUSH_PGE && step < 2)
		return insn(w, GUEST_INSN_MOV_CR4, os_cr4_of(g, step == 1));
	if (g->flush.kind != GUEST_FLUSH_PGE && step < 1)
		return insn_invpcid(w, g->flush.kind == GUEST_FLUSH_ALL ? 2 : 3, 0, 0);
	return WALK_DONE;
}

/* Invalidate one change of a user page.  WALK_DONE: no instruction is needed. */
static enum walk_result flush_change(struct walk *w, const struct guest_change *change)
{
	struct guest *g = w->guest;
	const struct guest_process *p = &g->process[change->process];
	bool own = change->process == g->current, each = g->flush.kind == GUEST_FLUSH_EACH;

	if (change->global || (own && each))
		return insn(w, GUEST_INSN_INVLPG, canonical_address(change->page << 12));
	/* Without PCIDs the switch to another process flushes. */
	if (!own && !g->config.pcid)
		return WALK_DONE;
	if (each)
		return insn_invpcid(w, 0, p->pcid, change->page << 12);
	if (g->flush.flushed >> change->process & 1)
		return WALK_DONE;
	g->flush.flushed |= 1u << change->process;
	if (own) {
		g->flush.cr3 = os_cr3_of(p, false);
		return insn(w, GUEST_INSN_MOV_CR3, g->flush.cr3);
	}
	if (g->flush.kind == GUEST_FLUSH_CONTEXTS)
		return insn_invpcid(w, 1, p->pcid, 0);
	g->stale |= 1u << change->process;
	return WALK_DONE;
}

/* Release: pairs with the acquire in os_batch_reap(). */
static void settled(struct walk *w)
{
	struct guest *g = w->guest;
	struct guest_batch *b = &g->leader->batch;

	os_batch_covered(w, UINT64_MAX);
	g->settled = number_of(b);
	g->flush.under_way = false;
	count(w->cpu->counters, COUNT_GUEST_INVALIDATIONS, 1);
	event_record(w->m, w->cpu->id, event_of(w->vcpu->vm, EVENT_GUEST_INVALIDATE), w->vcpu->id,
		     changes_of(b) == 1 ? b->change[0].page : UINT64_MAX);
	atomic_fetch_sub_explicit(&b->left, 1, memory_order_acq_rel);
}

enum walk_result os_flush_step(struct walk *w)
{
	struct guest *g = w->guest;
	const struct guest_batch *b = &g->leader->batch;
	struct guest_flush *f = &g->flush;
	enum walk_result r = WALK_DONE;

	if (!f->under_way)
		*f = (struct guest_flush){ .noticed = f->noticed, .at = f->at, .kind = choose(g, b), .under_way = true };
	if (f->cr3)
		os_cr3_written(w, g->current, f->cr3);
	f->cr3 = 0;
	if (f->kind >= GUEST_FLUSH_ALL)
		r = flush_everything(w);
	else
		while (r == WALK_DONE && f->next < changes_of(b))
			r = flush_change(w, &b->change[f->next++]);
	if (r == WALK_DONE)
		settled(w);
	return r;
}
