/* Sets of CPUs that wait for one condition, if the CPU that makes it true cannot find them otherwise. */
#ifndef FLUSHLAB_WAITERS_H
#define FLUSHLAB_WAITERS_H

#include "core/machine_types.h"

struct waiters {
	_Atomic uint64_t *mask; /* a bit per CPU */
	uint32_t words;
};

int waiters_init(struct waiters *waiters, const struct machine *m);
void waiters_fini(struct waiters *waiters, const struct machine *m);
/* Called before the waiter tests its condition for the last time: P1 of cpu.h with waiters_wake(), which is called
 * after the condition became true. */
void waiters_add(struct waiters *waiters, uint32_t cpu);
void waiters_wake(struct machine *m, struct waiters *waiters);

#endif
