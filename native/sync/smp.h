/* Calls between CPUs, the sender's side, as in kernel/smp.c.  Each may wait, because a node per sender and target
 * is reused when acknowledged; so it is MACHINE_MISUSE with interrupts off or from a called function, and a sender
 * that is offline gets MACHINE_OFFLINE.  A call that runs on the caller's own CPU is not counted as a call.
 */
#ifndef FLUSHLAB_SMP_H
#define FLUSHLAB_SMP_H

#include "core/machine_types.h"

/* api */
/* How the sender waits for its targets: not at all; until all have run the call; or by itself, with csd_busy. */
enum ipi_wait { IPI_NO_WAIT, IPI_WAIT, IPI_WAIT_LATER };

/* Call pCPUs.  mask: one bit per pCPU in words of 64.  Never runs locally.  With wait, returns after every
 * target has run the call.  Returns the number of pCPUs called (offline ones are not), or an error. */
/* call: modelled; at call_queue; fence */
int smp_call_function_many(struct machine *m, uint32_t cpu, const uint64_t *mask, uint32_t function,
			   uint64_t argument, int wait);
/* Call one pCPU.  On the caller's own CPU the function runs at once.  Returns 1, or 0 if the target is offline,
 * or an error. */
/* call: modelled; at call_queue; fence */
int smp_call_function_single(struct machine *m, uint32_t cpu, uint32_t target, uint32_t function,
			     uint64_t argument, int wait);
/* Call all online pCPUs, the caller's own included (with interrupts off around it) if it is one.  Returns their
 * number, or an error. */
/* call: modelled; at call_queue; fence */
int on_each_cpu(struct machine *m, uint32_t cpu, uint32_t function, uint64_t argument, int wait);
/* Return 1 if a call from `cpu` to `target` is not acknowledged yet, so that another call to it would wait.
 * Called by the sender's thread. */
/* call: anything; keeps-gil */
int csd_busy(struct machine *m, uint32_t cpu, uint32_t target);
/* end api */

#endif
