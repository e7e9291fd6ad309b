/* Delays at random places, which make races frequent. */
#ifndef FLUSHLAB_CHAOS_H
#define FLUSHLAB_CHAOS_H

#include "core/machine_types.h"

/* A point where order matters: delays its caller now and then if the machine was built with chaos. */
void chaos_delay(struct machine *m, uint32_t cpu);

static inline void chaos_point(struct machine *m, uint32_t cpu)
{
	if (m->config.chaos)
		chaos_delay(m, cpu);
}

#endif
