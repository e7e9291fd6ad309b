/* The orderly end of a CPU. */
#ifndef FLUSHLAB_OFFLINE_H
#define FLUSHLAB_OFFLINE_H

#include "core/machine_types.h"

/* api */
/* Called by the CPU's thread, or by the machine for a thread that died or sleeps: run the queue, leave
 * RCU, drop its mmu_locks, mark the CPU offline.  Its waits return MACHINE_OFFLINE, and calls that still reach
 * it are acknowledged by their senders. */
/* call: anything */
void cpu_offline(struct machine *m, uint32_t cpu);
/* end api */

#endif
