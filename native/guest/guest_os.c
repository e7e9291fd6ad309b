/* The guest OS: demand paging, reclaim, and the events by its clock: context switches, unmapping and write protection
 * (guest_mapping.h). */
#include "guest/guest_os.h"

#include "core/counters.h"
#include "core/cpu_types.h"
#include "core/events.h"
#include "core/machine_types.h"
#include "guest/access.h"
#include "guest/guest.h"
#include "guest/guest_batch.h"
#include "guest/guest_mapping.h"
#include "guest/guest_shadow.h"
#include "guest/guest_tables.h"
#include "tlb/tlb.h"
#include "tlb/tlb_flush.h"
#include "vm/guest_state.h"
#include "vm/vm.h"
#include "walk/context.h"
#include "walk/vmcs.h"
#include "walk/walk.h"

enum {
	FLUSHING_SWITCH_ONE_IN = 16,
	INVPCID_ALL_ONE_IN = 64,
	CHANGE_KERNEL_EVERY = 61, /* uses of a kernel page; no multiple of GUEST_KERNEL_PAGES, so that each has its turn */
	CHANGE_KERNEL_OFTEN = 13,
};

void os_load_cr3(struct walk *w)
{
	guest_write_cr3(w->guest);
	hw_load_context(w, w->vmcs);
}

enum walk_result os_setup(struct walk *w)
{
	struct guest_process *p = guest_current(w->guest);
	enum walk_result r;

	if (!w->guest->config.paging || p->cr3_gfn != GUEST_NO_GFN)
		return WALK_DONE;
	if (!w->vmcs->ept)
		return os_new_pml4(w, p);
	r = os_alloc_zeroed(w, false, &p->cr3_gfn);
	if (r == WALK_DONE)
		guest_write_cr3(w->guest);
	return r;
}

/* Find a mapped page, wherever it is: a process may have unmapped more in a row than one search tries. */
static uint64_t find_victim(struct guest_process *p)
{
	uint64_t at = p->page_count;

	for (uint64_t tried = 0; at == p->page_count && tried < p->page_count; tried += LOOK_FOR_PAGE)
		at = os_find_mapped(p, false);
	return at;
}

/* Choose a mapped page of any process.  False: there is none. */
static bool choose_victim(struct guest *g, struct guest_choices *c)
{
	uint64_t start = guest_random(g);

	for (uint32_t i = 0; i < g->processes; i++) {
		c->reclaimed_from = (uint32_t)((start + i) % g->processes);
		c->reclaimed = find_victim(&g->process[c->reclaimed_from]);
		if (c->reclaimed != g->process[c->reclaimed_from].page_count)
			return true;
	}
	return false;
}

/* os_reclaim() for an OS that gathers changes: the pages are free once all vCPUs have invalidated them, and until then the
 * vCPU has to wait, outside of the OS. */
static enum walk_result reclaim_later(struct walk *w)
{
	struct guest_choices *c = &w->guest->choices;
	struct guest_process *p;

	os_batch_reap(w->guest);
	if (!os_batch_flush(w)) {
		if (!choose_victim(w->guest, c))
			return WALK_GUEST_FAULT;
		p = &w->guest->process[c->reclaimed_from];
		if (os_change(w, c->reclaimed_from, p->pages[c->reclaimed], true) == WALK_EXIT)
			return WALK_EXIT;
	}
	w->exit->reason = EXIT_REASONS;
	return WALK_EXIT;
}

enum walk_result os_reclaim(struct walk *w)
{
	struct guest_choices *c = &w->guest->choices;
	struct guest_process *p;
	enum walk_result r;

	if (os_batches(w))
		return reclaim_later(w);
	p = &w->guest->process[c->reclaimed_from];
	if (!c->reclaiming || !guest_page_mapped(&p->page[c->reclaimed])) {
		if (!choose_victim(w->guest, c))
			return WALK_GUEST_FAULT;
		p = &w->guest->process[c->reclaimed_from];
	}
	r = os_unmap(w, p, p->pages[c->reclaimed], &p->page[c->reclaimed]);
	/* Without EPT, finish it after the VM exit. */
	c->reclaiming = r == WALK_EXIT && !w->vmcs->ept;
	return r;
}

enum walk_result os_page_fault(struct walk *w, uint64_t page, uint32_t type)
{
	struct guest *g = w->guest;
	struct guest_process *p = guest_current(w->guest);
	struct guest_page *gp = guest_page_find(g, g->current, page);
	struct guest_mapping now;
	enum walk_result r;

	/* Without EPT the fault exited, and has done so then. */
	if (w->vmcs->ept)
		page_fault_invalidate(w->tlb, page);
	count(w->cpu->counters, COUNT_GUEST_FAULTS, 1);
	/* This OS writes tables of 4-level paging only. */
	if (!gp || g->tables != GUEST_TABLES_64)
		return WALK_GUEST_FAULT;
	now = guest_mapping_of(gp);
	if (now.gfn == (uint32_t)GUEST_NO_GFN) {
		r = os_map(w, p, page, gp);
		for (int i = 0; r == WALK_GUEST_FAULT && i < RECLAIM_TRIES; i++) {
			r = os_reclaim(w);
			if (r == WALK_DONE)
				r = os_map(w, p, page, gp);
		}
		return r;
	}
	if (type == ACCESS_WRITE && !now.writable) {
		now.writable = true;
		/* As in map_for_all(). */
		if (os_batches(w))
			os_map_pages(p, page, gp, now);
		r = os_install(w, p, page, now);
		if (r == WALK_DONE)
			os_map_pages(p, page, gp, now);
		return r;
	}
	/* The entry contradicts the OS's records: the host lost the table's contents, or the entry is still to be written, or
	 * another vCPU has written it since the fault. */
	return os_install(w, p, page, now);
}

