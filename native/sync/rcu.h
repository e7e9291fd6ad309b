/* RCU with the kernel's meaning, and SRCU.
 *
 * Readers are CPUs.  A CPU outside a read section (guest mode, halted, plain Python) is quiescent.  One thread
 * (rcu_thread) drives grace periods and runs callbacks; callbacks are native functions.
 *
 * On entry, a reader publishes the current grace period; rcu_thread() waits for the readers that entered before
 * the grace period that it began.  Reader and thread meet on one word, rcu_snapshot, which both access with
 * read-modify-writes.  The later of the two therefore sees the earlier one, and everything that happened before
 * it.
 */
#ifndef FLUSHLAB_RCU_H
#define FLUSHLAB_RCU_H

#include "core/machine_types.h"

/* api */
/* calls: anything */
/* call: modelled; keeps-gil */
void rcu_read_lock(struct machine *m, uint32_t cpu);
void rcu_read_unlock(struct machine *m, uint32_t cpu);
/* Wait for a grace period; MACHINE_MISUSE inside a read section, under mmu_lock or with interrupts off. */
/* call: modelled; fence */
int synchronize_rcu(struct machine *m, uint32_t cpu);
/* Wait until every callback queued earlier has run; restricted as synchronize_rcu() is. */
/* call: modelled; fence */
int rcu_barrier(struct machine *m, uint32_t cpu);
/* The body of the RCU thread, on a housekeeping CPU.  Returns 0 when the machine stops and all callbacks have
 * run, which requires that all readers leave or go offline.  Only one thread may run it.  If ATTENTION_MESSAGE
 * is set, it returns that; the thread may then read its messages, clear the bit and call again (the interrupted
 * grace period starts anew). */
int rcu_thread(struct machine *m, uint32_t cpu);
/* The RCU thread's work in steps, for a scheduler that runs no such thread.  rcu_gp_begin() begins a grace
 * period if one is wanted (returns 1, else 0).  rcu_gp_end() ends it, unless a reader that entered earlier is
 * left (MACHINE_AGAIN): then it runs the callbacks and returns their number. */
int rcu_gp_begin(struct machine *m, uint32_t cpu);
int rcu_gp_end(struct machine *m, uint32_t cpu);
/* Return the CPU that delays the current grace period, or -1. */
int rcu_holdout(struct machine *m);
/* end api */

/* Decide whether this CPU may wait for readers: 0, or MACHINE_MISUSE with a message that names `what`.  If it
 * may, its call queue is drained first. */
int may_synchronize(struct machine *m, uint32_t cpu, const char *what);

/* Wake the RCU thread.  P1: the caller has changed the condition that the thread tests. */
void rcu_wake_thread(struct machine *m);

int rcu_create(struct machine *m);
void rcu_destroy(struct machine *m);
/* Take a CPU offline: it becomes quiescent, even inside read sections. */
void rcu_cpu_offline(struct cpu *cpu);

#endif
