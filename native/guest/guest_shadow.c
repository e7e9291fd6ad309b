/* See guest_shadow.h. */
#include "guest/guest_shadow.h"

#include "core/counters.h"
#include "core/cpu_types.h"
#include "core/machine_types.h"
#include "guest/guest.h"
#include "guest/guest_batch.h"
#include "guest/guest_flush.h"
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

/* The entry that leads to the kernel's tables has A and D from the start, as Linux's _KERNPG_TABLE: KVM has no flag to set
 * there when it walks to the map of memory.  Where the host forbids the store, KVM injects a page fault instead
 * (walk_addr_generic()), and an OS that faults on its own map of memory cannot go on. */
#define KERNEL_TABLE (GPTE_PRESENT | GPTE_WRITABLE | GPTE_USER | GPTE_ACCESSED | GPTE_DIRTY)

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

bool os_has_tables(struct guest *g, uint32_t process)
{
	g->process[process].cr3_gfn = g->leader->process[process].cr3_gfn;
	return g->process[process].cr3_gfn != GUEST_NO_GFN;
}

/* Entry 0 leads to the kernel's own pages; the others map all guest memory. */
static enum walk_result map_memory(struct walk *w, uint64_t pdpt)
{
	uint64_t gfns = w->m->vms[w->vcpu->vm].gfns, gigabyte = UINT64_C(1) << 18;
	uint64_t bits = GPTE_PRESENT | GPTE_WRITABLE | GPTE_ACCESSED | GPTE_DIRTY | GPTE_PAGE_SIZE | GPTE_GLOBAL;
	enum walk_result r = WALK_DONE;

	for (uint32_t i = 0; i < MAPPED_GIGABYTES && i * gigabyte < gfns && r == WALK_DONE; i++)
		r = os_write_entry(w, pdpt, 1 + i, i * gigabyte << 12 | bits);
	return r;
}

/* Build the table for the kernel's part of an address space, in `pdpt` unless that has one already. */
static enum walk_result new_kernel_pdpt(struct walk *w, uint64_t *pdpt)
{
	enum walk_result r = WALK_DONE;

	if (*pdpt == GUEST_NO_GFN)
		r = os_alloc_zeroed(w, false, pdpt);
	return r == WALK_DONE ? map_memory(w, *pdpt) : r;
}

bool os_own_kernel(const struct walk *w)
{
	return os_batches(w) && w->guest->leader->config.own_kernel;
}

enum walk_result os_new_pml4(struct walk *w, struct guest_process *own)
{
	struct guest *leader = w->guest->leader;
	uint32_t process = (uint32_t)(own - w->guest->process);
	struct guest_process *p = &leader->process[process];
	enum walk_result r = WALK_DONE;
	uint64_t pdpt;

	if (os_has_tables(w->guest, process))
		return r;
	if (os_own_kernel(w))
		r = new_kernel_pdpt(w, &p->pdpt_building);
	if (r == WALK_DONE && p->cr3_building == GUEST_NO_GFN)
		r = os_alloc_zeroed(w, false, &p->cr3_building);
	if (r != WALK_DONE)
		return r;
	pdpt = os_own_kernel(w) ? p->pdpt_building : leader->kernel_pdpt;
	r = os_write_entry(w, p->cr3_building, KERNEL_ENTRY, pdpt << 12 | KERNEL_TABLE);
	if (r != WALK_DONE)
		return r;
	own->cr3_gfn = p->cr3_gfn = p->cr3_building;
	p->cr3_building = p->pdpt_building = GUEST_NO_GFN;
	return r;
}

enum walk_result os_boot_tables(struct walk *w)
{
	struct guest *g = w->guest;
	enum walk_result r = WALK_DONE;

	if (!os_own_kernel(w))
		r = new_kernel_pdpt(w, &g->leader->kernel_pdpt);
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

uint64_t os_cr4_of(const struct guest *g, bool pge)
{
	return CR4_PAE | (pge ? CR4_PGE : 0) | (g->config.pcid ? CR4_PCIDE : 0);
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
	if (!(cr3 & CR3_NOFLUSH))
		os_process_flushed(w, process);
	hw_load_context(w, w->vmcs);
}

/* Return the process to switch to: the next one, or any if the OS gathers changes. */
static uint32_t next_process(struct walk *w)
{
	struct guest *g = w->guest;

	if (!g->choices.switching)
		g->choices.next = os_batches(w) ? (uint32_t)(guest_random(g) % g->processes)
						: (g->current + 1) % g->processes;
	g->choices.switching = true;
	return g->choices.next;
}

enum walk_result os_switch_shadowed(struct walk *w)
{
	struct guest *g = w->guest;
	uint32_t next = next_process(w);
	struct guest_process *p = &g->process[next];
	enum walk_result r = os_new_pml4(w, p);

	for (int i = 0; r == WALK_GUEST_FAULT && i < RECLAIM_TRIES; i++) {
		r = os_reclaim(w);
		if (r == WALK_DONE)
			r = os_new_pml4(w, p);
	}
	/* It has to wait for memory until all vCPUs have invalidated what is reclaimed. */
	if (r == WALK_EXIT && w->exit->reason == EXIT_REASONS)
		os_schedule(g, GUEST_SWITCH);
	/* Without memory for its tables, the process has to wait. */
	if (r == WALK_GUEST_FAULT)
		os_schedule(g, GUEST_SWITCH);
	if (r != WALK_DONE)
		return r;
	if (!g->choices.cr3)
		g->choices.cr3 = os_cr3_of(p, g->config.pcid && guest_random(g) % FLUSHING_SWITCH_ONE_IN &&
						      !(g->stale >> next & 1));
	r = guest_exit_insn(w, GUEST_INSN_MOV_CR3, g->choices.cr3);
	if (r != WALK_DONE)
		return r;
	os_cr3_written(w, next, g->choices.cr3);
	g->choices.switching = false;
	g->choices.cr3 = 0;
	g->choices.invpcid_all = guest_random(g) % INVPCID_ALL_ONE_IN == 0;
	os_schedule(g, GUEST_SWITCH);
	return WALK_DONE;
}

void os_choices_reset(struct guest *g)
{
	struct guest_batch *b = &g->batch;

	g->choices = (struct guest_choices){ .table = GUEST_NO_GFN };
	g->flush = (struct guest_flush){ .under_way = false };
	g->stale = 0;
	/* Relaxed: the only vCPU of this OS resets. */
	g->settled = atomic_load_explicit(&b->number, memory_order_relaxed);
	if (g->settled)
		atomic_store_explicit(&b->number, g->settled + 1, memory_order_relaxed);
	atomic_store_explicit(&b->changes, 0, memory_order_relaxed);
	atomic_store_explicit(&b->written, 0, memory_order_relaxed);
	atomic_store_explicit(&g->os_lock, 0, memory_order_relaxed);
	g->exit_insn.exited = g->injected.pending = g->store.faulted = g->store.done = false;
	for (uint32_t i = 0; i < GUEST_PROCESSES; i++)
		g->process[i].cr3_building = g->process[i].pdpt_building = GUEST_NO_GFN;
}
