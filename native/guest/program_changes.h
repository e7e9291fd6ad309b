/* The changes of mappings that wait for an invalidation.
 *
 * A program that changes a mapping invalidates nothing.  Its change waits until an invalidation that covers it was executed
 * on this vCPU: by the program, by L1 for its nested guest, or by an instruction that KVM emulates.  Only then the old
 * translation is stale.
 */
#ifndef FLUSHLAB_PROGRAM_CHANGES_H
#define FLUSHLAB_PROGRAM_CHANGES_H

#include "core/machine_types.h"
#include "guest/guest_promise.h"
#include "vm/guest_state.h"

/* The scope of an invalidation. */
struct covered {
	bool any_page, any_process, globals;
	uint64_t page;
	uint32_t process;
};

/* Make room for a change by each of n operations, besides those that are not invalidated yet.  An operation that a VM
 * exit interrupts notes its change once, when it is complete. */
int changes_reserve(struct machine *m, struct guest *g, uint32_t n);
/* Note that the current process's mapping of a page is about to change: all of it, or the right to write is lost. */
void changes_note(struct guest *g, uint64_t page, const struct guest_page *gp, bool all, bool global);
/* The guest's changes in this scope have been invalidated.  Its clock advances with each. */
void changes_settle(struct machine *m, uint32_t vm, struct guest *g, struct covered what, enum invalidator by);

#endif
