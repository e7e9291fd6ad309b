/* See guest_flush.h. */
#include "guest/guest_flush.h"

#include "core/counters.h"
#include "core/cpu_types.h"
#include "core/events.h"
#include "core/machine_types.h"
#include "guest/guest.h"
#include "guest/guest_batch.h"
#include "guest/guest_insn.h"
#include "guest/guest_os.h"
#include "guest/guest_shadow.h"
#include "oracle/ledger.h"
#include "vm/guest_state.h"
#include "vm/vm.h"
#include "walk/walk.h"

enum {
	FEW = 4,            /* changes that are mostly invalidated page by page */
	LONG_LATENCY_ONE_IN = 4,
};

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
	/* Acquire: pairs with the release in os_batch_flush(). */
	uint32_t flush = atomic_load_explicit(&b->flush, memory_order_acquire);

	if (!flush || flush != os_batch_number(b) || flush == g->settled)
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

	for (uint32_t i = 0; i < os_batch_changes(b); i++)
		global |= b->change[i].global;
	if (random < 2 || (os_batch_changes(b) <= FEW && random < 5))
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
	g->settled = os_batch_number(b);
	g->flush.under_way = false;
	count(w->cpu->counters, COUNT_GUEST_INVALIDATIONS, 1);
	event_record(w->m, w->cpu->id, event_of(w->vcpu->vm, EVENT_GUEST_INVALIDATE), w->vcpu->id,
		     os_batch_changes(b) == 1 ? b->change[0].page : UINT64_MAX);
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
		while (r == WALK_DONE && f->next < os_batch_changes(b))
			r = flush_change(w, &b->change[f->next++]);
	if (r == WALK_DONE)
		settled(w);
	return r;
}
