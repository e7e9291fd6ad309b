#include "sync/ipi.h"

#include <stddef.h>

#include "core/chaos.h"
#include "core/counters.h"
#include "core/cpu_types.h"
#include "core/machine_types.h"
#include "sync/cpu.h"
#include "sync/ipi_internal.h"
#include "sync/smp.h"

/* The orders of P2 and P3 in cpu.h. */
#define SEQ_CST memory_order_seq_cst

/* A function's handler does not depend on the machine: one table, set before threads start.  Atomic because a
 * second machine may be built while the first one runs. */
static _Atomic(ipi_handler *) handlers[IPI_FUNCTIONS];

static void ack_kick(struct machine *m, struct cpu *target, uint64_t argument)
{
	(void)m;
	(void)target;
	(void)argument;
}

static ipi_handler *handler_of(uint32_t function)
{
	if (function >= IPI_FUNCTIONS)
		return NULL;
	if (function == IPI_ACK_KICK)
		return ack_kick;
	/* acquire: pairs with ipi_register */
	return atomic_load_explicit(&handlers[function], memory_order_acquire);
}

void ipi_register(uint32_t function, ipi_handler *handler)
{
	if (function < IPI_FUNCTIONS)
		atomic_store_explicit(&handlers[function], handler, memory_order_release);
}

bool ipi_is_registered(uint32_t function)
{
	return handler_of(function) != NULL;
}

/* --- target's side ---------------------------------------------------------------------------------- */

/* csd_unlock().  Release: the function's effects, before the sender continues. */
static void csd_unlock(struct machine *m, struct csd *csd)
{
	uint32_t sender = csd->sender;

	if (atomic_exchange_explicit(&csd->flags, 0, memory_order_acq_rel) & CSD_WAITED)
		cpu_wake(m, sender);
}

void ipi_run_function(struct machine *m, struct cpu *target, uint32_t function, uint64_t argument)
{
	if (function != IPI_HV_FLUSH) {
		target->kicked |= function != IPI_VMCS_CLEAR;
		target->concerned |= (uint32_t)(argument >> 32) == target->guest_vm;
	}
	target->in_call = 1;
	handler_of(function)(m, target, argument);
	target->in_call = 0;
}

/* Take the queue, oldest first.  The attention bit is cleared before: a call queued in between leaves either
 * its node here or its bit there.  *announced: set if the bit was. */
static struct csd *take_queue(struct machine *m, struct cpu *target, bool *announced)
{
	struct csd *taken, *oldest = NULL;

	if (atomic_load_explicit(&target->attention, SEQ_CST) & ATTENTION_IPI) {
		atomic_fetch_and_explicit(&target->attention, ~(uint32_t)ATTENTION_IPI, SEQ_CST);
		*announced = true;
	}
	chaos_point(m, target->id);
	taken = atomic_exchange_explicit(&target->call_queue, NULL, SEQ_CST);
	while (taken) {
		struct csd *next = taken->next;

		taken->next = oldest;
		oldest = taken;
		taken = next;
	}
	return oldest;
}

/* Count an interrupt that announced these calls, if one did: unless it was Hyper-V's, and not KVM's. */
static void count_received(struct cpu *target, const struct csd *list, bool announced)
{
	bool kvms = !list;

	for (; list && !kvms; list = list->next)
		kvms = list->function != IPI_HV_FLUSH;
	count(target->counters, COUNT_IPIS_RECEIVED, announced && kvms);
}

/* Return whether the sender's call to this CPU and a call of this CPU to the sender are both under way: each
 * may be waiting, and must run the other's call meanwhile. */
static bool crossed(struct machine *m, const struct cpu *target, const struct csd *csd)
{
	return csd->sender < m->config.pcpus && csd_busy(m, target->id, csd->sender);
}

/* Run and acknowledge the synchronous calls of a list; returns the rest of it.  A node's sender may reuse it as
 * soon as it is unlocked. */
static struct csd *run_synchronous(struct machine *m, struct cpu *target, struct csd *list, int *calls)
{
	struct csd *left = NULL, **end = &left;

	for (struct csd *csd = list, *next; csd; csd = next) {
		next = csd->next;
		if (!csd->sync) {
			*end = csd;
			end = &csd->next;
			continue;
		}
		count(target->counters, COUNT_CALLS_CROSSED, crossed(m, target, csd));
		*calls += csd->function != IPI_HV_FLUSH;
		ipi_run_function(m, target, csd->function, csd->argument);
		chaos_point(m, target->id);
		csd_unlock(m, csd);
	}
	*end = NULL;
	return left;
}

/* Put a call back into the queue, as its sender did. */
static void put_back(struct cpu *target, struct csd *csd)
{
	struct csd *head = atomic_load_explicit(&target->call_queue, memory_order_relaxed);

	do {
		csd->next = head;
	} while (!atomic_compare_exchange_weak_explicit(&target->call_queue, &head, csd, SEQ_CST,
							memory_order_relaxed));
}

