/* Inter-processor interrupts: call queues as in kernel/smp.c.
 *
 * A call is a node on the target's lock-free queue.  The sender that makes the queue non-empty interrupts the
 * target; later senders rely on that interrupt.  The target takes the whole queue and runs it in order,
 * synchronous calls first: run, then acknowledge; then the others: acknowledge, then run.  A halted or offline
 * target is serviced by the sender under the HALTED -> SERVICED -> HALTED handshake of cpu.h.  Functions are
 * native, never wait and never send.
 *
 * Sending may wait (a node per sender and target is reused when acknowledged), so it is MACHINE_MISUSE with
 * interrupts off or from a function; a sender that is offline gets MACHINE_OFFLINE.  A call that runs on the
 * caller's own CPU is not counted as a call.
 */
#ifndef FLUSHLAB_IPI_H
#define FLUSHLAB_IPI_H

#include "sync/cpu.h"

/* api */
/* The upper 32 bits of the argument name the VM for which the call is made, except for IPI_VMCS_CLEAR. */
enum ipi_function {
	IPI_ACK_KICK,      /* does nothing: the interrupt is the effect (ack_kick) */
	IPI_VMCS_CLEAR,    /* __loaded_vmcs_clear: argument is the vCPU */
	IPI_INVEPT_GLOBAL,
	IPI_INVEPT_SINGLE, /* of a new root: argument's lower half is the EP4TA */
	IPI_FUNCTIONS
};

/* How the sender waits for its targets: not at all; until all have run the call; or by itself, with csd_busy. */
enum ipi_wait { IPI_NO_WAIT, IPI_WAIT, IPI_WAIT_LATER };

/* Call pCPUs.  mask: one bit per pCPU in words of 64.  Never runs locally.  With wait, returns after every
 * target has run the call.  Returns the number of pCPUs called (offline ones are not), or an error. */
int smp_call_function_many(struct machine *m, uint32_t cpu, const uint64_t *mask, uint32_t function,
			   uint64_t argument, int wait);
/* Call one pCPU.  On the caller's own CPU the function runs at once.  Returns 1, or 0 if the target is offline,
 * or an error. */
int smp_call_function_single(struct machine *m, uint32_t cpu, uint32_t target, uint32_t function,
			     uint64_t argument, int wait);
/* Call all online pCPUs, the caller's own included (with interrupts off around it) if it is one.  Returns their
 * number, or an error. */
int on_each_cpu(struct machine *m, uint32_t cpu, uint32_t function, uint64_t argument, int wait);
/* Run the calls queued for this CPU now, unless its interrupts are off.  Returns the number of calls. */
int ipi_drain(struct machine *m, uint32_t cpu);
/* For a scheduler that decides when an interrupt arrives.  Under ipi_hold(), queued calls neither interrupt
 * this CPU nor run until ipi_arrive().  Then its guest exits, or they run at once (their number is returned),
 * or, with interrupts off, they run as soon as interrupts are enabled. */
void ipi_hold(struct machine *m, uint32_t cpu, int hold);
int ipi_arrive(struct machine *m, uint32_t cpu);
/* Return 1 if a call from `cpu` to `target` is not acknowledged yet, so that another call to it would wait.
 * Called by the sender's thread. */
int csd_busy(struct machine *m, uint32_t cpu, uint32_t target);
/* end api */

typedef void ipi_handler(struct machine *m, struct cpu *target, uint64_t argument);

/* Set the handler of a function; IPI_ACK_KICK needs none.  Before threads start. */
void ipi_register(uint32_t function, ipi_handler *handler);

/* Take and run the queue of `target`, which the caller owns (its thread, or SERVICED by the caller).
 * Returns the number of calls. */
int ipi_run_queue(struct machine *m, struct cpu *target);
/* Acknowledge the queue of `target`, which the caller owns, without running it. */
void ipi_discard_queue(struct machine *m, struct cpu *target);
/* Ensure that `target` takes its queue: interrupt it, or service it if it is halted or offline. */
void ipi_kick(struct machine *m, uint32_t cpu, struct cpu *target);
/* Drain the queue at the start of a primitive; cheap while no call is queued.  Relaxed: a hint, since draining
 * looks at the queue itself. */
static inline void ipi_poll(struct machine *m, struct cpu *c)
{
	if (atomic_load_explicit(&c->attention, memory_order_relaxed) & ATTENTION_IPI)
		ipi_drain(m, c->id);
}

/* Return whether ipi_drain() would run a call if interrupts were on. */
bool ipi_queued(const struct cpu *c);

#endif
