#include "ipi.h"

#include <stdlib.h>
#include <string.h>

#include "oracle.h"
#include "vm.h"

/* The orders of P2 and P3 in cpu.h. */
#define SEQ_CST memory_order_seq_cst

enum csd_flags {
	CSD_LOCKED = 1, /* in use: queued or being run */
	CSD_WAITED = 2, /* the sender sleeps until it is unlocked */
};

/* One per sender and target (cfd_data in kernel/smp.c), so that queueing never allocates.
 *
 * The plain fields are written by the sender before it queues the node (release, acquired by whoever takes
 * the queue) and read before the node is unlocked (release, acquired by csd_lock_wait).
 */
struct csd {
	alignas(CACHELINE) struct csd *next;
	_Atomic uint32_t flags;
	uint32_t sender;
	uint32_t function;
	uint32_t sync;
	uint64_t argument;
};

/* What to call, before it is copied into nodes. */
struct call {
	uint32_t function;
	uint32_t sync;
	bool wait;
	uint64_t argument;
};

/* What a function does does not depend on the machine: one table, set before threads start.  Atomic because a
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

/* --- target's side ---------------------------------------------------------------------------------- */

/* csd_unlock().  Release: what the function did, before the sender goes on. */
static void csd_unlock(struct machine *m, struct csd *csd)
{
	uint32_t sender = csd->sender;

	if (atomic_exchange_explicit(&csd->flags, 0, memory_order_acq_rel) & CSD_WAITED)
		cpu_wake(m, sender);
}

/* The VM on whose behalf a call is made (ipi.h). */
static uint32_t vm_of_call(const struct machine *m, uint32_t function, uint64_t argument)
{
	return function == IPI_VMCS_CLEAR && argument < m->config.vcpus ? m->vcpus[argument].vm
									: (uint32_t)(argument >> 32);
}

static void run_function(struct machine *m, struct cpu *target, uint32_t function, uint64_t argument)
{
	target->kicked |= function != IPI_VMCS_CLEAR;
	target->concerned |= vm_of_call(m, function, argument) == target->guest_vm;
	target->in_call = 1;
	handler_of(function)(m, target, argument);
	target->in_call = 0;
}

/* Take the queue, oldest first.  The attention bit is cleared before: a call queued in between leaves
 * either its node here or its bit there.  announced: by an interrupt that needed no bit. */
static struct csd *take_queue(struct machine *m, struct cpu *target, bool announced)
{
	struct csd *taken, *oldest = NULL;

	if (atomic_load_explicit(&target->attention, SEQ_CST) & ATTENTION_IPI) {
		atomic_fetch_and_explicit(&target->attention, ~(uint32_t)ATTENTION_IPI, SEQ_CST);
		announced = true;
	}
	if (announced)
		count(target->counters, COUNT_IPIS_RECEIVED, 1);
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

/* Run and acknowledge the synchronous calls of a list; returns what is left of it.  A node's sender may reuse it
 * as soon as it is unlocked. */
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
		run_function(m, target, csd->function, csd->argument);
		chaos_point(m, target->id);
		csd_unlock(m, csd);
		++*calls;
	}
	*end = NULL;
	return left;
}

