#include "sync/smp.h"

#include <string.h>

#include "core/chaos.h"
#include "core/counters.h"
#include "core/cpu_types.h"
#include "core/events.h"
#include "core/heap.h"
#include "core/machine_types.h"
#include "sync/cpu.h"
#include "sync/ipi.h"
#include "sync/ipi_internal.h"

/* The orders of P2 and P3 in cpu.h. */
#define SEQ_CST memory_order_seq_cst

/* A call, before it is copied into nodes. */
struct call {
	uint32_t function;
	uint32_t sync;
	bool wait;
	uint64_t argument;
};

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
	c->calls_sent = heap_zalloc(m->heap, 2 * words, sizeof(*c->calls_sent));
	if (!c->calls_sent)
		return MACHINE_NOMEM;
	c->calls_kick = c->calls_sent + words;
	c->csds = heap_zalloc_lines(m->heap, targets, sizeof(*c->csds));
	if (!c->csds) {
		heap_free(m->heap, c->calls_sent);
		c->calls_sent = NULL;
		return MACHINE_NOMEM;
	}
	return 0;
}

static int may_send(struct machine *m, uint32_t cpu, uint32_t function, const char *what)
{
	int r = cpu_may_wait(m, cpu, what);

	if (r)
		return r;
	if (!ipi_is_registered(function))
		return cpu_misuse(m, cpu, "%s on CPU %u: nothing registered for function %u", what, cpu,
				  function);
	if (cpu_power(m, cpu) == CPU_OFFLINE)
		return MACHINE_OFFLINE;
	ipi_drain(m, cpu);
	return allocate_calls(m, &m->cpus[cpu]);
}

/* Queue one call.  1: the target must be kicked; 0: the sender of an earlier call in the queue does that. */
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
	count(c->counters, COUNT_CSD_QUEUED, call->function != IPI_HV_FLUSH);
	if (head)
		return 0;
	count(c->counters, COUNT_IPIS_SENT, call->function != IPI_HV_FLUSH);
	count(c->counters, COUNT_IPIS_VMCLEAR, call->function == IPI_VMCS_CLEAR);
	return 1;
}

static bool cpu_is_offline(struct machine *m, uint32_t cpu)
{
	return cpu_power(m, cpu) == CPU_OFFLINE;
}

/* Queue the call for every target of the mask (NULL: all), and interrupt the running ones.  Targets that must
 * be serviced are left for kick_mask(), so that no running target is delayed by them.  Returns the number of
 * targets. */
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

/* Run the call on the caller's own CPU, with interrupts off: in_call makes waiting, sending and draining
 * impossible. */
static void call_locally(struct machine *m, struct cpu *c, const struct call *call)
{
	ipi_run_function(m, c, call->function, call->argument);
}

/* Record in the sender's ring an event for each word of the mask that has a target. */
static void note_calls(struct machine *m, const struct cpu *c, int targets, const struct call *call)
{
	uint32_t how = call->function | (call->wait ? EVENT_IPI_WAITS : 0);

	for (uint64_t word = 0; targets > 0 && word < (m->config.pcpus + 63) / 64; word++)
		if (c->calls_sent[word])
			event_record_more(m, c->id, EVENT_IPI, c->calls_sent[word], (uint64_t)targets,
					  how | word << EVENT_IPI_WORD);
}

/* smp_call_function_many_cond() (kernel/smp.c); run_local is SCF_RUN_LOCAL. */
static int call_many(struct machine *m, uint32_t cpu, const uint64_t *mask, const struct call *call,
		     bool run_local)
{
	struct cpu *c = &m->cpus[cpu];
	bool kvms = call->function != IPI_HV_FLUSH;
	uint64_t began = call->wait && kvms ? monotonic_ns() : 0;
	int targets, r = 0;

	memset(c->calls_sent, 0, 2 * sizeof(*c->calls_sent) * ((m->config.pcpus + 63) / 64));
	targets = queue_mask(m, c, mask, call);
	if (kvms)
		note_calls(m, c, targets, call);
	/* Even if we give up: other senders may have queued behind us and rely on our kick. */
	kick_mask(m, c);
	if (targets < 0)
		return targets;
	if (run_local)
		call_locally(m, c, call);
	if (call->wait && targets) {
		r = wait_mask(m, c);
		if (kvms)
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
	event_record_more(m, cpu, EVENT_IPI, UINT64_C(1) << target % 64, 1,
			  function | (wait ? EVENT_IPI_WAITS : 0) | target / 64 << EVENT_IPI_WORD);
	r = queue_call(m, c, target, &call);
	if (r > 0)
		ipi_kick(m, cpu, &m->cpus[target]);
	if (r >= 0 && call.wait) {
		r = csd_lock_wait(m, cpu, &c->csds[target]);
		histogram_record(m, cpu, HISTOGRAM_IPI_WAIT, monotonic_ns() - began);
	}
	return r < 0 ? r : 1;
}
