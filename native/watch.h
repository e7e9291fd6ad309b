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
/* The CPU sleeps in a wait.  Any thread. */
int cpu_sleeping(struct machine *m, uint32_t cpu);
/* The CPU that holds a VM's mmu_lock for write, or the first of those that hold it for read; -1: free. */
int mmu_lock_holder(struct machine *m, uint32_t vm);
/* Bit per CPU in words[]: who sleeps on a VM's mmu_lock. */
void mmu_lock_waiters(struct machine *m, uint32_t vm, uint64_t *words);
/* end api */

#endif
