/* Internals of RCU, shared by rcu.c and rcu_callback.c. */
#ifndef FLUSHLAB_RCU_INTERNAL_H
#define FLUSHLAB_RCU_INTERNAL_H

#include "core/machine_types.h"
#include "sync/waiters.h"

/* A queued callback.  Nodes circulate: the owner's free list, the pending stack, the RCU thread, the owner's
 * stack of returned nodes.  Their number is the largest number of callbacks that were pending at a time. */
struct rcu_head {
	struct rcu_head *next;
	uint32_t owner;
	uint32_t callback;
	uint64_t argument;
};

struct rcu {
	/* read by every reader, written once a grace period */
	alignas(CACHELINE) _Atomic uint64_t gp_seq; /* the last grace period that began; never 0 */
	alignas(CACHELINE) _Atomic uint64_t gp_completed;
	_Atomic uint64_t gp_wanted; /* the last grace period that a CPU waits for */
	_Atomic int32_t thread;     /* CPU of rcu_thread(), -1: none */
	_Atomic int32_t holdout;
	struct waiters waiters; /* for a grace period or for callbacks */
	/* owned by the CPU in `thread`, or by the caller of the steps */
	struct rcu_head *taken; /* callbacks that still wait for the end of their grace period */
	uint64_t stepped_gp;    /* the grace period that rcu_gp_begin() began, 0: none */
	alignas(CACHELINE) _Atomic(struct rcu_head *) pending;
	_Atomic uint64_t queued;
	alignas(CACHELINE) _Atomic uint64_t invoked;
};

#endif
