/* Inter-processor interrupts: call queues as in kernel/smp.c, the target's side; smp.h sends.
 *
 * A call is a node on the target's lock-free queue.  The sender that makes the queue non-empty interrupts the
 * target; later senders rely on that interrupt.  The target takes the whole queue and runs it in order,
 * synchronous calls first: run, then acknowledge; then the others: acknowledge, then run.  A halted or offline
 * target is serviced by the sender under the HALTED -> SERVICED -> HALTED handshake of cpu.h.  Functions are
 * native, never wait and never send.
 */
#ifndef FLUSHLAB_IPI_H
#define FLUSHLAB_IPI_H

#include "core/cpu_types.h"
#include "core/machine_types.h"
#include "sync/cpu.h"

/* api */
/* calls: anything */
/* The upper 32 bits of the argument name the VM for which the call is made. */
enum ipi_function {
	IPI_ACK_KICK,      /* does nothing: the interrupt is the effect (ack_kick) */
	IPI_VMCS_CLEAR,    /* __loaded_vmcs_clear: argument's lower half is the VMCS */
	IPI_INVEPT_GLOBAL,
	IPI_INVEPT_SINGLE, /* of a new root: argument's lower half is the EP4TA */
	IPI_HV_FLUSH,      /* Hyper-V's, for a hypercall: argument's lower half is the CPU that made it */
	IPI_FUNCTIONS
};

/* Run the calls queued for this CPU now, unless its interrupts are off.  Returns the number of calls. */
int ipi_drain(struct machine *m, uint32_t cpu);
/* For a scheduler that decides when an interrupt arrives.  Under ipi_hold(), queued calls neither interrupt
 * this CPU nor run until ipi_arrive().  Then its guest exits, or they run at once (their number is returned),
 * or, with interrupts off, they run as soon as interrupts are enabled. */
void ipi_hold(struct machine *m, uint32_t cpu, int hold);
int ipi_arrive(struct machine *m, uint32_t cpu);
/* end api */

typedef void ipi_handler(struct machine *m, struct cpu *target, uint64_t argument);

/* Set the handler of a function; IPI_ACK_KICK needs none.  Before threads start. */
void ipi_register(uint32_t function, ipi_handler *handler);

bool ipi_is_registered(uint32_t function);
/* Run a function on a CPU that the caller owns, with the accounting that every call needs. */
void ipi_run_function(struct machine *m, struct cpu *target, uint32_t function, uint64_t argument);

/* Take and run the queue of `target`, which the caller owns (its thread, or SERVICED by the caller).
 * Returns the number of calls. */
int ipi_run_queue(struct machine *m, struct cpu *target);
/* Called in guest mode, by the CPU's thread: run the calls of Hyper-V's, for which the guest does not exit to KVM.
 * Returns whether no other call was queued. */
bool ipi_run_hypervisors(struct machine *m, struct cpu *target);
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
