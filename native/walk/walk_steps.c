/* See walk_steps.h. */
#include "walk/walk_steps.h"

#include "core/cpu_types.h"
#include "core/machine_types.h"
#include "oracle/oracle.h"
#include "tlb/psc.h"
#include "vm/guest_state.h"
#include "vm/vm.h"
#include "walk/vmcs.h"

void walk_report_link(struct walk *w, const struct psc_entry *link, uint64_t gfn, uint32_t type, uint32_t kinds)
{
	struct tlb_entry e = { .page = gfn, .gfn = gfn, .hfn = link->hfn, .kind = link->kind,
			       .vm = link->vm, .vcpu = link->vcpu, .clock = link->clock,
			       .custody = link->right & FRAME_TAG_MASK, .ep4ta = w->vmcs->root };
	struct judgement j;

	oracle_judge_table(&j, kinds);
	oracle_violation(w->m, w->cpu, w->vcpu, &e, gfn, type, link->level, w->linear, &j);
}

void walk_report_table(struct walk *w, uint32_t kind, uint32_t table, uint32_t custody, uint64_t gfn, uint32_t level,
		       uint32_t type)
{
	struct psc_entry link = { .hfn = table, .right = custody, .kind = (uint8_t)kind, .level = (uint8_t)level,
				  .vm = w->vcpu->vm, .vcpu = w->vcpu->id, .clock = w->guest->clock };

	walk_report_link(w, &link, gfn, type, 1u << VIOLATION_WALK_AFTER_FREE);
}
