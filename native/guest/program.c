/* Guest programs.  See program.h. */
#include "guest/program.h"

#include <string.h>

#include "core/chaos.h"
#include "core/counters.h"
#include "core/cpu_types.h"
#include "core/events.h"
#include "core/heap.h"
#include "core/machine_types.h"
#include "guest/access.h"
#include "guest/guest_os.h"
#include "guest/guest_promise.h"
#include "guest/guest_tables.h"
#include "sync/cpu.h"
#include "tlb/tlb_flush.h"
#include "vm/guest_state.h"
#include "vm/vm.h"
#include "walk/walk.h"

enum {
	PROGRAM_PENDING = 32,
	SPINS_IN_GUEST = 256,
	WAIT_NANOSECONDS = 20000,
};

/* A change that the guest has not invalidated yet: its old translation may be used. */
struct pending {
	uint64_t page;
	uint32_t process;
	uint32_t gfn;    /* the frame behind it before */
	bool all;        /* the mapping changed; else write access was removed */
	bool global;
};

struct program {
	struct guest_op *ops;
	uint32_t count;
	uint32_t position;
	uint32_t pending_count;
	struct pending pending[PROGRAM_PENDING];
};

void signal_add(struct machine *m, uint32_t slot, uint64_t n)
{
	/* Release: a CPU that sees the count sees everything done before.  Pairs with signal_get. */
	atomic_fetch_add_explicit(&m->signals[slot % MACHINE_SIGNALS], n, memory_order_release);
}

uint64_t signal_get(struct machine *m, uint32_t slot)
{
	return atomic_load_explicit(&m->signals[slot % MACHINE_SIGNALS], memory_order_acquire);
}

void signal_reset(struct machine *m)
{
	for (uint32_t i = 0; i < MACHINE_SIGNALS; i++)
		atomic_store_explicit(&m->signals[i], 0, memory_order_release);
}

void program_destroy(struct machine *m, struct guest *g)
{
	if (g->program)
		heap_free(m->heap, g->program->ops);
	heap_free(m->heap, g->program);
	g->program = NULL;
}

int guest_set_program(struct machine *m, uint32_t vcpu, const struct guest_op *ops, uint32_t n)
{
	struct guest *g = m->vcpus[vcpu].guest;
	struct guest_op *copy = heap_zalloc(m->heap, n + 1ul, sizeof(*ops));

	if (!g->program)
		g->program = heap_zalloc(m->heap, 1, sizeof(*g->program));
	if (!copy || !g->program) {
		heap_free(m->heap, copy);
		return MACHINE_NOMEM;
	}
	memcpy(copy, ops, n * sizeof(*ops));
	heap_free(m->heap, g->program->ops);
	g->program->ops = copy;
	g->program->count = n;
	g->program->position = 0;
	return 0;
}

uint32_t guest_program_position(struct machine *m, uint32_t vcpu)
{
	const struct program *p = m->vcpus[vcpu].guest->program;

	return p ? p->position : 0;
}

/* --- changes and invalidations ------------------------------------------------------------------------------ */

static void note_change(struct walk *w, uint64_t page, const struct guest_page *gp, bool all, bool global)
{
	struct program *p = w->guest->program;

	/* The list is full: the oracle will never report a use of this old translation. */
	if (gp->gfn == (uint32_t)GUEST_NO_GFN || p->pending_count == PROGRAM_PENDING)
		return;
	p->pending[p->pending_count++] = (struct pending){
		.page = page, .process = w->guest->current, .gfn = gp->gfn, .all = all, .global = global
	};
}

/* The guest has invalidated it: from here on the old translation is stale, and each use of it asks the oracle. */
static void settle(struct walk *w, const struct pending *change)
{
	struct guest_page *gp = guest_page_find(w->guest, change->process, change->page);

	if (!gp)
		return;
	w->guest->clock++;
	guest_promise(w->m, w->vcpu, gp, change->gfn, change->all);
}

/* The scope of an invalidation. */
struct covered {
	bool any_page, any_process, globals;
	uint64_t page;
	uint32_t process;
};

static void invalidated(struct walk *w, struct covered what)
{
	struct program *p = w->guest->program;
	uint32_t left = 0;

	for (uint32_t i = 0; i < p->pending_count; i++) {
		const struct pending *change = &p->pending[i];
		bool process = what.any_process || change->process == what.process ||
			       (change->global && what.globals);

		if ((what.any_page || change->page == what.page) && process && (!change->global || what.globals))
			settle(w, change);
		else
			p->pending[left++] = *change;
	}
	p->pending_count = left;
	count(w->cpu->counters, COUNT_GUEST_INVALIDATIONS, 1);
	event_record(w->m, w->cpu->id, event_of(w->vcpu->vm, EVENT_GUEST_INVALIDATE), w->vcpu->id,
		     what.any_page ? UINT64_MAX : what.page);
}

