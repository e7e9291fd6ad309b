#include "guest/guest_promise.h"

#include "core/machine_types.h"
#include "oracle/ledger.h"
#include "vm/guest_state.h"
#include "vm/vm.h"

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
	ledger_announce(m, vm, gfn);
}
