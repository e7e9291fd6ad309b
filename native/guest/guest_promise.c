#include "guest/guest_promise.h"

#include "core/machine_types.h"
#include "oracle/ledger.h"
#include "vm/ept12.h"
#include "vm/guest_state.h"
#include "vm/vm.h"

/* Make the oracle judge, from here on, each use of the guest's page: announce each page of L1's that may be behind
 * it. */
static void announce(struct machine *m, uint32_t vm, const struct guest *g, uint64_t gfn)
{
	const struct ept12s *s = g->vmx.ept12 ? g->vmx.ept12s : NULL;
	struct guest_mapping now;

	if (!s) {
		ledger_announce(m, vm, gfn);
		return;
	}
	now = ept12_mapping(&s->ept[g->vmx.ept12], gfn);
	if (now.gfn != (uint32_t)GUEST_NO_GFN)
		ledger_announce(m, vm, now.gfn);
	for (uint32_t i = 0; i < s->changes; i++)
		if (s->change[i].ept12 == g->vmx.ept12 && s->change[i].page == gfn)
			ledger_announce(m, vm, s->change[i].gfn);
}

void guest_promise(struct machine *m, uint32_t vm, const struct guest *g, struct guest_page *gp, uint64_t gfn, bool all,
		   enum invalidator by)
{
	if (all) {
		gp->changed = g->clock;
		gp->l1_changed = by == INVALIDATED_BY_L1;
	} else {
		gp->protected_ = g->clock;
		gp->l1_protected = by == INVALIDATED_BY_L1;
	}
	announce(m, vm, g, gfn);
}
