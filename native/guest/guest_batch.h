/* The guest OS without EPT: changes that it invalidates together, on all vCPUs that run its processes.
 *
 * An OS does not invalidate each change at once.  It gathers changes (as Linux's mmu_gather) in a batch, then each vCPU
 * invalidates the batch (guest_flush.h).  Until all have done so, they may use the old translations, and the OS does not
 * hand out the pages behind these.
 *
 * One vCPU at a time is in the OS, so that no lock is needed besides os_enter().
 */
#ifndef FLUSHLAB_GUEST_BATCH_H
#define FLUSHLAB_GUEST_BATCH_H

#include "core/machine_types.h"
#include "vm/guest_state.h"
#include "walk/vmcs.h"
#include "walk/walk.h"

/* Return whether the OS gathers changes on this vCPU. */
static inline bool os_batches(const struct walk *w)
{
	return w->guest->leader->config.batch && !w->vmcs->ept;
}

/* Return the batch's number, or 0 before the first.  Relaxed: for the vCPU in the OS, and after an acquire of `flush`. */
static inline uint32_t os_batch_number(const struct guest_batch *b)
{
	return atomic_load_explicit(&b->number, memory_order_relaxed);
}

/* Return how many changes the batch has.  Relaxed: as os_batch_number(). */
static inline uint32_t os_batch_changes(const struct guest_batch *b)
{
	return atomic_load_explicit(&b->changes, memory_order_relaxed);
}

/* Enter the OS, if it gathers changes, or stay in it.  False: another vCPU is in it. */
bool os_enter(struct walk *w);
/* Leave the OS, unless an action of it has to go on behind a VM exit.  Returns r. */
enum walk_result os_leave(struct walk *w, enum walk_result r);
/* Return whether this vCPU is in the OS. */
bool os_inside(const struct walk *w);
/* Wait for another vCPU to leave the OS, or to invalidate a batch, and return an exit reason: PAUSE exits after a while
 * (pause-loop exiting), so that KVM may let the other one run. */
uint32_t os_spin(struct walk *w);
/* exit_of(), for an action of the OS that may have to wait. */
uint32_t os_exit_of(struct walk *w, enum walk_result r);

/* Change an entry: take the page away (`all`), or write access.  Nothing happens while the batch is full. */
enum walk_result os_change(struct walk *w, uint32_t process, uint64_t page, bool all);
/* Free a table of level 1 with all that it maps: unlink it.  Nothing happens if that is more than the batch has room for. */
enum walk_result os_drop_table(struct walk *w, uint32_t process, uint64_t page);
/* Go on with the change that a VM exit has interrupted. */
enum walk_result os_change_resumed(struct walk *w);
/* Make all vCPUs invalidate the batch, if there is anything in it.  Returns whether there is. */
bool os_batch_flush(struct walk *w);
/* Free the pages of a batch that all vCPUs have invalidated, and begin the next. */
void os_batch_reap(struct guest *g);

#endif
