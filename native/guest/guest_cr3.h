/* MOV to CR3 with EPT, where it does not exit, by a guest that writes its page tables itself, not through the OS
 * here. */
#ifndef FLUSHLAB_GUEST_CR3_H
#define FLUSHLAB_GUEST_CR3_H

#include "walk/walk.h"

/* Execute MOV to CR3 with the operand guest->new_cr3.  After WALK_EXIT it is repeated from its start. */
enum walk_result os_mov_cr3(struct walk *w);

#endif
