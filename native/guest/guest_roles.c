/* See guest_roles.h. */
#include "guest/guest_roles.h"

#include "core/counters.h"
#include "core/cpu_types.h"
#include "guest/access.h"
#include "guest/guest.h"
#include "guest/guest_insn.h"
#include "guest/guest_mapping.h"
#include "guest/guest_shadow.h"
#include "vm/guest_state.h"
#include "walk/vmcs.h"
#include "walk/walk.h"

enum { ROLE_WRITES = 4 };

/* A write to a control register; without an instruction: the window is over. */
struct write {
	uint32_t insn;
	uint64_t operand;
};

/* Return write number `step` of the window.  CR4.PCIDE can be set only while the PCID in CR3 is 0 (SDM vol. 3A, 4.10.1),
 * hence the MOVs to CR3 around it. */
static struct write write_of(const struct guest *g, enum guest_event window, uint32_t step)
{
	const struct guest_process *p = &g->process[g->current];
	uint64_t cr0 = CR0_PE | CR0_WP | CR0_PG, cr4 = os_cr4_of(g, true);
	const struct write wp[ROLE_WRITES] = { { GUEST_INSN_MOV_CR0, cr0 & ~CR0_WP }, { GUEST_INSN_MOV_CR0, cr0 } };
	const struct write pg[ROLE_WRITES] = { { GUEST_INSN_MOV_CR0, cr0 & ~CR0_PG }, { GUEST_INSN_MOV_CR0, cr0 } };
	const struct write smep[ROLE_WRITES] = { { GUEST_INSN_MOV_CR4, cr4 | CR4_SMEP }, { GUEST_INSN_MOV_CR4, cr4 } };
	const struct write pcide[ROLE_WRITES] = { { GUEST_INSN_MOV_CR3, p->cr3_gfn << 12 },
						  { GUEST_INSN_MOV_CR4, cr4 & ~CR4_PCIDE },
						  { GUEST_INSN_MOV_CR4, cr4 },
						  { GUEST_INSN_MOV_CR3, os_cr3_of(p, false) } };

	if (step >= ROLE_WRITES)
		return (struct write){ GUEST_INSN_NONE, 0 };
	switch (window) {
	case GUEST_WP:
		return wp[step];
	case GUEST_PG:
		return pg[step];
	case GUEST_SMEP:
		return smep[step];
	default:
		return pcide[step];
	}
}

/* With CR0.WP clear the kernel writes to a page that the tables map read-only. */
static enum walk_result write_read_only(struct walk *w)
{
	struct guest *g = w->guest;
	struct guest_process *p = guest_current(g);
	uint64_t hand = p->hand, at = os_find_read_only(p), record;
	enum walk_result r = WALK_DONE;

	if (at == p->page_count)
		return r;
	record = (uint64_t)ACCESS_WRITE << 62 | p->pages[at] << 12;
	if (!guest_store_emulated(w, record))
		r = guest_access_as_kernel(w, record);
	if (r == WALK_EXIT)
		p->hand = hand; /* the same page after the exit */
	else
		g->clock++;
	return r;
}

/* With CR4.PCIDE clear the OS unmaps a page of a process that is not loaded.  Clearing PCIDE has invalidated its
 * translations, and since then the processor caches none for its PCID (SDM vol. 3A, 4.10.4.1), so the OS invalidates nothing. */
static enum walk_result unmap_uncached(struct walk *w)
{
	struct guest *g = w->guest;
	struct guest_process *p = &g->process[(g->current + 1) % g->processes];
	uint64_t hand = p->hand, at = os_find_mapped(p, false);
	enum walk_result r;

	if (p == guest_current(g) || p->cr3_gfn == GUEST_NO_GFN || at == p->page_count)
		return WALK_DONE;
	r = os_unmap_uncached(w, p, p->pages[at], &p->page[at]);
	if (r == WALK_EXIT)
		p->hand = hand;
	return r;
}

/* Do what the OS has opened the window for, when the bit has changed.  It handles a page fault that this meets, and tries
 * again. */
static enum walk_result window_work(struct walk *w)
{
	struct guest *g = w->guest;
	struct guest_choices *c = &g->choices;
	enum walk_result r = WALK_DONE;

	if (!g->config.window_work || c->window_worked)
		return r;
	if (g->injected.pending)
		r = os_injected_fault(w);
	if (r != WALK_DONE)
		return r;
	if (c->window == GUEST_WP && c->window_step == 1)
		r = write_read_only(w);
	else if (c->window == GUEST_PCIDE && c->window_step == 2)
		r = unmap_uncached(w);
	else
		return r;
	c->window_worked = r != WALK_EXIT;
	return r;
}

uint32_t os_role_step(struct walk *w)
{
	struct guest_choices *c = &w->guest->choices;
	enum walk_result r;
	struct write next;

	if (__builtin_expect(!c->window_step, 1))
		return EXIT_REASONS;
	r = window_work(w);
	if (r == WALK_EXIT)
		return exit_of(w, r);
	next = write_of(w->guest, c->window, c->window_step++);
	if (next.insn != GUEST_INSN_NONE)
		return exit_instruction(w, next.insn, next.operand);
	c->window_step = 0;
	return EXIT_REASONS;
}

uint32_t os_role_begin(struct walk *w)
{
	struct guest *g = w->guest;
	struct write first;

	for (uint32_t i = GUEST_ROLES_FIRST; i <= GUEST_ROLES_LAST; i++) {
		enum guest_event window = (enum guest_event)i;

		if (g->clock < g->due[window])
			continue;
		os_schedule(g, window);
		/* An OS that has not set up its process yet has no CR3 to load. */
		if (w->vmcs->ept || g->process[g->current].cr3_gfn == GUEST_NO_GFN)
			continue;
		count(w->cpu->counters, COUNT_GUEST_ROLE_WINDOWS, 1);
		g->choices.window = window;
		g->choices.window_step = 1;
		g->choices.window_worked = false;
		first = write_of(g, window, 0);
		return exit_instruction(w, first.insn, first.operand);
	}
	return EXIT_REASONS;
}