void guest_invalidates_all(struct machine *m, uint32_t vcpu)
{
	struct walk w = { .m = m, .vcpu = &m->vcpus[vcpu], .guest = m->vcpus[vcpu].guest };
	struct program *p = w.guest->program;

	for (uint32_t i = 0; p && i < p->pending_count; i++)
		settle(&w, &p->pending[i]);
	if (p)
		p->pending_count = 0;
}

static uint32_t pcid_of(const struct guest *g, uint64_t process)
{
	return process < g->processes ? g->process[process].pcid : 0;
}

static void do_invlpg(struct walk *w, const struct guest_op *op)
{
	uint64_t page = op->linear >> 12 & GUEST_PAGE_MASK;

	invlpg(w->tlb, page);
	invalidated(w, (struct covered){ .page = page, .process = w->guest->current, .globals = true,
					 .any_process = !w->guest->config.pcid });
}

/* SDM vol. 2A, INVPCID: types. */
static void do_invpcid(struct walk *w, const struct guest_op *op)
{
	uint64_t page = op->linear >> 12 & GUEST_PAGE_MASK;
	uint32_t pcid = pcid_of(w->guest, op->value);
	struct covered what = { .page = page, .process = (uint32_t)op->value, .any_page = op->flags > 0,
				.any_process = op->flags >= 2 || !w->guest->config.pcid,
				.globals = op->flags == 2 };

	if (op->flags == 0)
		invpcid_address(w->tlb, pcid, page);
	else if (op->flags == 1)
		invpcid_single(w->tlb, pcid);
	else if (op->flags == 2)
		invpcid_all(w->tlb);
	else
		invpcid_retain_globals(w->tlb);
	invalidated(w, what);
}

static void do_mov_cr3(struct walk *w, const struct guest_op *op)
{
	struct guest *g = w->guest;

	if (op->value < g->processes)
		g->current = (uint32_t)op->value;
	os_load_cr3(w);
	count(w->cpu->counters, COUNT_GUEST_SWITCHES, 1);
	/* Bit 63 has a meaning only with CR4.PCIDE. */
	if (op->flags & GUEST_OP_NOFLUSH && g->config.pcid)
		return;
	mov_to_cr3(w->tlb, pcid_of(g, g->current));
	invalidated(w, (struct covered){ .process = g->current, .any_page = true, .any_process = !g->config.pcid });
}

/* --- page tables -------------------------------------------------------------------------------------------- */

static uint64_t entry_value(const struct guest_op *op)
{
	return op->value << 12 | GPTE_PRESENT | GPTE_USER |
	       (op->flags & GUEST_OP_READ_ONLY ? 0 : GPTE_WRITABLE) |
	       (op->flags & GUEST_OP_GLOBAL ? GPTE_GLOBAL : 0) |
	       (op->flags & GUEST_OP_HUGE ? GPTE_PAGE_SIZE : 0);
}

static enum walk_result do_map(struct walk *w, const struct guest_op *op)
{
	struct guest *g = w->guest;
	struct guest_process *p = &g->process[g->current];
	uint64_t page = op->linear >> 12 & GUEST_PAGE_MASK, table, entry;
	uint32_t level = op->flags & GUEST_OP_HUGE ? 2 : 1;
	struct guest_page *gp = guest_page_find(g, g->current, page);
	enum walk_result r = os_find_table(w, p, page, level, true, &table, &entry);

	if (r == WALK_DONE)
		r = os_write_entry(w, table, page >> (level - 1) * 9 & 511, entry_value(op));
	if (r != WALK_DONE || !gp)
		return r;
	note_change(w, page, gp, true, entry & GPTE_GLOBAL);
	gp->gfn = (uint32_t)op->value;
	gp->writable = !(op->flags & GUEST_OP_READ_ONLY);
	return r;
}

/* UNMAP and PROTECT: clear bits of the entry.  If nothing is mapped there, nothing is to be done. */
static enum walk_result take_away(struct walk *w, const struct guest_op *op, uint64_t bits)
{
	struct guest *g = w->guest;
	uint64_t page = op->linear >> 12 & GUEST_PAGE_MASK, table, entry;
	struct guest_page *gp = guest_page_find(g, g->current, page);
	enum walk_result r = os_find_table(w, &g->process[g->current], page, 1, false, &table, &entry);
	uint32_t level = 1;

