/* The state of a CPU that a watchdog and a post-mortem read.  Nothing here has effects. */
#ifndef FLUSHLAB_WATCH_H
#define FLUSHLAB_WATCH_H

#include "core/machine_types.h"

/* api */
/* Return the depth of the CPU's RCU read sections.  Its own thread only. */
/* call: anything; keeps-gil */
uint32_t rcu_read_depth(struct machine *m, uint32_t cpu);
/* Return the CPU's hold on a VM's mmu_lock: 0 none, 1 read, 2 write.  Any thread; may be out of date on return. */
/* call: anything; keeps-gil */
int mmu_lock_held(struct machine *m, uint32_t cpu, uint32_t vm);
/* Return whether a call waits to be run by this CPU.  Any thread. */
/* call: aside; keeps-gil */
int ipi_pending(struct machine *m, uint32_t cpu);
/* Return the CPU that holds a VM's mmu_lock (one of the readers, if several do), or -1. */
/* call: anything */
int mmu_lock_holder(struct machine *m, uint32_t vm);
/* Return whether a CPU waits for a VM's mmu_lock. */
/* call: anything; keeps-gil */
int mmu_lock_contended(struct machine *m, uint32_t vm);
/* end api */

#endif
