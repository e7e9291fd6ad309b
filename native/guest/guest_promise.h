/* The guest's promises (PROMISER_GUEST): a mapping that it has changed and invalidated is used no more on this vCPU. */
#ifndef FLUSHLAB_GUEST_PROMISE_H
#define FLUSHLAB_GUEST_PROMISE_H

#include "core/machine_types.h"
#include "vm/guest_state.h"

/* Record, at the guest's clock, that the guest has invalidated a page's former mapping to gfn: all of it, or write
 * access alone. */
void guest_promise(struct machine *m, const struct vcpu *vcpu, struct guest_page *gp, uint64_t gfn, bool all);

#endif
