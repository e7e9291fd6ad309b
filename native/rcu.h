/* RCU with the kernel's meaning, and SRCU.
 *
 * Readers are CPUs.  A CPU outside a read section (guest mode, halted, plain Python) is quiescent.  One
 * thread drives grace periods and runs callbacks (rcu_thread); callbacks are native.
 *
 * A reader publishes the grace period that it entered in; rcu_thread() waits for those that entered before
 * its own.  Reader and thread meet on one word, rcu_snapshot, both with read-modify-writes: whichever comes
 * second sees the other, and what the other did before.
 *
 * SRCU domains are per VM.  A reader may sleep, move to another CPU, and must return the index it got.
 */
#ifndef FLUSHLAB_RCU_H
#define FLUSHLAB_RCU_H

#include "cpu.h"

/* api */
enum rcu_callback {
	RCU_FREE_FRAME, /* argument is the frame of an EPT page */
	RCU_NOTHING,    /* for measuring */
	RCU_CALLBACKS
};

void rcu_read_lock(struct machine *m, uint32_t cpu);
void rcu_read_unlock(struct machine *m, uint32_t cpu);
/* Never waits.  MACHINE_NOMEM if there is no memory for the note of it. */
int call_rcu(struct machine *m, uint32_t cpu, uint32_t callback, uint64_t argument);
/* Wait for a grace period; MACHINE_MISUSE inside a read section, under mmu_lock or with interrupts off. */
int synchronize_rcu(struct machine *m, uint32_t cpu);
/* Wait until every callback queued before has run; same restrictions. */
int rcu_barrier(struct machine *m, uint32_t cpu);
/* The body of the RCU thread, on a housekeeping CPU: returns 0 when the machine stops and all callbacks have
 * run, for which readers must leave or go offline.  Only one may run.  ATTENTION_MESSAGE: that is set, and the
 * thread may look for its messages, forget it and call again (the grace period that it was in begins anew). */
int rcu_thread(struct machine *m, uint32_t cpu);
/* The same in steps, for a scheduler that has no thread for it: a grace period begins if one is wanted (1, else 0);
 * and ends, unless a reader of before is left (MACHINE_AGAIN): then callbacks run, and their number is returned. */
int rcu_gp_begin(struct machine *m, uint32_t cpu);
int rcu_gp_end(struct machine *m, uint32_t cpu);
uint64_t rcu_pending(struct machine *m);
/* Who keeps the current grace period waiting: CPU number, or -1. */
int rcu_holdout(struct machine *m);

/* SRCU of one VM. */
int srcu_read_lock(struct machine *m, uint32_t cpu, uint32_t vm);
void srcu_read_unlock(struct machine *m, uint32_t cpu, uint32_t vm, int index);
int synchronize_srcu(struct machine *m, uint32_t cpu, uint32_t vm);
/* end api */

typedef void rcu_handler(struct machine *m, struct cpu *cpu, uint64_t argument);
void rcu_register(uint32_t callback, rcu_handler *handler);

/* May this CPU wait for readers?  0, or MACHINE_MISUSE with a sentence about `what`.  Drains. */
int may_synchronize(struct machine *m, uint32_t cpu, const char *what);

int rcu_create(struct machine *m);
void rcu_destroy(struct machine *m);
/* A CPU goes offline: it is quiescent whatever its depth was. */
void rcu_cpu_offline(struct cpu *cpu);

struct srcu {
	_Atomic uint32_t index;
	_Atomic uint64_t lock_count[2];
	_Atomic uint64_t unlock_count[2];
	_Atomic uint32_t synchronizing; /* CPU + 1 of the one synchronizer */
	_Atomic uint32_t waiting;       /* CPU + 1 of it while it waits for readers */
	struct waiters queue;           /* those who want to synchronize next */
};

int srcu_init(struct srcu *srcu, const struct machine *m);
void srcu_fini(struct srcu *srcu, const struct machine *m);

#endif
