/* The boot of a guest's OS after a reset. */
#ifndef FLUSHLAB_GUEST_BOOT_H
#define FLUSHLAB_GUEST_BOOT_H

#include "core/machine_types.h"

/* api */
/* Called by the vCPU's thread, outside guest mode, after a reset (INIT) has cleared CR0.PG: the guest OS starts
 * again.  It knows nothing of the former contents of its memory: all of it is free, page tables are built anew,
 * and no earlier translation is valid.  First it sets up CR4 and CR0, which exits.  A program is only taken out
 * of HLT and continues. */
/* call: aside */
void guest_boot(struct machine *m, uint32_t vcpu);
/* Called by the vCPU's thread before its first entry, without EPT: the guest begins with CR0.PG clear.  Its OS, or in a
 * program's place the loader, builds page tables by guest-physical stores and enables paging, with exits for
 * MOV to CR4, CR3 and CR0.  Nothing happens if the guest never enables paging. */
/* call: aside */
void guest_power_on(struct machine *m, uint32_t vcpu);
/* end api */

struct walk;
/* In guest mode: do the next step of a boot, which exits.  Returns an exit reason. */
uint32_t guest_boot_step(struct walk *w);

#endif
