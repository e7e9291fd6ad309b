/* See walk_steps.h. */
#include "walk/walk_steps.h"

#include "core/counters.h"
#include "core/cpu_types.h"
#include "core/machine_types.h"
#include "oracle/oracle.h"
#include "tlb/psc.h"
#include "tlb/tlb_flush.h"
#include "vm/guest_state.h"
#include "vm/vm.h"
#include "walk/vmcs.h"

/* Return the reasons why a cached link may not be used: a bit per violation. */
static uint32_t link_faults(const struct walk *w, const struct psc_entry *link)
{
	uint32_t kinds = 0;

	if (!walk_table_holds(w, link->hfn, link->right & FRAME_TAG_MASK))
		kinds |= 1u << VIOLATION_WALK_AFTER_FREE;
	if (!life_is(link->kind, link->right >> 16, link->nested, w->life_bits >> 16, w->guest->vmx.nested))
		kinds |= 1u << VIOLATION_FOREIGN_ROOT;
	if (link->vm != w->vcpu->vm)
		kinds |= 1u << VIOLATION_CROSS_VM;
	return kinds;
}

uint32_t walk_start_slow(struct walk *w, const struct psc_entry *link, uint32_t kind, uint64_t page, uint32_t type,
			 uint32_t *table, uint32_t *custody)
{
	uint32_t kinds = link_faults(w, link);

	if (!kinds) {
		if (frame_unlinked(w->m->frames, link->hfn) && !w->speculative)
			count(w->cpu->counters, COUNT_STALE_WALKS, 1);
		return link->level;
	}
	if (w->speculative)
		return 0;
	walk_report_link(w, link, page, type, kinds);
	if (kind == KIND_LINEAR)
		page_fault_invalidate(w->tlb, page);
	else
		ept_violation_invalidate(w->tlb, page, 0, 0);
	*table = w->vmcs->root;
	*custody = w->vmcs->life;
	return w->vmcs->root_level;
}

void walk_cache_table(struct walk *w, uint32_t kind, uint64_t page, uint32_t level, uint64_t spte)
{
	struct psc_entry link = {
		.page = page & ~((UINT64_C(1) << level * 9) - 1),
		.hfn = spte_hfn(spte),
		.right = spte_custody(spte) | w->life_bits,
		.kind = (uint8_t)kind,
		.level = (uint8_t)level,
		.vm = w->vcpu->vm,
		.vcpu = w->vcpu->id,
		.clock = w->guest->clock,
		.nested = w->guest->vmx.nested,
	};

	psc_insert(w->tlb, &link);
}

void walk_report_link(struct walk *w, const struct psc_entry *link, uint64_t gfn, uint32_t type, uint32_t kinds)
{
	struct tlb_entry e = { .page = gfn, .gfn = gfn, .hfn = link->hfn, .kind = link->kind,
			       .vm = link->vm, .vcpu = link->vcpu, .clock = link->clock,
			       .custody = link->right & FRAME_TAG_MASK, .ep4ta = w->vmcs->root,
			       .nested = link->nested };
	struct judgement j;

	oracle_judge_table(&j, kinds);
	oracle_violation(w->m, w->cpu, w->vcpu, &e, gfn, type, link->level, w->linear, &j);
}

void walk_report_table(struct walk *w, uint32_t kind, uint32_t table, uint32_t custody, uint64_t gfn, uint32_t level,
		       uint32_t type)
{
	struct psc_entry link = { .hfn = table, .right = custody, .kind = (uint8_t)kind, .level = (uint8_t)level,
				  .vm = w->vcpu->vm, .vcpu = w->vcpu->id, .clock = w->guest->clock,
				  .nested = w->guest->vmx.nested };

	walk_report_link(w, &link, gfn, type, 1u << VIOLATION_WALK_AFTER_FREE);
}
