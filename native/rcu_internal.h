/* Inside of RCU: shared by rcu.c and rcu_callback.c. */
#ifndef FLUSHLAB_RCU_INTERNAL_H
#define FLUSHLAB_RCU_INTERNAL_H

#include "rcu.h"

/* A callback that was queued.  Nodes go round: the owner's list, the pending stack, the RCU thread, the owner's
 * stack of returned ones.  Their number is what was pending at most. */
struct rcu_head {
	struct rcu_head *next;
	uint32_t owner;
	uint32_t callback;
	uint64_t argument;
};

struct rcu {
	/* read by every reader, written once a grace period */
	alignas(CACHELINE) _Atomic uint64_t gp_seq; /* the last one that began; never 0 */
	alignas(CACHELINE) _Atomic uint64_t gp_completed;
	_Atomic uint64_t gp_wanted; /* somebody waits for this one */
	_Atomic int32_t thread;     /* CPU of rcu_thread(), -1: none */
	_Atomic int32_t holdout;
	struct waiters waiters; /* for a grace period or for callbacks */
	/* of whoever is `thread`, or steps */
	struct rcu_head *taken; /* callbacks whose grace period has not ended */
	uint64_t stepped_gp;    /* the one that rcu_gp_begin() began, 0: none */
	alignas(CACHELINE) _Atomic(struct rcu_head *) pending;
	_Atomic uint64_t queued;
	alignas(CACHELINE) _Atomic uint64_t invoked;
};

/* Work for the RCU thread: P1, what it looks at was changed before. */
void rcu_wake_thread(struct machine *m);
/* The callbacks queued so far, oldest first. */
struct rcu_head *rcu_take_pending(struct rcu *rcu);
/* Run them; wakes who waits for callbacks. */
void rcu_invoke(struct machine *m, uint32_t cpu, struct rcu_head *list);
/* Free the CPUs' nodes. */
void rcu_free_nodes(struct machine *m);

#endif
