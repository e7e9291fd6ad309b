/* mmu_lock: a fair reader-writer lock whose waiters keep serving calls.
 *
 * First come, first served: who finds somebody waiting waits behind, so waiting writers hold back new
 * readers (as qrwlock).  The releaser hands the lock over to the first in the queue, and to the readers
 * right behind if that one is a reader.  needbreak: somebody waits.
 *
 * One word holds owners and the WAITERS bit, so an unlock learns in its one read-modify-write whether
 * anybody must be handed the lock; no waiter, no further cost.
 */
#ifndef FLUSHLAB_MMU_LOCK_H
#define FLUSHLAB_MMU_LOCK_H

#include "cpu.h"

/* api */
/* MACHINE_MISUSE with interrupts off, even if the lock is free, and if this CPU holds it already.  An unlock of
 * what is not held leaves a sentence in machine_error_text() and does nothing. */
int mmu_read_lock(struct machine *m, uint32_t cpu, uint32_t vm);
void mmu_read_unlock(struct machine *m, uint32_t cpu, uint32_t vm);
int mmu_write_lock(struct machine *m, uint32_t cpu, uint32_t vm);
void mmu_write_unlock(struct machine *m, uint32_t cpu, uint32_t vm);
/* MACHINE_AGAIN if it cannot be had at once, because of a holder or of somebody who waits. */
int mmu_read_trylock(struct machine *m, uint32_t cpu, uint32_t vm);
int mmu_write_trylock(struct machine *m, uint32_t cpu, uint32_t vm);
/* rwlock_needbreak() */
int mmu_lock_needbreak(struct machine *m, uint32_t vm);
/* Drop what this CPU holds of all VMs, for CPUs that end.  One call: when a machine stops, thousands do so. */
void mmu_locks_abandon(struct machine *m, uint32_t cpu);
/* end api */

#define MMU_LOCK_WRITER 0x8000u  /* below it: how many readers hold it */
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
