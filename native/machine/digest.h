/* The part of a machine's memory on which no later step depends, and which its digest leaves out. */
#ifndef FLUSHLAB_DIGEST_H
#define FLUSHLAB_DIGEST_H

#include "core/machine_types.h"

/* Mark that part, of a machine that was built with `snapshots`.  0, or MACHINE_NOMEM. */
int digest_prepare(struct machine *m);

#endif