/* A sender that finds the queue empty meanwhile interrupts this CPU itself.  The bit for the calls that are put back is
 * set after them, as a sender does. */
bool ipi_run_hypervisors(struct machine *m, struct cpu *target)
{
	bool only = true, announced = false;

	for (struct csd *csd = take_queue(m, target, &announced), *next; csd; csd = next) {
		next = csd->next;
		if (csd->function == IPI_HV_FLUSH) {
			ipi_run_function(m, target, csd->function, csd->argument);
			chaos_point(m, target->id);
			csd_unlock(m, csd);
		} else {
			put_back(target, csd);
			only = false;
		}
	}
	if (!only)
		atomic_fetch_or_explicit(&target->attention, ATTENTION_IPI, SEQ_CST);
	return only;
}

/* __flush_smp_call_function_queue() (kernel/smp.c) */
static int run_queue(struct machine *m, struct cpu *target, bool announced)
{
	struct csd *list = take_queue(m, target, &announced);
	int calls = 0;

	count_received(target, list, announced);
	list = run_synchronous(m, target, list, &calls);
	for (struct csd *next; list; list = next) {
		uint32_t function = list->function;
		uint64_t argument = list->argument;

		next = list->next;
		csd_unlock(m, list);
		chaos_point(m, target->id);
		ipi_run_function(m, target, function, argument);
		calls++;
	}
	if (calls)
		count(target->counters, COUNT_CALLS_RUN, (uint64_t)calls);
	return calls;
}

int ipi_run_queue(struct machine *m, struct cpu *target)
{
	return run_queue(m, target, false);
}

void ipi_discard_queue(struct machine *m, struct cpu *target)
{
	bool announced = false;
	struct csd *list = take_queue(m, target, &announced);

	count_received(target, list, announced);
	for (struct csd *next; list; list = next) {
		next = list->next;
		csd_unlock(m, list);
	}
}

bool ipi_queued(const struct cpu *c)
{
	return atomic_load_explicit(&c->call_queue, SEQ_CST) != NULL;
}

int ipi_drain(struct machine *m, uint32_t cpu)
{
	struct cpu *c = &m->cpus[cpu];

	if (c->irqs_off || c->in_call)
		return 0;
	if (c->calls_held && !(atomic_load_explicit(&c->attention, SEQ_CST) & ATTENTION_IPI))
		return 0;
	/* The bit may be set after its call was already taken; it is cleared all the same. */
	if (!ipi_queued(c) && !(atomic_load_explicit(&c->attention, SEQ_CST) & ATTENTION_IPI))
		return 0;
	/* An offline CPU's queue is acknowledged by its senders. */
	if (atomic_load_explicit(&c->power, SEQ_CST) != CPU_RUNNING)
		return 0;
	return ipi_run_queue(m, c);
}

void ipi_hold(struct machine *m, uint32_t cpu, int hold)
{
	m->cpus[cpu].calls_held = hold != 0;
}

int ipi_arrive(struct machine *m, uint32_t cpu)
{
	atomic_fetch_or_explicit(&m->cpus[cpu].attention, ATTENTION_IPI, SEQ_CST);
	return ipi_drain(m, cpu);
}

/* --- making a target take its queue --------------------------------------------------------------------- */

/* Run the queue of a halted target, which the caller has taken to SERVICED. */
static void service(struct machine *m, struct cpu *target)
{
	int calls = run_queue(m, target, true);

	count(target->counters, COUNT_CALLS_SERVICED, (uint64_t)calls);
}

void ipi_kick(struct machine *m, uint32_t cpu, struct cpu *target)
{
	if (target->calls_held)
		return; /* the interrupt is on its way until ipi_arrive() */
	for (;;) {
		uint32_t power = atomic_load_explicit(&target->power, SEQ_CST);
		uint32_t found = power;

		if (power == CPU_RUNNING || power == CPU_GUEST_HALTED) {
			chaos_point(m, cpu);
			atomic_fetch_or_explicit(&target->attention, ATTENTION_IPI, SEQ_CST);
			/* P5 */
			if (atomic_load_explicit(&target->power, SEQ_CST) == CPU_GUEST_HALTED)
				cpu_wake(m, target->id);
			return;
		}
		if (power == CPU_SERVICED)
			return; /* P3: the CPU that services it looks again afterwards */
		if (!atomic_compare_exchange_strong_explicit(&target->power, &found, CPU_SERVICED, SEQ_CST,
							     SEQ_CST))
			continue;
		chaos_point(m, cpu);
		if (power == CPU_HALTED)
			service(m, target);
		else
			ipi_discard_queue(m, target);
		atomic_store_explicit(&target->power, power, SEQ_CST);
		chaos_point(m, cpu);
		if (!ipi_queued(target))
			return;
	}
}
