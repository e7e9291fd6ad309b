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
#include "guest/guest_shadow.h"
#include "guest/guest_tables.h"
#include "sync/cpu.h"
#include "tlb/tlb_flush.h"
#include "vm/guest_state.h"
#include "vm/vm.h"
#include "walk/vmcs.h"
#include "walk/walk.h"

enum {
	SPINS_IN_GUEST = 256,
	WAIT_NANOSECONDS = 20000,
};

/* The entry that an operation changes.  Without EPT KVM may have emulated the store when the operation is repeated. */
struct found {
	bool kept;
	uint64_t table;
	uint64_t entry;
};

struct program {
	struct guest_op *ops;
	uint32_t count;
	uint32_t position;
	struct found found; /* by the operation under way, before a VM exit at its store */
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
	heap_free(m->heap, g->change);
	g->program = NULL;
	g->change = NULL;
	g->changes = 0;
}

/* Make room for a change by each of n operations, besides those that are not invalidated yet.  An operation that a VM
 * exit interrupts notes its change once, when it is complete. */
static int changes_reserve(struct machine *m, struct guest *g, uint32_t n)
{
	struct guest_change *more = heap_zalloc(m->heap, g->changes + (size_t)n + 1, sizeof(*more));

	if (!more)
		return MACHINE_NOMEM;
	if (g->changes)
		memcpy(more, g->change, g->changes * sizeof(*more));
	heap_free(m->heap, g->change);
	g->change = more;
	return 0;
}

int guest_set_program(struct machine *m, uint32_t vcpu, const struct guest_op *ops, uint32_t n)
{
	struct guest *g = m->vcpus[vcpu].guest;
	struct guest_op *copy = heap_zalloc(m->heap, n + 1ul, sizeof(*ops));

	if (!g->program)
		g->program = heap_zalloc(m->heap, 1, sizeof(*g->program));
	if (!copy || !g->program || changes_reserve(m, g, n)) {
		heap_free(m->heap, copy);
		return MACHINE_NOMEM;
	}
	memcpy(copy, ops, n * sizeof(*ops));
	heap_free(m->heap, g->program->ops);
	g->program->ops = copy;
	g->program->count = n;
	g->program->position = 0;
	g->program->found.kept = false;
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
	struct guest *g = w->guest;

	if (gp->gfn == (uint32_t)GUEST_NO_GFN)
		return;
	g->change[g->changes++] = (struct guest_change){
		.page = page, .process = g->current, .gfn = gp->gfn, .all = all, .global = global
	};
}

/* The guest has invalidated it: from here on the old translation is stale, and each use of it asks the oracle. */
static void settle(struct walk *w, const struct guest_change *change)
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

static void settle_covered(struct walk *w, struct covered what)
{
	struct guest *g = w->guest;
	uint32_t left = 0;

	for (uint32_t i = 0; i < g->changes; i++) {
		const struct guest_change *change = &g->change[i];
		bool process = what.any_process || change->process == what.process ||
			       (change->global && what.globals);

		if ((what.any_page || change->page == what.page) && process && (!change->global || what.globals))
			settle(w, change);
		else
			g->change[left++] = *change;
	}
	g->changes = left;
}

static void invalidated(struct walk *w, struct covered what)
{
	settle_covered(w, what);
	count(w->cpu->counters, COUNT_GUEST_INVALIDATIONS, 1);
	event_record(w->m, w->cpu->id, event_of(w->vcpu->vm, EVENT_GUEST_INVALIDATE), w->vcpu->id,
		     what.any_page ? UINT64_MAX : what.page);
}

void guest_invalidates_all(struct machine *m, uint32_t vcpu)
{
	struct walk w = { .m = m, .vcpu = &m->vcpus[vcpu], .guest = m->vcpus[vcpu].guest };

	settle_covered(&w, (struct covered){ .any_page = true, .any_process = true, .globals = true });
}

void guest_invalidates_pcid(struct machine *m, uint32_t vcpu)
{
	struct walk w = { .m = m, .vcpu = &m->vcpus[vcpu], .guest = m->vcpus[vcpu].guest };

	settle_covered(&w, (struct covered){ .process = w.guest->current, .any_page = true, .globals = true,
					     .any_process = !w.guest->config.pcid });
}

static uint32_t pcid_of(const struct guest *g, uint64_t process)
{
	return process < g->processes ? g->process[process].pcid : 0;
}

static enum walk_result do_invlpg(struct walk *w, const struct guest_op *op)
{
	uint64_t page = op->linear >> 12 & GUEST_PAGE_MASK;
	enum walk_result r = WALK_DONE;

	if (w->vmcs->ept)
		invlpg(w->tlb, page);
	else
		r = guest_exit_insn(w, GUEST_INSN_INVLPG, canonical_address(page << 12));
	if (r != WALK_DONE)
		return r;
	invalidated(w, (struct covered){ .page = page, .process = w->guest->current, .globals = true,
					 .any_process = !w->guest->config.pcid });
	return r;
}

/* SDM vol. 2A, INVPCID: types. */
static enum walk_result do_invpcid(struct walk *w, const struct guest_op *op)
{
	uint64_t page = op->linear >> 12 & GUEST_PAGE_MASK;
	uint32_t pcid = pcid_of(w->guest, op->value);
	struct covered what = { .page = page, .process = (uint32_t)op->value, .any_page = op->flags > 0,
				.any_process = op->flags >= 2 || !w->guest->config.pcid,
				.globals = op->flags == 2 };
	enum walk_result r = WALK_DONE;

