/* See guest_shadow.h. */
#include "guest/guest_shadow.h"

#include "core/counters.h"
#include "core/cpu_types.h"
#include "core/machine_types.h"
#include "guest/guest.h"
#include "guest/guest_os.h"
#include "guest/guest_tables.h"
#include "vm/guest_state.h"
#include "vm/vm.h"
#include "walk/context.h"
#include "walk/walk.h"

enum {
	FLUSHING_SWITCH_ONE_IN = 16,
	INVPCID_ALL_ONE_IN = 64,
	KERNEL_ENTRY = GUEST_KERNEL_BASE >> 27, /* in a PML4 table */
	MAPPED_GIGABYTES = 511,
};

/* --- exits -------------------------------------------------------------------------------------------------- */

static enum walk_result exit_once(struct walk *w, const struct guest_exit_insn *i)
{
	struct guest_exit_insn *last = &w->guest->exit_insn;

	if (last->exited && last->insn == i->insn && last->type == i->type && last->operand == i->operand &&
	    last->pcid == i->pcid && last->clock == w->guest->clock) {
		last->exited = false;
		return WALK_DONE;
	}
	*last = *i;
	last->clock = w->guest->clock;
	last->exited = true;
	w->exit->reason = EXIT_INSTRUCTION;
	w->exit->access = i->insn;
	w->exit->linear = i->operand;
	w->exit->invpcid_type = i->type;
	w->exit->invpcid_pcid = i->pcid;
	return WALK_EXIT;
}

enum walk_result guest_exit_insn(struct walk *w, enum guest_insn insn, uint64_t operand)
{
	return exit_once(w, &(struct guest_exit_insn){ .insn = insn, .operand = operand });
}

enum walk_result guest_exit_invpcid(struct walk *w, uint32_t type, uint64_t pcid, uint64_t linear)
{
	return exit_once(w, &(struct guest_exit_insn){ .insn = GUEST_INSN_INVPCID, .type = type,
						       .operand = canonical_address(linear), .pcid = pcid });
}

enum walk_result os_injected_fault(struct walk *w)
{
	struct guest_fault *fault = &w->guest->injected;
	uint32_t type = fault->error_code & PFERR_WRITE   ? ACCESS_WRITE
			: fault->error_code & PFERR_FETCH ? ACCESS_EXECUTE
							  : ACCESS_READ;
	enum walk_result r = os_page_fault(w, fault->linear >> 12 & GUEST_PAGE_MASK, type);

	fault->pending = r == WALK_EXIT;
	return r;
}

/* --- tables ------------------------------------------------------------------------------------------------- */

enum walk_result os_spare_table(struct walk *w, uint64_t *gfn)
{
	uint64_t *spare = &w->guest->choices.table;
	enum walk_result r = *spare == GUEST_NO_GFN ? os_alloc_zeroed(w, false, spare) : os_zero_page(w, *spare);

	*gfn = *spare;
	return r;
}

void os_table_linked(struct guest *g, uint64_t gfn)
{
	if (g->choices.table == gfn)
		g->choices.table = GUEST_NO_GFN;
}

enum walk_result os_new_pml4(struct walk *w, struct guest_process *p)
{
	uint64_t kernel = w->guest->kernel_pdpt << 12 | GPTE_PRESENT | GPTE_WRITABLE | GPTE_USER;
	enum walk_result r = WALK_DONE;

	if (p->cr3_gfn != GUEST_NO_GFN)
		return r;
	if (p->cr3_building == GUEST_NO_GFN)
		r = os_alloc_zeroed(w, false, &p->cr3_building);
	if (r == WALK_DONE)
		r = os_write_entry(w, p->cr3_building, KERNEL_ENTRY, kernel);
	if (r != WALK_DONE)
		return r;
	p->cr3_gfn = p->cr3_building;
	p->cr3_building = GUEST_NO_GFN;
	return r;
}

/* Entry 0 leads to the kernel's own pages; the others map all guest memory. */
static enum walk_result map_memory(struct walk *w)
{
	uint64_t gfns = w->m->vms[w->vcpu->vm].gfns, gigabyte = UINT64_C(1) << 18;
	uint64_t bits = GPTE_PRESENT | GPTE_WRITABLE | GPTE_ACCESSED | GPTE_DIRTY | GPTE_PAGE_SIZE | GPTE_GLOBAL;
	enum walk_result r = WALK_DONE;

	for (uint32_t i = 0; i < MAPPED_GIGABYTES && i * gigabyte < gfns && r == WALK_DONE; i++)
		r = os_write_entry(w, w->guest->kernel_pdpt, 1 + i, i * gigabyte << 12 | bits);
	return r;
}

enum walk_result os_boot_tables(struct walk *w)
{
	struct guest *g = w->guest;
	enum walk_result r = WALK_DONE;

	if (g->kernel_pdpt == GUEST_NO_GFN)
		r = os_alloc_zeroed(w, false, &g->kernel_pdpt);
	if (r == WALK_DONE)
		r = map_memory(w);
	if (r == WALK_DONE)
		r = os_new_pml4(w, &g->process[g->current]);
	if (r == WALK_DONE)
		guest_write_cr3(g);
	return r;
}

/* --- address spaces ----------------------------------------------------------------------------------------- */

uint64_t os_cr3_of(const struct guest_process *p, bool noflush)
{
	return p->cr3_gfn << 12 | p->pcid | (noflush ? CR3_NOFLUSH : 0);
}

void os_cr3_written(struct walk *w, uint32_t process, uint64_t cr3)
{
	struct guest *g = w->guest;

	g->current = process;
	guest_write_cr3(g);
	count(w->cpu->counters, COUNT_GUEST_SWITCHES, 1);
	count(w->cpu->counters, COUNT_GUEST_INVALIDATIONS, !(cr3 & CR3_NOFLUSH));
	if (!g->config.pcid)
		g->space++;
	hw_load_context(w, w->vmcs);
}

enum walk_result os_switch_shadowed(struct walk *w)
{
	struct guest *g = w->guest;
	uint32_t next = (g->current + 1) % g->processes;
	struct guest_process *p = &g->process[next];
	enum walk_result r = os_new_pml4(w, p);

	for (int i = 0; r == WALK_GUEST_FAULT && i < RECLAIM_TRIES; i++) {
		r = os_reclaim(w);
		if (r == WALK_DONE)
			r = os_new_pml4(w, p);
	}
	/* Without memory for its tables, the process has to wait. */
	if (r == WALK_GUEST_FAULT)
		os_schedule(g, GUEST_SWITCH);
	if (r != WALK_DONE)
		return r;
	if (!g->choices.cr3)
		g->choices.cr3 = os_cr3_of(p, g->config.pcid && guest_random(g) % FLUSHING_SWITCH_ONE_IN);
	r = guest_exit_insn(w, GUEST_INSN_MOV_CR3, g->choices.cr3);
	if (r != WALK_DONE)
		return r;
	os_cr3_written(w, next, g->choices.cr3);
	g->choices.cr3 = 0;
	g->choices.invpcid_all = guest_random(g) % INVPCID_ALL_ONE_IN == 0;
	os_schedule(g, GUEST_SWITCH);
	return WALK_DONE;
}

void os_choices_reset(struct guest *g)
{
	g->choices = (struct guest_choices){ .table = GUEST_NO_GFN };
	g->exit_insn.exited = g->injected.pending = g->store.faulted = g->store.done = false;
	for (uint32_t i = 0; i < GUEST_PROCESSES; i++)
		g->process[i].cr3_building = GUEST_NO_GFN;
}
