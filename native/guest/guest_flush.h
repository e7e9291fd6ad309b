/* The guest OS without EPT: a vCPU invalidates the batch of changes.
 *
 * It invalidates a few pages by INVLPG, many by MOV to CR3, INVPCID or CR4.PGE, and those of a process that is not loaded
 * when it switches to that process (flush_tlb_mm_range(), tlb_single_page_flush_ceiling, cpu_tlbstate.ctxs).  A vCPU that
 * runs threads of the process does so when the IPI of the vCPU that asked reaches it.
 */
#ifndef FLUSHLAB_GUEST_FLUSH_H
#define FLUSHLAB_GUEST_FLUSH_H

#include "vm/guest_state.h"
#include "walk/walk.h"

/* Note that this vCPU has invalidated changes of the batch, of which each has a bit. */
void os_batch_covered(struct walk *w, uint64_t changes);
/* Note that MOV to CR3 has flushed a process. */
void os_process_flushed(struct walk *w, uint32_t process);

/* Return whether it is time for this vCPU to invalidate the batch.  The IPI of another vCPU takes a while to arrive. */
bool os_flush_due(struct guest *g);
/* Execute the next instruction that invalidates the batch.  WALK_EXIT: KVM emulates it; WALK_DONE: none is left. */
enum walk_result os_flush_step(struct walk *w);

#endif
