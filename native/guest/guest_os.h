/* The actions of the guest OS on its vCPU.  Each function may be repeated from its start after a VM exit in its
 * middle (any result but WALK_DONE). */
#ifndef FLUSHLAB_GUEST_OS_H
#define FLUSHLAB_GUEST_OS_H

#include "core/machine_types.h"
#include "walk/walk.h"

/* Give the current process a PML4 page if it has none. */
enum walk_result os_setup(struct walk *w);
/* Handle a #PF on a page of the current process or of the kernel.  WALK_GUEST_FAULT: the OS cannot go on. */
enum walk_result os_page_fault(struct walk *w, uint64_t page, uint32_t type);
/* Out of memory: unmap a page of any process, which may be shared.  WALK_GUEST_FAULT: there is none. */
enum { RECLAIM_TRIES = 16 }; /* to free one */
enum walk_result os_reclaim(struct walk *w);
/* Do all events that are due by the guest's clock, except HLT. */
enum walk_result os_events(struct walk *w);
/* MOV to CR3 of the current process's page tables: the processor translates with them from here on. */
void os_load_cr3(struct walk *w);

#endif