/* __flush_smp_call_function_queue() */
static int run_queue(struct machine *m, struct cpu *target, bool announced)
{
	struct csd *list = take_queue(m, target, announced);
	int calls = 0;

	list = run_synchronous(m, target, list, &calls);
	for (struct csd *next; list; list = next) {
		uint32_t function = list->function;
		uint64_t argument = list->argument;

		next = list->next;
		csd_unlock(m, list);
		chaos_point(m, target->id);
		run_function(m, target, function, argument);
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
	for (struct csd *csd = take_queue(m, target, false), *next; csd; csd = next) {
		next = csd->next;
		csd_unlock(m, csd);
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
	/* The bit may come after its call was already taken: cleared here all the same. */
	if (!ipi_queued(c) && !(atomic_load_explicit(&c->attention, SEQ_CST) & ATTENTION_IPI))
		return 0;
	/* An offline CPU's queue is its senders' business. */
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

/* --- sender's side ---------------------------------------------------------------------------------- */

/* On behalf of a halted target, which the caller has taken to SERVICED. */
static void service(struct machine *m, struct cpu *target)
{
	int calls = run_queue(m, target, true);

	count(target->counters, COUNT_CALLS_SERVICED, (uint64_t)calls);
}

void ipi_kick(struct machine *m, uint32_t cpu, struct cpu *target)
{
	if (target->calls_held)
		return; /* on its way, for as long as ipi_arrive() likes */
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
			return; /* P3: who serves it looks again afterwards */
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

/* csd_lock_wait().  Asks to be woken only when it is about to sleep: the bit is set while the node is still
 * locked, so the unlocker finds it, and the event was read before. */
static int csd_lock_wait(struct machine *m, uint32_t cpu, struct csd *csd)
{
	struct wait w;
	int r;

	/* acquire: pairs with csd_unlock */
	if (!atomic_load_explicit(&csd->flags, memory_order_acquire))
		return 0;
	w = wait_begin(m, cpu);
	for (;;) {
		uint32_t flags = atomic_load_explicit(&csd->flags, memory_order_acquire);

		while (w.sleeps && flags == CSD_LOCKED &&
		       !atomic_compare_exchange_weak_explicit(&csd->flags, &flags, CSD_LOCKED | CSD_WAITED,
							      SEQ_CST, memory_order_acquire))
			;
		if (!flags)
			return 0;
		r = wait_turn(&w);
		if (r)
			return r;
	}
}

int csd_busy(struct machine *m, uint32_t cpu, uint32_t target)
{
	const struct cpu *c = &m->cpus[cpu];

	/* acquire: pairs with csd_unlock */
	return c->csds && atomic_load_explicit(&c->csds[target].flags, memory_order_acquire) != 0;
}

static struct call new_call(uint32_t function, uint64_t argument, int wait)
{
	return (struct call){ .function = function, .argument = argument, .sync = wait != IPI_NO_WAIT,
			      .wait = wait == IPI_WAIT };
}

static int allocate_calls(struct machine *m, struct cpu *c)
{
	size_t targets = m->config.pcpus, words = (targets + 63) / 64;

	if (c->csds)
		return 0;
	c->calls_sent = calloc(2 * words, sizeof(*c->calls_sent));
	if (!c->calls_sent)
		return MACHINE_NOMEM;
	c->calls_kick = c->calls_sent + words;
	c->csds = aligned_alloc(CACHELINE, targets * sizeof(*c->csds));
	if (!c->csds) {
		free(c->calls_sent);
		c->calls_sent = NULL;
		return MACHINE_NOMEM;
	}
	memset(c->csds, 0, targets * sizeof(*c->csds));
	return 0;
}

static int may_send(struct machine *m, uint32_t cpu, uint32_t function, const char *what)
{
	int r = cpu_may_wait(m, cpu, what);

	if (r)
		return r;
	if (!handler_of(function))
		return cpu_misuse(m, cpu, "%s on CPU %u: nothing registered for function %u", what, cpu,
				  function);
	if (cpu_power(m, cpu) == CPU_OFFLINE)
		return MACHINE_OFFLINE;
	ipi_drain(m, cpu);
	return allocate_calls(m, &m->cpus[cpu]);
}

/* Queue one call.  1: the target must be kicked; 0: somebody queued before and does that. */
static int queue_call(struct machine *m, struct cpu *c, uint32_t target, const struct call *call)
{
	struct cpu *t = &m->cpus[target];
	struct csd *csd = &c->csds[target], *head;
	int r = csd_lock_wait(m, c->id, csd);

	if (r)
		return r;
	/* relaxed: queueing publishes it */
	atomic_store_explicit(&csd->flags, CSD_LOCKED, memory_order_relaxed);
	csd->sender = c->id;
	csd->function = call->function;
	csd->argument = call->argument;
	csd->sync = call->sync;
	chaos_point(m, c->id);
	head = atomic_load_explicit(&t->call_queue, memory_order_relaxed);
	do {
		csd->next = head;
	} while (!atomic_compare_exchange_weak_explicit(&t->call_queue, &head, csd, SEQ_CST,
							memory_order_relaxed));
	count(c->counters, COUNT_CSD_QUEUED, 1);
	if (head)
		return 0;
	count(c->counters, COUNT_IPIS_SENT, 1);
	count(c->counters, COUNT_IPIS_VMCLEAR, call->function == IPI_VMCS_CLEAR);
	return 1;
}

static bool cpu_is_offline(struct machine *m, uint32_t cpu)
{
	return cpu_power(m, cpu) == CPU_OFFLINE;
}

/* Queue the call for every target of the mask (NULL: all), and interrupt those that run.  Targets that
 * must be served are left for kick_mask(): nobody who runs waits for them.  Returns how many. */
static int queue_mask(struct machine *m, struct cpu *c, const uint64_t *mask, const struct call *call)
{
	int targets = 0;

	for (uint32_t target = 0; target < m->config.pcpus; target++) {
		uint64_t bit = 1ull << (target % 64);
		int r;

		if (mask && !(mask[target / 64] & bit)) {
			if (!mask[target / 64])
				target |= 63;
			continue;
		}
		if (target == c->id || cpu_is_offline(m, target))
			continue;
		r = queue_call(m, c, target, call);
		if (r < 0)
			return r;
		targets++;
		c->calls_sent[target / 64] |= bit;
		if (r && cpu_power(m, target) == CPU_RUNNING)
			ipi_kick(m, c->id, &m->cpus[target]);
		else if (r)
			c->calls_kick[target / 64] |= bit;
	}
	return targets;
}

static void kick_mask(struct machine *m, struct cpu *c)
{
	uint32_t words = (m->config.pcpus + 63) / 64;

	for (uint32_t i = 0; i < words; i++)
		for (uint64_t bits = c->calls_kick[i]; bits; bits &= bits - 1)
			ipi_kick(m, c->id, &m->cpus[i * 64 + (uint32_t)__builtin_ctzll(bits)]);
}

static int wait_mask(struct machine *m, struct cpu *c)
{
	uint32_t words = (m->config.pcpus + 63) / 64;

	for (uint32_t i = 0; i < words; i++) {
		for (uint64_t bits = c->calls_sent[i]; bits; bits &= bits - 1) {
			uint32_t target = i * 64 + (uint32_t)__builtin_ctzll(bits);
			int r = csd_lock_wait(m, c->id, &c->csds[target]);

			if (r)
				return r;
		}
	}
	return 0;
}

/* On the caller's own CPU, with interrupts off: in_call makes waiting, sending and draining impossible. */
static void call_locally(struct machine *m, struct cpu *c, const struct call *call)
{
	run_function(m, c, call->function, call->argument);
}

/* smp_call_function_many_cond(); run_local is SCF_RUN_LOCAL. */
static int call_many(struct machine *m, uint32_t cpu, const uint64_t *mask, const struct call *call,
		     bool run_local)
{
	struct cpu *c = &m->cpus[cpu];
	uint64_t began = call->wait ? monotonic_ns() : 0;
	int targets, r = 0;

	memset(c->calls_sent, 0, 2 * sizeof(*c->calls_sent) * ((m->config.pcpus + 63) / 64));
	targets = queue_mask(m, c, mask, call);
	if (targets > 0)
		event_record_more(m, cpu, EVENT_IPI, c->calls_sent[0], (uint64_t)targets, call->function);
	/* Even if we give up: others may have queued behind us and count on our kick. */
	kick_mask(m, c);
	if (targets < 0)
		return targets;
	if (run_local)
		call_locally(m, c, call);
	if (call->wait && targets) {
		r = wait_mask(m, c);
		histogram_record(m, cpu, HISTOGRAM_IPI_WAIT, monotonic_ns() - began);
	}
	return r ? r : targets + run_local;
}

int smp_call_function_many(struct machine *m, uint32_t cpu, const uint64_t *mask, uint32_t function,
			   uint64_t argument, int wait)
{
	struct call call = new_call(function, argument, wait);
	int r = may_send(m, cpu, function, "smp_call_function_many");

	return r ? r : call_many(m, cpu, mask, &call, false);
}

int on_each_cpu(struct machine *m, uint32_t cpu, uint32_t function, uint64_t argument, int wait)
{
	struct call call = new_call(function, argument, wait);
	int r = may_send(m, cpu, function, "on_each_cpu");

	return r ? r : call_many(m, cpu, NULL, &call, cpu_is_target(m, cpu));
}

int smp_call_function_single(struct machine *m, uint32_t cpu, uint32_t target, uint32_t function,
			     uint64_t argument, int wait)
{
	struct call call = new_call(function, argument, wait);
	struct cpu *c = &m->cpus[cpu];
	uint64_t began = call.wait ? monotonic_ns() : 0;
	int r = may_send(m, cpu, function, "smp_call_function_single");

	if (r)
		return r;
	if (!cpu_is_target(m, target))
		return cpu_misuse(m, cpu, "smp_call_function_single on CPU %u: CPU %u is not a pCPU", cpu,
				  target);
	if (target == cpu) {
		call_locally(m, c, &call);
		return 1;
	}
	if (cpu_is_offline(m, target))
		return 0;
	event_record_more(m, cpu, EVENT_IPI, target < 64 ? UINT64_C(1) << target : 0, 1, function);
	r = queue_call(m, c, target, &call);
	if (r > 0)
		ipi_kick(m, cpu, &m->cpus[target]);
	if (r >= 0 && call.wait) {
		r = csd_lock_wait(m, cpu, &c->csds[target]);
		histogram_record(m, cpu, HISTOGRAM_IPI_WAIT, monotonic_ns() - began);
	}
	return r < 0 ? r : 1;
}
