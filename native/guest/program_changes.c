/* See program_changes.h. */
#include "guest/program_changes.h"

#include <string.h>

#include "core/heap.h"
#include "core/machine_types.h"
#include "guest/guest_promise.h"
#include "vm/guest_state.h"

int changes_reserve(struct machine *m, struct guest *g, uint32_t n)
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

void changes_note(struct guest *g, uint64_t page, const struct guest_page *gp, bool all, bool global)
{
	if (!guest_page_mapped(gp))
		return;
	g->change[g->changes++] = (struct guest_change){
		.page = page, .process = g->current, .gfn = guest_mapping_of(gp).gfn, .all = all, .global = global,
		.huge = guest_mapping_of(gp).huge && !(page & 511)
	};
}

/* From here on the old translation is stale, and each use of it asks the oracle. */
static void settle(struct machine *m, uint32_t vm, struct guest *g, const struct guest_change *change, enum invalidator by)
{
	struct guest_page *gp = guest_page_find(g, change->process, change->page);

	if (!gp)
		return;
	g->clock++;
	guest_promise(m, vm, g, gp, change->gfn, change->all, by);
}

void changes_settle(struct machine *m, uint32_t vm, struct guest *g, struct covered what, enum invalidator by)
{
	uint32_t left = 0;

	for (uint32_t i = 0; i < g->changes; i++) {
		const struct guest_change *change = &g->change[i];
		bool process = what.any_process || change->process == what.process ||
			       (change->global && what.globals);

		if ((what.any_page || change->page == what.page) && process && (!change->global || what.globals))
			settle(m, vm, g, change, by);
		else
			g->change[left++] = *change;
	}
	g->changes = left;
}
