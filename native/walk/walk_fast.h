/* The fast path of a walk. */
#ifndef FLUSHLAB_WALK_FAST_H
#define FLUSHLAB_WALK_FAST_H

#include "core/machine_types.h"

struct walk;

/* Do the work of walk_linear() where the fast path applies (walk_fast.c), for a page that was just looked up and
 * is in neither level: *hfn is its frame.  False: nothing has happened, and walk_linear() must do it. */
bool walk_fast(struct walk *w, uint64_t page, uint32_t type, uint32_t *hfn);

#endif
