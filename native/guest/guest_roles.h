/* Without EPT: windows in which the OS has changed a bit of a control register that is part of a root's role.  Each is a
 * sequence of MOVs to CR0, CR3 and CR4, which exit, without an access between them. */
#ifndef FLUSHLAB_GUEST_ROLES_H
#define FLUSHLAB_GUEST_ROLES_H

#include <stdint.h>

struct guest;
struct walk;

/* Begin a window whose time has come.  Returns an exit reason; EXIT_REASONS: none has, or the bits are the guest's own. */
uint32_t os_role_begin(struct walk *w);
/* Go on with the window under way.  Returns an exit reason; EXIT_REASONS: none is. */
uint32_t os_role_step(struct walk *w);

#endif
