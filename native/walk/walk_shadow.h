/* Walks without EPT, of one dimension: from linear addresses through KVM's shadow tables to host frames. */
#ifndef FLUSHLAB_WALK_SHADOW_H
#define FLUSHLAB_WALK_SHADOW_H

#include "core/machine_types.h"
#include "walk/walk.h"

/* Translate a linear page by a walk from the root of GUEST_CR3, and cache the result.  WALK_EXIT: EXIT_EXCEPTION. */
enum walk_result walk_shadow(struct walk *w, uint64_t page, uint32_t type, struct tlb_entry *out);
/* The same through the second level of the TLB, for the guest's OS (w->supervisor), which the first level does not
 * serve. */
enum walk_result walk_shadow_cached(struct walk *w, uint64_t page, uint32_t type, struct tlb_entry *out);

#endif
