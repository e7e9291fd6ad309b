/* Callbacks of RCU, which are native functions. */
#ifndef FLUSHLAB_RCU_CALLBACK_H
#define FLUSHLAB_RCU_CALLBACK_H

#include "core/machine_types.h"

/* api */
enum rcu_callback {
	RCU_FREE_FRAME, /* argument is the frame of an EPT page */
	RCU_NOTHING,    /* no effect; for benchmarks */
	RCU_FUNCTION,   /* rcu_set_function()'s, for a kernel's compiled code */
	RCU_CALLBACKS
};

/* Queue a callback.  Never waits.  MACHINE_NOMEM if no memory is left for its node. */
/* call: anything */
int call_rcu(struct machine *m, uint32_t cpu, uint32_t callback, uint64_t argument);
/* Set the address of RCU_FUNCTION's function, void (*)(uint32_t cpu, uint64_t argument), which the RCU thread calls.
 * All machines of the process share it. */
/* call: anything */
void rcu_set_function(uint64_t function);
/* Return the number of callbacks that have not run yet. */
/* call: aside; keeps-gil */
uint64_t rcu_pending(struct machine *m);
/* end api */

struct rcu_head;

typedef void rcu_handler(struct machine *m, struct cpu *cpu, uint64_t argument);
/* Set the handler of a callback, before threads start. */
void rcu_register(uint32_t callback, rcu_handler *handler);

/* Take the callbacks queued so far, oldest first. */
struct rcu_head *rcu_take_pending(struct rcu *rcu);
/* Run the callbacks, then wake the CPUs that wait for callbacks. */
void rcu_invoke(struct machine *m, uint32_t cpu, struct rcu_head *list);
/* Free the CPUs' nodes. */
void rcu_free_nodes(struct machine *m);

#endif
