/* mmu_lock: a fair reader-writer lock; waiting CPUs keep serving calls.
 *
 * First come, first served: a CPU that finds the queue non-empty joins its end, so waiting writers hold back
 * new readers (as in qrwlock).  The releaser hands the lock to the first waiter and, if that is a reader, to
 * the readers directly behind it.  needbreak: the queue is not empty.
 *
 * One word holds the owners and the WAITERS bit, so an unlock learns from its one read-modify-write whether it
 * must hand the lock over; without waiters it costs nothing more.
 */
#ifndef FLUSHLAB_MMU_LOCK_H
#define FLUSHLAB_MMU_LOCK_H

#include "core/machine_types.h"

struct lock_waiter;

/* api */
/* MACHINE_MISUSE with interrupts off, even if the lock is free, and if this CPU holds the lock already.
 * Unlocking a lock that is not held leaves a message in machine_error_text() and does nothing. */
/* call: anything */
int mmu_read_lock(struct machine *m, uint32_t cpu, uint32_t vm);
/* call: modelled; fence; keeps-gil */
void mmu_read_unlock(struct machine *m, uint32_t cpu, uint32_t vm);
/* call: anything */
int mmu_write_lock(struct machine *m, uint32_t cpu, uint32_t vm);
/* call: modelled; keeps-gil */
void mmu_write_unlock(struct machine *m, uint32_t cpu, uint32_t vm);
/* MACHINE_AGAIN if the lock cannot be taken at once, because it is held or has waiters. */
/* call: modelled; at mmu_lock; fence; keeps-gil */
int mmu_read_trylock(struct machine *m, uint32_t cpu, uint32_t vm);
int mmu_write_trylock(struct machine *m, uint32_t cpu, uint32_t vm);
/* rwlock_needbreak() (include/linux/spinlock.h) */
/* call: modelled; keeps-gil */
int mmu_lock_needbreak(struct machine *m, uint32_t vm);
/* Drop the holds of this CPU on the locks of all VMs, when the CPU ends.  One call for all VMs, because
 * thousands of CPUs end when a machine stops. */
/* call: anything */
void mmu_locks_abandon(struct machine *m, uint32_t cpu);
/* end api */

#define MMU_LOCK_WRITER 0x8000u  /* bits below: the number of readers that hold it */
#define MMU_LOCK_WAITERS 0x10000u /* the queue is not empty */

struct mmu_lock {
	alignas(CACHELINE) _Atomic uint32_t state;
	_Atomic uint32_t queue_lock; /* a spinlock around the queue, held for a few instructions */
	struct lock_waiter *first;
	struct lock_waiter *last;
	_Atomic uint32_t writer;   /* CPU + 1, for abandon and reports */
	_Atomic uint32_t *readers; /* read holds per CPU, likewise */
};

int mmu_lock_init(struct mmu_lock *lock, const struct machine *m);
void mmu_lock_fini(struct mmu_lock *lock, const struct machine *m);

#endif
