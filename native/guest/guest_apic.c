/* See guest_apic.h. */
#include "guest/guest_apic.h"

#include "core/counters.h"
#include "core/cpu_types.h"
#include "core/machine_types.h"
#include "guest/access.h"
#include "oracle/oracle.h"
#include "tlb/tlb_report.h"
#include "vm/guest_state.h"
#include "vm/vm.h"
#include "walk/apic.h"

static enum walk_result apic_exit(struct walk *w, uint64_t gfn, uint32_t type)
{
	w->exit->reason = EXIT_APIC_ACCESS;
	w->exit->linear = w->linear;
	w->exit->gpa = gfn << 12;
	w->exit->access = type;
	return WALK_EXIT;
}

static void judge(struct walk *w, const struct tlb_entry *e, uint64_t page, uint32_t type, bool is_apic)
{
	struct judgement j = { .verdict = VERDICT_VIOLATION, .kinds = 1u << VIOLATION_APIC_STALE };

	if (apic_virtualized(w, e, page) != is_apic)
		oracle_violation(w->m, w->cpu, w->vcpu, e, page, type, 0, w->linear, &j);
}

enum walk_result apic_accessed(struct walk *w, uint64_t page, uint32_t type, const struct tlb_entry *e)
{
	uint32_t apic_page = w->vmcs->apic_page;

	judge(w, e, page, type, true);
	if (apic_page && tlb_maps_as_memory(w->tlb, apic_page, apic_page))
		count(w->cpu->counters, COUNT_APIC_ALIASES, 1);
	return apic_exit(w, e->gfn + (page - e->page), type);
}

enum walk_result apic_access(struct walk *w, uint64_t record, bool is_apic)
{
	uint64_t page = record >> 12 & GUEST_PAGE_MASK;
	uint32_t type = (uint32_t)(record >> 62);
	struct tlb_entry e;
	enum walk_result r = guest_translate(w, record, &e);

	if (r != WALK_DONE)
		return r == WALK_SKIPPED ? WALK_DONE : r;
	if (is_apic)
		return apic_accessed(w, page, type, &e);
	judge(w, &e, page, type, false);
	guest_store(w, record, &e);
	return WALK_DONE;
}
