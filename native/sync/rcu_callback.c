/* call_rcu(): callbacks, from the CPU that queues them to the RCU thread that runs them. */
#include "sync/rcu_callback.h"

#include "core/chaos.h"
#include "core/counters.h"
#include "core/cpu_types.h"
#include "core/heap.h"
#include "core/machine_types.h"
#include "sync/cpu.h"
#include "sync/rcu.h"
#include "sync/rcu_internal.h"
#include "sync/waiters.h"

#define SEQ_CST memory_order_seq_cst

struct rcu_chunk {
	struct rcu_chunk *next;
	struct rcu_head heads[126];
};

/* One table for all machines, as the handlers of ipi.c. */
static _Atomic(rcu_handler *) handlers[RCU_CALLBACKS];

static void rcu_nothing(struct machine *m, struct cpu *cpu, uint64_t argument)
{
	(void)m;
	(void)cpu;
	(void)argument;
}

static _Atomic uint64_t kernel_function;

static void rcu_function(struct machine *m, struct cpu *cpu, uint64_t argument)
{
	/* acquire: pairs with rcu_set_function */
	uint64_t function = atomic_load_explicit(&kernel_function, memory_order_acquire);

	(void)m;
	((void (*)(uint32_t, uint64_t))(uintptr_t)function)(cpu->id, argument);
}

void rcu_set_function(uint64_t function)
{
	atomic_store_explicit(&kernel_function, function, memory_order_release);
	rcu_register(RCU_FUNCTION, rcu_function);
}

static rcu_handler *handler_of(uint32_t callback)
{
	if (callback >= RCU_CALLBACKS)
		return NULL;
	if (callback == RCU_NOTHING)
		return rcu_nothing;
	/* acquire: pairs with rcu_register */
	return atomic_load_explicit(&handlers[callback], memory_order_acquire);
}

void rcu_register(uint32_t callback, rcu_handler *handler)
{
	if (callback < RCU_CALLBACKS)
		atomic_store_explicit(&handlers[callback], handler, memory_order_release);
}

static struct rcu_head *new_nodes(struct machine *m, struct cpu *c)
{
	struct rcu_chunk *chunk = heap_zalloc(m->heap, 1, sizeof(*chunk));
	size_t n = sizeof(chunk->heads) / sizeof(chunk->heads[0]);

	if (!chunk)
		return NULL;
	chunk->next = c->rcu_chunks;
	c->rcu_chunks = chunk;
	for (size_t i = 0; i < n; i++) {
		chunk->heads[i].owner = c->id;
		chunk->heads[i].next = i + 1 < n ? &chunk->heads[i + 1] : NULL;
	}
	return chunk->heads;
}

static struct rcu_head *take_node(struct machine *m, struct cpu *c)
{
	struct rcu_head *head = c->rcu_free;

	if (!head) /* acquire: pairs with give_node */
		head = atomic_exchange_explicit(&c->rcu_returned, NULL, memory_order_acquire);
	if (!head)
		head = new_nodes(m, c);
	if (head)
		c->rcu_free = head->next;
	return head;
}

/* Return the former top.  Stacks are emptied as a whole, so there is no ABA. */
static struct rcu_head *push(_Atomic(struct rcu_head *) *stack, struct rcu_head *head)
{
	struct rcu_head *top = atomic_load_explicit(stack, memory_order_relaxed);

	do {
		head->next = top;
	} while (!atomic_compare_exchange_weak_explicit(stack, &top, head, SEQ_CST, memory_order_relaxed));
	return top;
}

int call_rcu(struct machine *m, uint32_t cpu, uint32_t callback, uint64_t argument)
{
	struct cpu *c = &m->cpus[cpu];
	struct rcu_head *head;

	if (!handler_of(callback))
		return cpu_misuse(m, cpu, "call_rcu on CPU %u: nothing registered for callback %u", cpu,
				  callback);
	head = take_node(m, c);
	if (!head)
		return MACHINE_NOMEM;
	head->callback = callback;
	head->argument = argument;
	count(c->counters, COUNT_RCU_CALLBACKS, 1);
	atomic_fetch_add_explicit(&m->rcu->queued, 1, SEQ_CST);
	chaos_point(m, cpu);
	if (!push(&m->rcu->pending, head))
		rcu_wake_thread(m);
	return 0;
}

uint64_t rcu_pending(struct machine *m)
{
	/* invoked first: callbacks that run in between must not make the difference negative */
	uint64_t invoked = atomic_load_explicit(&m->rcu->invoked, SEQ_CST);

	return atomic_load_explicit(&m->rcu->queued, SEQ_CST) - invoked;
}

struct rcu_head *rcu_take_pending(struct rcu *rcu)
{
	/* acquire: pairs with push */
	struct rcu_head *taken = atomic_exchange_explicit(&rcu->pending, NULL, SEQ_CST), *oldest = NULL;

	while (taken) {
		struct rcu_head *next = taken->next;

		taken->next = oldest;
		oldest = taken;
		taken = next;
	}
	return oldest;
}

void rcu_invoke(struct machine *m, uint32_t cpu, struct rcu_head *list)
{
	struct cpu *c = &m->cpus[cpu];

	for (struct rcu_head *next; list; list = next) {
		next = list->next;
		handler_of(list->callback)(m, c, list->argument);
		push(&m->cpus[list->owner].rcu_returned, list);
		count(c->counters, COUNT_RCU_INVOKED, 1);
		atomic_fetch_add_explicit(&m->rcu->invoked, 1, SEQ_CST);
	}
	waiters_wake(m, &m->rcu->waiters);
}

void rcu_free_nodes(struct machine *m)
{
	for (uint32_t cpu = 0; cpu < m->cpu_count; cpu++) {
		struct rcu_chunk *chunk = m->cpus[cpu].rcu_chunks;

		while (chunk) {
			struct rcu_chunk *next = chunk->next;

			heap_free(m->heap, chunk);
			chunk = next;
		}
		m->cpus[cpu].rcu_chunks = NULL;
	}
}
