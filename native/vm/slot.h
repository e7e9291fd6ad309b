/* Slots of the machine's tables: a number names a slot, which is claimed, filled and made public, and free again
 * when its owner has emptied it. */
#ifndef FLUSHLAB_SLOT_H
#define FLUSHLAB_SLOT_H

#include "core/machine_types.h"

enum slot_state { SLOT_FREE, SLOT_BUSY, SLOT_LIVE };

/* Claim a free slot for the caller to fill; it is public when its state is SLOT_LIVE (release). */
static inline bool slot_claim(_Atomic uint32_t *state)
{
	uint32_t expected = SLOT_FREE;

	return atomic_compare_exchange_strong_explicit(state, &expected, SLOT_BUSY, memory_order_acquire,
						       memory_order_relaxed);
}

static inline void slot_set(_Atomic uint32_t *state, enum slot_state to)
{
	atomic_store_explicit(state, to, memory_order_release);
}

static inline bool slot_is_live(const _Atomic uint32_t *state)
{
	/* Acquire: pairs with the release by which a slot goes live, so that its parts are seen. */
	return atomic_load_explicit(state, memory_order_acquire) == SLOT_LIVE;
}

#endif