	if (!w->vmcs->ept)
		r = guest_exit_invpcid(w, op->flags, pcid, page << 12);
	else if (op->flags == 0)
		invpcid_address(w->tlb, pcid, page);
	else if (op->flags == 1)
		invpcid_single(w->tlb, pcid);
	else if (op->flags == 2)
		invpcid_all(w->tlb);
	else
		invpcid_retain_globals(w->tlb);
	if (r == WALK_DONE)
		invalidated(w, what);
	return r;
}

static void flushed_by_cr3(struct walk *w)
{
	struct guest *g = w->guest;

	invalidated(w, (struct covered){ .process = g->current, .any_page = true, .any_process = !g->config.pcid });
}

/* do_mov_cr3() without EPT, where it exits. */
static enum walk_result exit_by_cr3(struct walk *w, const struct guest_op *op)
{
	struct guest *g = w->guest;
	uint32_t next = op->value < g->processes ? (uint32_t)op->value : g->current;
	bool noflush = op->flags & GUEST_OP_NOFLUSH && g->config.pcid;
	enum walk_result r = os_new_pml4(w, &g->process[next]);
	uint64_t cr3 = os_cr3_of(&g->process[next], noflush);

	if (r == WALK_DONE)
		r = guest_exit_insn(w, GUEST_INSN_MOV_CR3, cr3);
	if (r != WALK_DONE)
		return r;
	os_cr3_written(w, next, cr3);
	if (!noflush)
		flushed_by_cr3(w);
	return r;
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
	flushed_by_cr3(w);
}

/* --- page tables -------------------------------------------------------------------------------------------- */

static uint64_t entry_value(const struct guest_op *op)
{
	return op->value << 12 | GPTE_PRESENT | GPTE_USER |
	       (op->flags & GUEST_OP_READ_ONLY ? 0 : GPTE_WRITABLE) |
	       (op->flags & GUEST_OP_GLOBAL ? GPTE_GLOBAL : 0) |
	       (op->flags & GUEST_OP_HUGE ? GPTE_PAGE_SIZE : 0) |
	       (op->flags & GUEST_OP_DIRTY ? GPTE_ACCESSED | GPTE_DIRTY : 0);
}

static enum walk_result find_entry(struct walk *w, uint64_t page, uint32_t level, bool create, struct found *f)
{
	struct guest *g = w->guest;

	*f = g->program->found;
	if (f->kept)
		return WALK_DONE;
	return os_find_table(w, &g->process[g->current], page, level, create, &f->table, &f->entry);
}

static enum walk_result write_found(struct walk *w, uint64_t page, uint32_t level, struct found *f, uint64_t value)
{
	enum walk_result r = os_write_entry(w, f->table, page >> (level - 1) * 9 & 511, value);

	f->kept = r == WALK_EXIT && !w->vmcs->ept;
	w->guest->program->found = *f;
	return r;
}

static enum walk_result do_map(struct walk *w, const struct guest_op *op)
{
	struct guest *g = w->guest;
	uint64_t page = op->linear >> 12 & GUEST_PAGE_MASK;
	uint32_t level = op->flags & GUEST_OP_HUGE ? 2 : 1;
	struct guest_page *gp = guest_page_find(g, g->current, page);
	struct found f;
	enum walk_result r = find_entry(w, page, level, true, &f);

	if (r == WALK_DONE)
		r = write_found(w, page, level, &f, entry_value(op));
	if (r != WALK_DONE || !gp)
		return r;
	note_change(w, page, gp, true, f.entry & GPTE_GLOBAL);
	gp->gfn = (uint32_t)op->value;
	gp->writable = !(op->flags & GUEST_OP_READ_ONLY);
	return r;
}

/* UNMAP and PROTECT: clear bits of the entry.  If nothing is mapped there, nothing is to be done. */
static enum walk_result take_away(struct walk *w, const struct guest_op *op, uint64_t bits)
{
	struct guest *g = w->guest;
	uint64_t page = op->linear >> 12 & GUEST_PAGE_MASK;
	struct guest_page *gp = guest_page_find(g, g->current, page);
	struct found f;
	enum walk_result r = find_entry(w, page, 1, false, &f);

	if (r == WALK_GUEST_FAULT)
		return WALK_DONE;
	if (r == WALK_DONE)
		r = write_found(w, page, f.entry & GPTE_PAGE_SIZE ? 2 : 1, &f, f.entry & ~bits);
	if (r != WALK_DONE || !gp)
		return r;
	note_change(w, page, gp, bits != GPTE_WRITABLE, f.entry & GPTE_GLOBAL);
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

/* Return whether KVM has emulated this store. */
static bool emulated(struct walk *w, uint64_t record)
{
	struct guest_store *store = &w->guest->store;
	bool done = store->done && record_stores_to(record, store->linear);

	store->done = false;
	return done;
}

static enum walk_result do_access(struct walk *w, struct accesses *a, const struct guest_op *op, uint64_t *budget)
{
	uint64_t record = (uint64_t)op->kind << 62 | (op->linear & UINT64_C(0xffffffffffff));
	enum walk_result r = emulated(w, record) ? WALK_DONE : accesses_one(w, record);

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
		return do_invlpg(w, op);
	case GUEST_OP_INVPCID:
		return do_invpcid(w, op);
	case GUEST_OP_MOV_CR3:
		if (!w->vmcs->ept)
			return exit_by_cr3(w, op);
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
		return w->exit->reason;
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
