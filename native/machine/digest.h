/* Leaves out of a machine's digest the memory on which no later step depends. */
#ifndef FLUSHLAB_DIGEST_H
#define FLUSHLAB_DIGEST_H

#include "core/machine_types.h"

/* Mark that memory; the machine was built with `snapshots`.  Return 0, or MACHINE_NOMEM. */
int digest_prepare(struct machine *m);

#endif
