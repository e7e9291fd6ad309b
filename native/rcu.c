#include "rcu.h"

#include <stdlib.h>

#include "ipi.h"
#include "vm.h"

#define SEQ_CST memory_order_seq_cst

/* A callback that was queued.  Nodes go round: the owner's list, the pending stack, the RCU thread, the owner's
 * stack of returned ones.  Their number is what was pending at most. */
struct rcu_head {
	struct rcu_head *next;
	uint32_t owner;
	uint32_t callback;
	uint64_t argument;
};

struct rcu_chunk {
	struct rcu_chunk *next;
	struct rcu_head heads[126];
};

struct rcu {
	/* read by every reader, written once a grace period */
	alignas(CACHELINE) _Atomic uint64_t gp_seq; /* the last one that began; never 0 */
	alignas(CACHELINE) _Atomic uint64_t gp_completed;
	_Atomic uint64_t gp_wanted; /* somebody waits for this one */
	_Atomic int32_t thread;     /* CPU of rcu_thread(), -1: none */
	_Atomic int32_t holdout;
	struct waiters waiters; /* for a grace period or for callbacks */
	struct rcu_head *stepped; /* callbacks of the grace period that rcu_gp_begin() began */
	uint64_t stepped_gp;      /* ... and its number, 0: none */
	alignas(CACHELINE) _Atomic(struct rcu_head *) pending;
	_Atomic uint64_t queued;
	alignas(CACHELINE) _Atomic uint64_t invoked;
};

/* As handlers of ipi.c. */
static _Atomic(rcu_handler *) handlers[RCU_CALLBACKS];

