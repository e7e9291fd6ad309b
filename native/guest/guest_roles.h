/* Without EPT: windows in which the OS has changed a bit of a control register that is part of a root's role.  Each is a
 * sequence of MOVs to CR0, CR3 and CR4, which exit; between them the OS does no more than one access or one change. */
#ifndef FLUSHLAB_GUEST_ROLES_H
#define FLUSHLAB_GUEST_ROLES_H

#include <stdint.h>

struct guest;
struct walk;

/* Begin the window that is due.  Returns an exit reason; EXIT_REASONS: no window is due, the guest owns the bits (with
 * EPT), or it has no process yet. */
uint32_t os_role_begin(struct walk *w);
/* Go on with the window under way.  Returns an exit reason; EXIT_REASONS: no window is. */
uint32_t os_role_step(struct walk *w);

#endif
