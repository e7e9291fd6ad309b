/* What a watchdog and a post-mortem want to know of a CPU.  Nothing here has effects. */
#ifndef FLUSHLAB_WATCH_H
#define FLUSHLAB_WATCH_H

#include "cpu.h"

/* api */
/* How deep in RCU read sections the CPU is.  Its own thread only. */
uint32_t rcu_read_depth(struct machine *m, uint32_t cpu);
/* What the CPU holds of a VM's mmu_lock: 0 nothing, 1 read, 2 write.  Any thread; a moment's truth. */
int mmu_lock_held(struct machine *m, uint32_t cpu, uint32_t vm);
/* A call waits to be run by this CPU.  Any thread. */
int ipi_pending(struct machine *m, uint32_t cpu);
/* The CPU that holds a VM's mmu_lock (one of those that hold it for read), or -1. */
int mmu_lock_holder(struct machine *m, uint32_t vm);
/* Somebody waits for a VM's mmu_lock. */
int mmu_lock_contended(struct machine *m, uint32_t vm);
/* end api */

#endif
