/* MOV to CR3 with EPT, where it does not exit, by a guest that writes its page tables itself, not through the OS
 * here. */
#ifndef FLUSHLAB_GUEST_CR3_H
#define FLUSHLAB_GUEST_CR3_H

#include "walk/walk.h"

/* Execute the MOV to CR3 that guest->new_cr3 is the operand of; to be repeated from its start after WALK_EXIT. */
enum walk_result os_mov_cr3(struct walk *w);

#endif
