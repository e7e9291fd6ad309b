/* The guest's promises (PROMISER_GUEST): a mapping that it has changed and invalidated is used no more on this vCPU. */
#ifndef FLUSHLAB_GUEST_PROMISE_H
#define FLUSHLAB_GUEST_PROMISE_H

#include "core/machine_types.h"
#include "vm/guest_state.h"

/* Record, at the guest's clock, that a page's former mapping to gfn has been invalidated: all of it, or write access
 * alone; by the guest, or by L1 for its nested guest. */
enum invalidator { INVALIDATED_BY_ITSELF, INVALIDATED_BY_L1 };
void guest_promise(struct machine *m, uint32_t vm, const struct guest *g, struct guest_page *gp, uint64_t gfn, bool all,
		   enum invalidator by);

#endif