static void rcu_nothing(struct machine *m, struct cpu *cpu, uint64_t argument)
{
	(void)m;
	(void)cpu;
	(void)argument;
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

/* --- readers ---------------------------------------------------------------------------------------- */

/* Reader and RCU thread both read-modify-write rcu_snapshot.  If the reader's comes first, the thread sees
 * its grace period and waits.  If the thread's comes first, the reader acquires from it, and so sees whatever
 * was removed before the grace period began.  gp_seq is acquired for the same: who reads the number of a grace
 * period need not be waited for by it. */
void rcu_read_lock(struct machine *m, uint32_t cpu)
{
	struct cpu *c = &m->cpus[cpu];

	if (c->rcu_depth++)
		return;
	ipi_poll(m, c);
	atomic_exchange_explicit(&c->rcu_snapshot,
				 atomic_load_explicit(&m->rcu->gp_seq, memory_order_acquire),
				 memory_order_acq_rel);
}

void rcu_read_unlock(struct machine *m, uint32_t cpu)
{
	struct cpu *c = &m->cpus[cpu];

	if (!c->rcu_depth) {
		cpu_misuse(m, cpu, "rcu_read_unlock on CPU %u outside a read section", cpu);
		return;
	}
	if (--c->rcu_depth)
		return;
	/* release: the section is over for whoever reads 0, or what we store at the next lock */
	atomic_store_explicit(&c->rcu_snapshot, 0, memory_order_release);
}

void rcu_cpu_offline(struct cpu *cpu)
{
	cpu->rcu_depth = 0;
	atomic_store_explicit(&cpu->rcu_snapshot, 0, memory_order_release);
}

/* --- call_rcu --------------------------------------------------------------------------------------- */

/* P1 for the RCU thread: what it looks at was changed before. */
static void wake_thread(struct machine *m)
{
	int32_t thread = atomic_load_explicit(&m->rcu->thread, SEQ_CST);

	if (thread >= 0)
		cpu_wake(m, (uint32_t)thread);
}

static struct rcu_head *new_nodes(struct cpu *c)
{
	struct rcu_chunk *chunk = malloc(sizeof(*chunk));
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

static struct rcu_head *take_node(struct cpu *c)
{
	struct rcu_head *head = c->rcu_free;

	if (!head) /* acquire: pairs with give_node */
		head = atomic_exchange_explicit(&c->rcu_returned, NULL, memory_order_acquire);
	if (!head)
		head = new_nodes(c);
	if (head)
		c->rcu_free = head->next;
	return head;
}

/* Returns what was on top before.  Stacks are emptied as a whole, so there is no ABA. */
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
	head = take_node(c);
	if (!head)
		return MACHINE_NOMEM;
	head->callback = callback;
	head->argument = argument;
	count(c->counters, COUNT_RCU_CALLBACKS, 1);
	atomic_fetch_add_explicit(&m->rcu->queued, 1, SEQ_CST);
	chaos_point(m, cpu);
	if (!push(&m->rcu->pending, head))
		wake_thread(m);
	return 0;
}

uint64_t rcu_pending(struct machine *m)
{
	/* invoked first: what runs in between must not make the difference negative */
	uint64_t invoked = atomic_load_explicit(&m->rcu->invoked, SEQ_CST);

	return atomic_load_explicit(&m->rcu->queued, SEQ_CST) - invoked;
}

int rcu_holdout(struct machine *m)
{
	return atomic_load_explicit(&m->rcu->holdout, memory_order_relaxed);
}

/* --- waiting for grace periods ---------------------------------------------------------------------- */

int may_synchronize(struct machine *m, uint32_t cpu, const char *what)
{
	const struct cpu *c = &m->cpus[cpu];
	int r = cpu_may_wait(m, cpu, what);

	if (r)
		return r;
	if (c->rcu_depth)
		return cpu_misuse(m, cpu, "%s on CPU %u inside an RCU read section", what, cpu);
	if (c->locks_held)
		return cpu_misuse(m, cpu, "%s on CPU %u under mmu_lock", what, cpu);
	ipi_drain(m, cpu);
	return 0;
}

/* Wait until *count has reached `target`. */
static int wait_count(struct machine *m, uint32_t cpu, _Atomic uint64_t *count, uint64_t target)
{
	struct wait w = wait_begin(m, cpu);

	for (;;) {
		int r;

		waiters_add(&m->rcu->waiters, cpu);
		if (atomic_load_explicit(count, SEQ_CST) >= target)
			return 0;
		r = wait_turn(&w);
		if (r)
			return r;
	}
}

int synchronize_rcu(struct machine *m, uint32_t cpu)
{
	struct rcu *rcu = m->rcu;
	int r = may_synchronize(m, cpu, "synchronize_rcu");
	uint64_t target, wanted;

	if (r)
		return r;
	/* A read-modify-write: the thread's next one on gp_seq reads from it, so what we removed happens
	 * before that grace period begins.  The one that has begun does not count. */
	target = atomic_fetch_add_explicit(&rcu->gp_seq, 0, memory_order_acq_rel) + 1;
	wanted = atomic_load_explicit(&rcu->gp_wanted, SEQ_CST);
	while (wanted < target &&
	       !atomic_compare_exchange_weak_explicit(&rcu->gp_wanted, &wanted, target, SEQ_CST, SEQ_CST))
		;
	wake_thread(m);
	return wait_count(m, cpu, &rcu->gp_completed, target);
}

int rcu_barrier(struct machine *m, uint32_t cpu)
{
	int r = may_synchronize(m, cpu, "rcu_barrier");

	if (r)
		return r;
	/* Callbacks run in the order of the stack, and are counted before they are pushed: once so many ran,
	 * all that were pushed before now have. */
	return wait_count(m, cpu, &m->rcu->invoked, atomic_load_explicit(&m->rcu->queued, SEQ_CST));
}

/* --- the thread ------------------------------------------------------------------------------------- */

/* acq_rel: see rcu_read_lock */
static bool is_quiescent(struct cpu *c, uint64_t gp)
{
	uint64_t snapshot = atomic_fetch_add_explicit(&c->rcu_snapshot, 0, memory_order_acq_rel);

	return snapshot == 0 || snapshot >= gp;
}

/* Readers do not say when they leave (that would cost each of them), so this looks, ever less often. */
static int wait_quiescent(struct machine *m, uint32_t cpu, struct cpu *reader, uint64_t gp)
{
	struct wait w = wait_begin(m, cpu);
	int r = 0;

	w.ignore_stop = true;
	w.sleep_ns = 20000;
	while (!r && !is_quiescent(reader, gp)) {
		atomic_store_explicit(&m->rcu->holdout, (int32_t)reader->id, memory_order_relaxed);
		if (w.sleeps && w.sleep_ns < 1000000)
			w.sleep_ns *= 2;
		r = wait_turn(&w);
	}
	atomic_store_explicit(&m->rcu->holdout, -1, memory_order_relaxed);
	return r;
}

static int grace_period(struct machine *m, uint32_t cpu)
{
	struct rcu *rcu = m->rcu;
	uint64_t began = monotonic_ns();
	uint64_t gp = atomic_fetch_add_explicit(&rcu->gp_seq, 1, memory_order_acq_rel) + 1;

	chaos_point(m, cpu);
	for (uint32_t reader = 0; reader < m->cpu_count; reader++) {
		int r = wait_quiescent(m, cpu, &m->cpus[reader], gp);

		if (r)
			return r;
	}
	chaos_point(m, cpu);
	atomic_store_explicit(&rcu->gp_completed, gp, SEQ_CST);
	waiters_wake(m, &rcu->waiters);
	count(m->cpus[cpu].counters, COUNT_GRACE_PERIODS, 1);
	histogram_record(m, cpu, HISTOGRAM_GRACE_PERIOD, monotonic_ns() - began);
	return 0;
}

static struct rcu_head *take_pending(struct rcu *rcu)
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

static void invoke(struct machine *m, uint32_t cpu, struct rcu_head *list)
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

static bool is_wanted(struct rcu *rcu)
{
	return atomic_load_explicit(&rcu->pending, SEQ_CST) ||
	       atomic_load_explicit(&rcu->gp_wanted, SEQ_CST) >
		       atomic_load_explicit(&rcu->gp_completed, memory_order_relaxed);
}

/* Until there is work: 1; or nothing to do and the machine stops: 0. */
static int wait_wanted(struct machine *m, uint32_t cpu)
{
	struct wait w = wait_begin(m, cpu);

	w.ignore_stop = w.idle = true;
	for (;;) {
		/* stopping first: who queues before it is set is served */
		uint32_t stopping = atomic_load_explicit(&m->stopping, SEQ_CST);
		int r;

		if (is_wanted(m->rcu))
			return 1;
		if (stopping)
			return 0;
		r = wait_turn(&w);
		if (r)
			return r;
	}
}

int rcu_thread(struct machine *m, uint32_t cpu)
{
	struct rcu *rcu = m->rcu;
	int32_t nobody = -1;
	int r = may_synchronize(m, cpu, "rcu_thread");

	if (r)
		return r;
	if (!atomic_compare_exchange_strong_explicit(&rcu->thread, &nobody, (int32_t)cpu, SEQ_CST, SEQ_CST))
		return cpu_misuse(m, cpu, "rcu_thread on CPU %u: it runs on CPU %d already", cpu, nobody);
	while ((r = wait_wanted(m, cpu)) > 0) {
		struct rcu_head *list = take_pending(rcu);

		r = grace_period(m, cpu);
		if (r) /* offline: run none, but lose none */
			while (list) {
				struct rcu_head *next = list->next;

				push(&rcu->pending, list);
				list = next;
			}
		if (r)
			break;
		invoke(m, cpu, list);
	}
	atomic_store_explicit(&rcu->thread, -1, SEQ_CST);
	return r;
}

int rcu_gp_begin(struct machine *m, uint32_t cpu)
{
	struct rcu *rcu = m->rcu;

	(void)cpu;
	if (rcu->stepped_gp || !is_wanted(rcu))
		return 0;
	rcu->stepped = take_pending(rcu);
	rcu->stepped_gp = atomic_fetch_add_explicit(&rcu->gp_seq, 1, memory_order_acq_rel) + 1;
	return 1;
}

int rcu_gp_end(struct machine *m, uint32_t cpu)
{
	struct rcu *rcu = m->rcu;
	struct rcu_head *list = rcu->stepped;
	uint64_t before = atomic_load_explicit(&rcu->invoked, SEQ_CST);

	if (!rcu->stepped_gp)
		return 0;
	for (uint32_t reader = 0; reader < m->cpu_count; reader++) {
		if (is_quiescent(&m->cpus[reader], rcu->stepped_gp))
			continue;
		atomic_store_explicit(&rcu->holdout, (int32_t)reader, memory_order_relaxed);
		return MACHINE_AGAIN;
	}
	atomic_store_explicit(&rcu->holdout, -1, memory_order_relaxed);
	atomic_store_explicit(&rcu->gp_completed, rcu->stepped_gp, SEQ_CST);
	count(m->cpus[cpu].counters, COUNT_GRACE_PERIODS, 1);
	rcu->stepped = NULL;
	rcu->stepped_gp = 0;
	invoke(m, cpu, list);
	return (int)(atomic_load_explicit(&rcu->invoked, SEQ_CST) - before);
}

int rcu_create(struct machine *m)
{
	struct rcu *rcu = aligned_alloc(CACHELINE, sizeof(*rcu));

	if (!rcu)
		return MACHINE_NOMEM;
	atomic_init(&rcu->gp_seq, 1);
	atomic_init(&rcu->gp_completed, 1);
	atomic_init(&rcu->gp_wanted, 0);
	atomic_init(&rcu->thread, -1);
	atomic_init(&rcu->holdout, -1);
	rcu->stepped = NULL;
	rcu->stepped_gp = 0;
	atomic_init(&rcu->pending, NULL);
	atomic_init(&rcu->queued, 0);
	atomic_init(&rcu->invoked, 0);
	m->rcu = rcu;
	return waiters_init(&rcu->waiters, m);
}

/* No thread is left: every reader is gone, what is still queued may run at once. */
void rcu_destroy(struct machine *m)
{
	if (!m->rcu)
		return;
	invoke(m, 0, m->rcu->stepped);
	invoke(m, 0, take_pending(m->rcu));
	for (uint32_t cpu = 0; cpu < m->cpu_count; cpu++) {
		struct rcu_chunk *chunk = m->cpus[cpu].rcu_chunks;

		while (chunk) {
			struct rcu_chunk *next = chunk->next;

			free(chunk);
			chunk = next;
		}
		m->cpus[cpu].rcu_chunks = NULL;
	}
	waiters_fini(&m->rcu->waiters);
	free(m->rcu);
	m->rcu = NULL;
}
