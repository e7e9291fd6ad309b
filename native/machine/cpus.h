/* Making the CPUs with their counters and TLBs. */
#ifndef FLUSHLAB_CPUS_H
#define FLUSHLAB_CPUS_H

#include "core/machine_types.h"

int cpus_create(struct machine *m);
void cpus_destroy(struct machine *m);

#endif