	if (r == WALK_GUEST_FAULT)
		return WALK_DONE;
	if (r == WALK_DONE) {
		level = entry & GPTE_PAGE_SIZE ? 2 : 1;
		r = os_write_entry(w, table, page >> (level - 1) * 9 & 511, entry & ~bits);
	}
	if (r != WALK_DONE || !gp)
		return r;
	note_change(w, page, gp, bits != GPTE_WRITABLE, entry & GPTE_GLOBAL);
	gp->writable = 0;
	if (bits != GPTE_WRITABLE)
		gp->gfn = (uint32_t)GUEST_NO_GFN;
	return r;
}

/* --- steps -------------------------------------------------------------------------------------------------- */

/* Return the gfn behind a page to which the guest has just stored. */
static uint64_t stored_to(const struct guest *g, uint64_t page)
{
	const struct guest_page *gp = g->config.paging ? guest_page_find(g, g->current, page) : NULL;

	return gp ? gp->gfn : page;
}

static enum walk_result do_access(struct walk *w, struct accesses *a, const struct guest_op *op, uint64_t *budget)
{
	uint64_t record = (uint64_t)op->kind << 62 | (op->linear & UINT64_C(0xffffffffffff));
	enum walk_result r = accesses_one(w, record);

	a->polls++;
	a->lookups++;
	a->checks++;
	if (r != WALK_DONE)
		return r;
	if (op->kind == GUEST_OP_WRITE)
		event_record_more(w->m, w->cpu->id, event_of(w->vcpu->vm, EVENT_STORE), w->vcpu->id,
				  stored_to(w->guest, op->linear >> 12), w->guest->clock);
	w->guest->clock++;
	--*budget;
	return r;
}

/* The caller serves interrupts: it polls after each turn. */
static void wait_a_little(struct walk *w, const struct guest_op *op)
{
	for (uint32_t i = 0; i < SPINS_IN_GUEST; i++) {
		if (signal_get(w->m, (uint32_t)op->linear) >= op->value || cpu_attention(w->m, w->cpu->id))
			return;
		cpu_relax();
	}
	cpu_guest_halt(w->m, w->cpu->id, monotonic_ns() + WAIT_NANOSECONDS);
}

static enum walk_result one(struct walk *w, struct accesses *a, const struct guest_op *op, uint64_t *budget)
{
	enum walk_result r = w->guest->smm ? WALK_DONE : os_setup(w);

	if (r != WALK_DONE)
		return r;
	switch (op->kind) {
	case GUEST_OP_READ:
	case GUEST_OP_WRITE:
	case GUEST_OP_EXECUTE:
		return do_access(w, a, op, budget);
	case GUEST_OP_INVLPG:
		do_invlpg(w, op);
		return WALK_DONE;
	case GUEST_OP_INVPCID:
		do_invpcid(w, op);
		return WALK_DONE;
	case GUEST_OP_MOV_CR3:
		do_mov_cr3(w, op);
		return WALK_DONE;
	case GUEST_OP_MAP:
		return do_map(w, op);
	case GUEST_OP_UNMAP:
		return take_away(w, op, UINT64_MAX);
	case GUEST_OP_PROTECT:
		return take_away(w, op, GPTE_WRITABLE);
	case GUEST_OP_SIGNAL:
		signal_add(w->m, (uint32_t)op->value, 1);
		return WALK_DONE;
	default:
		return WALK_DONE;
	}
}

uint32_t program_step(struct walk *w, struct accesses *a, uint64_t *budget)
{
	struct program *p = w->guest->program;
	const struct guest_op *op = &p->ops[p->position];
	enum walk_result r;

	if (p->position == p->count)
		return EXIT_PROGRAM_END;
	if (!*budget)
		return EXIT_PREEMPTION_TIMER;
	chaos_point(w->m, w->cpu->id);
	if (op->kind == GUEST_OP_WAIT && signal_get(w->m, (uint32_t)op->linear) < op->value) {
		wait_a_little(w, op);
		return EXIT_REASONS;
	}
	r = one(w, a, op, budget);
	if (r == WALK_EXIT)
		return EXIT_EPT_VIOLATION;
	if (r == WALK_GUEST_FAULT)
		return EXIT_TRIPLE_FAULT;
	p->position++;
	if (op->kind == GUEST_OP_HLT)
		return EXIT_HLT;
	if (op->kind != GUEST_OP_EXIT)
		return EXIT_REASONS;
	w->exit->linear = op->value;
	return EXIT_PROGRAM;
}
