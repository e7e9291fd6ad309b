/* The fast path of a walk without EPT. */
#ifndef FLUSHLAB_WALK_SHADOW_FAST_H
#define FLUSHLAB_WALK_SHADOW_FAST_H

#include "core/machine_types.h"

struct walk;

/* Do the work of walk_shadow() for a user-mode access where the fast path applies, for a page that was just looked up and
 * is in neither level: *hfn is its frame.  False: nothing has happened, and walk_shadow() must do it. */
bool walk_shadow_fast(struct walk *w, uint64_t page, uint32_t type, uint32_t *hfn);

#endif
