/* RCU with the kernel's meaning, and SRCU.
 *
 * Readers are CPUs.  A CPU outside a read section (guest mode, halted, plain Python) is quiescent.  One thread
 * (rcu_thread) drives grace periods and runs callbacks; callbacks are native functions.
 *
 * On entry, a reader publishes the current grace period; rcu_thread() waits for the readers that entered before
 * the grace period that it began.  Reader and thread meet on one word, rcu_snapshot, which both access with
 * read-modify-writes.  The later of the two therefore sees the earlier one, and everything that happened before
 * it.
 *
 * SRCU domains are per VM.  An SRCU reader may sleep and may move to another CPU; it must pass the index that
 * it got to srcu_read_unlock().
 */
#ifndef FLUSHLAB_RCU_H
#define FLUSHLAB_RCU_H

#include "sync/cpu.h"

/* api */
enum rcu_callback {
	RCU_FREE_FRAME, /* argument is the frame of an EPT page */
	RCU_NOTHING,    /* no effect; for benchmarks */
	RCU_CALLBACKS
};

void rcu_read_lock(struct machine *m, uint32_t cpu);
void rcu_read_unlock(struct machine *m, uint32_t cpu);
/* Queue a callback.  Never waits.  MACHINE_NOMEM if no memory is left for its node. */
int call_rcu(struct machine *m, uint32_t cpu, uint32_t callback, uint64_t argument);
/* Wait for a grace period; MACHINE_MISUSE inside a read section, under mmu_lock or with interrupts off. */
int synchronize_rcu(struct machine *m, uint32_t cpu);
/* Wait until every callback queued earlier has run; restricted as synchronize_rcu() is. */
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
uint64_t rcu_pending(struct machine *m);
/* Return the CPU that delays the current grace period, or -1. */
int rcu_holdout(struct machine *m);

/* SRCU of one VM. */
int srcu_read_lock(struct machine *m, uint32_t cpu, uint32_t vm);
void srcu_read_unlock(struct machine *m, uint32_t cpu, uint32_t vm, int index);
int synchronize_srcu(struct machine *m, uint32_t cpu, uint32_t vm);
/* end api */

typedef void rcu_handler(struct machine *m, struct cpu *cpu, uint64_t argument);
void rcu_register(uint32_t callback, rcu_handler *handler);

/* Decide whether this CPU may wait for readers: 0, or MACHINE_MISUSE with a message that names `what`.  If it
 * may, its call queue is drained first. */
int may_synchronize(struct machine *m, uint32_t cpu, const char *what);

int rcu_create(struct machine *m);
void rcu_destroy(struct machine *m);
/* Take a CPU offline: it becomes quiescent, even inside read sections. */
void rcu_cpu_offline(struct cpu *cpu);

struct srcu {
	_Atomic uint32_t index;
	_Atomic uint64_t lock_count[2];
	_Atomic uint64_t unlock_count[2];
	_Atomic uint32_t synchronizing; /* CPU + 1 of the CPU that synchronizes, 0: none */
	_Atomic uint32_t waiting;       /* CPU + 1 of that CPU while it waits for readers */
	struct waiters queue;           /* CPUs that wait for their turn to synchronize */
};

int srcu_init(struct srcu *srcu, const struct machine *m);
void srcu_fini(struct srcu *srcu, const struct machine *m);

#endif
