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
#include "guest/guest_apic.h"
#include "guest/guest_ept12.h"
#include "guest/guest_fault.h"
#include "guest/guest_mapping.h"
#include "guest/guest_nested.h"
#include "guest/guest_os.h"
#include "guest/guest_shadow.h"
#include "guest/guest_tables.h"
#include "guest/program_changes.h"
#include "guest/program_insn.h"
#include "memory/frame.h"
#include "sync/cpu.h"
#include "tlb/tlb_flush.h"
#include "vm/guest_state.h"
#include "vm/vm.h"
#include "walk/vmcs.h"
#include "walk/walk.h"
#include "walk/walk_shadow.h"

enum {
	SPINS_IN_GUEST = 256,
	WAIT_NANOSECONDS = 20000,
	ENDLESS_NANOSECONDS = 1000000000,
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
	ept12s_destroy(m, g);
	if (g->program)
		heap_free(m->heap, g->program->ops);
	heap_free(m->heap, g->program);
	heap_free(m->heap, g->change);
	g->program = NULL;
	g->change = NULL;
	g->changes = 0;
}

/* All guests of a vCPU execute one program, L1's. */
static int share_program(struct machine *m, const struct vcpu *v, struct program *p, uint32_t n)
{
	int r = 0;

	for (uint32_t i = 0; i <= NESTED_GUESTS && !r; i++) {
		if (!v->guests[i])
			continue;
		v->guests[i]->program = p;
		r = changes_reserve(m, v->guests[i], n);
	}
	return r;
}

int guest_set_program(struct machine *m, uint32_t vcpu, const struct guest_op *ops, uint32_t n)
{
	struct guest *g = m->vcpus[vcpu].guest;
	struct guest_op *copy = heap_zalloc(m->heap, n + 1ul, sizeof(*ops));

	if (!g->program)
		g->program = heap_zalloc(m->heap, 1, sizeof(*g->program));
	if (!copy || !g->program || share_program(m, &m->vcpus[vcpu], g->program, n)) {
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
	struct guest_mapping to = { .gfn = (uint32_t)op->value, .writable = !(op->flags & GUEST_OP_READ_ONLY) };
	struct found f;
	enum walk_result r = find_entry(w, page, level, true, &f);

	if (r == WALK_DONE)
		r = write_found(w, page, level, &f, entry_value(op));
	if (r != WALK_DONE || !gp)
		return r;
	changes_note(g, page, gp, true, f.entry & GPTE_GLOBAL);
	/* A huge page is recorded for each page of it that the guest knows. */
	to.huge = level == 2 || guest_mapping_of(gp).huge;
	if (level == 2)
		os_map_pages(&g->process[g->current], page, gp, to);
	else
		guest_page_map(gp, to);
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
	changes_note(g, page, gp, bits != GPTE_WRITABLE, f.entry & GPTE_GLOBAL);
	if (bits != GPTE_WRITABLE)
		guest_page_unmap(gp);
	else
		guest_page_protect(gp);
	return r;
}

/* --- steps -------------------------------------------------------------------------------------------------- */

/* Return the gfn behind a page to which the guest has just stored. */
static uint64_t stored_to(const struct guest *g, uint64_t page)
{
	const struct guest_page *gp = g->config.paging ? guest_page_find(g, g->current, page) : NULL;

	return gp ? guest_mapping_of(gp).gfn : page;
}

static enum walk_result do_access(struct walk *w, struct accesses *a, const struct guest_op *op, uint64_t *budget)
{
	uint64_t record = (uint64_t)op->kind << 62 | (op->linear & UINT64_C(0xffffffffffff));
	bool is_apic = op->flags & GUEST_OP_APIC;
	enum walk_result r = WALK_DONE;

	if (guest_store_emulated(w, record))
		r = WALK_DONE;
	else if (op->flags & GUEST_OP_SUPERVISOR && !w->vmcs->ept)
		r = guest_access_as_kernel(w, record);
	else
		r = is_apic || w->vmcs->apic_page ? apic_access(w, record, is_apic) : accesses_one(w, record);
	a->polls++;
	a->lookups++;
	a->checks++;
	if (r != WALK_DONE)
		return r;
	if (op->flags & GUEST_OP_FAULTS)
		return WALK_GUEST_FAULT;
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
	/* A signal wakes nobody, but an interrupt does, and that is all that an endless wait waits for. */
	cpu_guest_halt(w->m, w->cpu->id,
		       monotonic_ns() + (op->value == UINT64_MAX ? ENDLESS_NANOSECONDS : WAIT_NANOSECONDS));
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
		return program_invlpg(w, op);
	case GUEST_OP_INVPCID:
		return program_invpcid(w, op);
	case GUEST_OP_MOV_CR3:
		return program_mov_cr3(w, op);
	case GUEST_OP_MAP:
		return do_map(w, op);
	case GUEST_OP_UNMAP:
		return take_away(w, op, UINT64_MAX);
	case GUEST_OP_PROTECT:
		return take_away(w, op, GPTE_WRITABLE);
	case GUEST_OP_STORE:
		return os_write_entry(w, op->linear >> 12, op->linear >> 3 & (FRAME_WORDS - 1), op->value);
	case GUEST_OP_SIGNAL:
		signal_add(w->m, (uint32_t)op->value, 1);
		return WALK_DONE;
	case GUEST_OP_EPT12_MAP:
	case GUEST_OP_EPT12_UNMAP:
	case GUEST_OP_EPT12_PROTECT:
	case GUEST_OP_EPT12_CLEAN:
		return ept12_op(w, op);
	case GUEST_OP_VMX:
		return vmx_prepare(w, op);
	default:
		return WALK_DONE;
	}
}

bool program_takes_fault(struct guest *g)
{
	struct program *p = g->program;
	bool takes = p && p->position < p->count &&
		     p->ops[p->position].kind <= GUEST_OP_EXECUTE && p->ops[p->position].flags & GUEST_OP_FAULTS;

	if (takes)
		p->position++;
	return takes;
}

/* Let L1 handle an exit of its nested guest, and resume it. */
static uint32_t handle_violation(struct walk *w)
{
	enum walk_result r = ept12_violation(w);

	if (r == WALK_DONE)
		vmx_execute(w, &(struct guest_op){ .kind = GUEST_OP_VMX, .flags = GUEST_INSN_VMLAUNCH });
	return r == WALK_EXIT ? w->exit->reason : r == WALK_DONE ? EXIT_INSTRUCTION : EXIT_TRIPLE_FAULT;
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
	if (ept12_violation_pending(w->guest))
		return handle_violation(w);
	if (op->kind == GUEST_OP_WAIT && signal_get(w->m, (uint32_t)op->linear) < op->value) {
		wait_a_little(w, op);
		return EXIT_REASONS;
	}
	r = one(w, a, op, budget);
	if (r == WALK_EXIT) {
		/* KVM emulates the access: the program goes on behind it. */
		p->position += w->exit->reason == EXIT_APIC_ACCESS;
		return w->exit->reason;
	}
	if (r == WALK_GUEST_FAULT)
		return EXIT_TRIPLE_FAULT;
	p->position++;
	if (op->kind == GUEST_OP_HLT)
		return EXIT_HLT;
	if (op->kind == GUEST_OP_VMX) {
		vmx_execute(w, op);
		return EXIT_INSTRUCTION;
	}
	if (op->kind != GUEST_OP_EXIT)
		return EXIT_REASONS;
	w->exit->linear = op->value;
	return EXIT_PROGRAM;
}
