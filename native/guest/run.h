/* Guest mode: from VM entry to VM exit. */
#ifndef FLUSHLAB_RUN_H
#define FLUSHLAB_RUN_H

#include "core/machine_types.h"

struct vcpu_exit;

/* api */
/* calls: anything */
/* Run the guest from VM entry to VM exit.  Before: interrupts off, mode IN_GUEST_MODE, a VMCS of the vCPU current
 * on this pCPU.  Runs at most `budget` guest accesses.  At exit: mode OUTSIDE_GUEST_MODE, then interrupts on and
 * queued calls run and acknowledged, in that order.  Returns the exit reason or an error. */
/* call: modelled; at guest; fence */
int guest_run(struct machine *m, uint32_t cpu, uint32_t vcpu, uint64_t budget, struct vcpu_exit *out);
/* guest_run() in steps: guest_enter() enters; each guest_step() does one operation of a program, until it
 * returns an exit reason (EXIT_REASONS: go on); guest_leave() exits with that reason. */
int guest_enter(struct machine *m, uint32_t cpu, uint32_t vcpu, uint64_t budget, struct vcpu_exit *out);
int guest_step(struct machine *m, uint32_t cpu);
int guest_leave(struct machine *m, uint32_t cpu, uint32_t reason);
/* Between guest_enter and guest_leave: the processor fetches the translation of a linear address (gpa without
 * paging) for a read that never happens, as it may at any time (SDM vol. 3A, 4.10.2.3), with the
 * paging-structure-cache entries on the way, and sets accessed flags.  If an access would fault, or would meet
 * a frame that it must not use, nothing happens, because the oracle judges uses only.  1: the translation was
 * not cached and is now; 0: not. */
int guest_speculate(struct machine *m, uint32_t cpu, uint64_t linear);
/* Do one guest memory access now, as guest_run would, for tests and litmus programs: linear address (or gpa
 * with paging 0); value stored for writes.  Preconditions and results as for guest_run. */
int guest_access(struct machine *m, uint32_t cpu, uint32_t vcpu, uint64_t linear, uint32_t type,
		 struct vcpu_exit *out);
/* end api */

#endif
