#include "guest/guest_promise.h"

#include "core/machine_types.h"
#include "oracle/ledger.h"
#include "vm/guest_state.h"
#include "vm/vm.h"

void guest_promise(struct machine *m, const struct vcpu *vcpu, struct guest_page *gp, uint64_t gfn, bool all)
{
	if (all)
		gp->changed = vcpu->guest->clock;
	else
		gp->protected_ = vcpu->guest->clock;
	ledger_announce(m, vcpu->vm, gfn);
}
