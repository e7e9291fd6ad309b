/* See guest_roles.h. */
#include "guest/guest_roles.h"

#include "core/counters.h"
#include "core/cpu_types.h"
#include "guest/guest.h"
#include "guest/guest_insn.h"
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

uint32_t os_role_step(struct walk *w)
{
	struct guest_choices *c = &w->guest->choices;
	struct write next;

	if (__builtin_expect(!c->window_step, 1))
		return EXIT_REASONS;
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
		first = write_of(g, window, 0);
		return exit_instruction(w, first.insn, first.operand);
	}
	return EXIT_REASONS;
}
