/* A spin lock for a few dozen instructions on data that many threads share.
 *
 * Nothing waits, sends or calls back while it is held, so a pCPU that spins here delays its callers no longer
 * than the holder needs.  There are more threads than processors: the holder may have been preempted, so a
 * waiter soon yields instead of spinning on.
 */
#ifndef FLUSHLAB_SPIN_H
#define FLUSHLAB_SPIN_H

#include <sched.h>

#include "core/cpu_types.h"
#include "core/machine_types.h"

enum { SPINS_BEFORE_YIELD = 64 };

static inline void spin_lock(_Atomic uint32_t *lock)
{
	uint32_t spins = 0;

	/* Acquire: pairs with the release of spin_unlock, so the last holder's stores are seen. */
	while (atomic_exchange_explicit(lock, 1, memory_order_acquire)) {
		/* Relaxed: a hint for when to try again; the exchange decides. */
		while (atomic_load_explicit(lock, memory_order_relaxed)) {
			if (++spins < SPINS_BEFORE_YIELD) {
				cpu_relax();
			} else {
				sched_yield();
				spins = 0;
			}
		}
	}
}

static inline void spin_unlock(_Atomic uint32_t *lock)
{
	/* Release: pairs with the acquire of spin_lock. */
	atomic_store_explicit(lock, 0, memory_order_release);
}

#endif
