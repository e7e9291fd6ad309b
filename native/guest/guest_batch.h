/* The guest OS without EPT: changes that it invalidates together, on all vCPUs that run its processes.
 *
 * An OS does not invalidate each change at once.  It gathers changes (as Linux's mmu_gather), then invalidates them: a few
 * pages by INVLPG, many by MOV to CR3, INVPCID or CR4.PGE, and those of a process that is not loaded when it switches to
 * that (flush_tlb_mm_range(), tlb_single_page_flush_ceiling, cpu_tlbstate.ctxs).  Other vCPUs that run threads of the
 * process do so too, when its IPI reaches them.  Until then they may use the old translations, and the OS does not
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
/* This vCPU has invalidated the changes, by bits. */
void os_batch_covered(struct walk *w, uint64_t changes);
/* MOV to CR3 has flushed a process. */
void os_process_flushed(struct walk *w, uint32_t process);

/* Return whether it is time for this vCPU to invalidate the batch.  The IPI of another vCPU takes a while to arrive. */
bool os_flush_due(struct guest *g);
/* Execute the next instruction of that.  WALK_EXIT: KVM emulates it; WALK_DONE: none is left. */
enum walk_result os_flush_step(struct walk *w);

#endif