/* Do one access to a global kernel page; now and then the kernel changes one of them. */
static enum walk_result touch_kernel(struct walk *w)
{
	struct guest *g = w->guest;
	uint32_t i = g->kernel_next % GUEST_KERNEL_PAGES;
	uint64_t page = GUEST_KERNEL_BASE + i;
	uint32_t every = os_batches(w) ? CHANGE_KERNEL_OFTEN : CHANGE_KERNEL_EVERY;
	enum walk_result r = WALK_DONE;

	if (g->kernel_next % every == every - 1 && guest_page_mapped(&g->leader->kernel[i]))
		r = os_batches(w) ? os_change(w, g->current, page, true)
				  : os_unmap(w, guest_current(w->guest), page, &g->leader->kernel[i]);
	if (r == WALK_DONE)
		r = guest_access_slow(w, (uint64_t)(g->kernel_next & 1) << 62 | page << 12);
	if (r == WALK_DONE || r == WALK_SKIPPED)
		g->kernel_next++;
	return r;
}

static enum walk_result switch_process(struct walk *w)
{
	struct guest *g = w->guest;
	struct guest_process *p;
	enum walk_result r;

	if (!w->vmcs->ept) {
		r = os_switch_shadowed(w);
		return r == WALK_DONE ? touch_kernel(w) : r;
	}
	g->current = (g->current + 1) % g->processes;
	p = guest_current(w->guest);
	os_load_cr3(w);
	count(w->cpu->counters, COUNT_GUEST_SWITCHES, 1);
	if (!g->config.pcid || guest_random(g) % FLUSHING_SWITCH_ONE_IN == 0) {
		mov_to_cr3(w->tlb, p->pcid);
		count(w->cpu->counters, COUNT_GUEST_INVALIDATIONS, 1);
	}
	if (guest_random(g) % INVPCID_ALL_ONE_IN == 0) {
		invpcid_all(w->tlb);
		count(w->cpu->counters, COUNT_GUEST_INVALIDATIONS, 1);
	}
	os_schedule(g, GUEST_SWITCH);
	r = os_setup(w);
	return r == WALK_DONE ? touch_kernel(w) : r;
}

static enum walk_result unmap_some(struct walk *w, struct guest_process *p)
{
	uint64_t hand = p->hand, at = os_find_mapped(p, false);
	enum walk_result r;

	if (at == p->page_count)
		return WALK_DONE;
	if (os_batches(w))
		return os_change(w, (uint32_t)(p - w->guest->process), p->pages[at], true);
	r = os_unmap(w, p, p->pages[at], &p->page[at]);
	if (r == WALK_EXIT)
		p->hand = hand; /* retry this page after the exit */
	return r;
}

static enum walk_result unmap_event(struct walk *w)
{
	struct guest *g = w->guest;
	/* Mostly the current process; an OS also reclaims pages from processes that do not run. */
	struct guest_process *p = guest_random(g) % 4 || !g->config.pcid ?
					  guest_current(w->guest) : &g->process[guest_random(g) % g->processes];
	enum walk_result r;

	if (p->cr3_gfn == GUEST_NO_GFN)
		p = guest_current(w->guest);
	r = unmap_some(w, p);
	if (r != WALK_EXIT || os_batches(w))
		os_schedule(g, GUEST_UNMAP);
	return r;
}

static enum walk_result protect_event(struct walk *w)
{
	struct guest_process *p = guest_current(w->guest);
	uint64_t hand = p->hand, at = os_find_mapped(p, true);
	enum walk_result r = WALK_DONE;

	if (at != p->page_count)
		r = os_batches(w) ? os_change(w, w->guest->current, p->pages[at], false)
				  : os_protect(w, p, p->pages[at], &p->page[at]);
	if (r == WALK_EXIT && !os_batches(w))
		p->hand = hand;
	else
		os_schedule(w->guest, GUEST_PROTECT);
	return r;
}

/* Free a table below which a page of any process is mapped. */
static enum walk_result table_event(struct walk *w)
{
	struct guest *g = w->guest;
	uint32_t process = (uint32_t)(guest_random(g) % g->processes);
	struct guest_process *p = &g->process[process];
	uint64_t at = os_find_mapped(p, false);
	enum walk_result r = WALK_DONE;

	if (os_batches(w) && at != p->page_count)
		r = os_drop_table(w, process, p->pages[at]);
	os_schedule(g, GUEST_TABLE);
	return r;
}

enum walk_result os_events(struct walk *w)
{
	struct guest *g = w->guest;
	enum walk_result r = WALK_DONE;

	if (!g->config.paging || !g->processes)
		return r;
	if (g->choices.invpcid_all) {
		r = guest_exit_invpcid(w, 2, 0, 0);
		if (r != WALK_DONE)
			return r;
		g->choices.invpcid_all = false;
	}
	if (g->clock >= g->due[GUEST_SWITCH])
		r = switch_process(w);
	if (r != WALK_EXIT && g->clock >= g->due[GUEST_UNMAP])
		r = unmap_event(w);
	if (r != WALK_EXIT && g->clock >= g->due[GUEST_PROTECT])
		r = protect_event(w);
	if (r != WALK_EXIT && g->clock >= g->due[GUEST_TABLE])
		r = table_event(w);
	return r;
}
