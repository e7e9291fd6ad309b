/* RCU: readers, waits for grace periods, and the thread that drives them.  See rcu.h. */
#include "sync/rcu.h"

#include "core/chaos.h"
#include "core/counters.h"
#include "core/cpu_types.h"
#include "core/heap.h"
#include "core/machine_types.h"
#include "sync/cpu.h"
#include "sync/ipi.h"
#include "sync/rcu_callback.h"
#include "sync/rcu_internal.h"
#include "sync/waiters.h"

#define SEQ_CST memory_order_seq_cst

/* --- readers ---------------------------------------------------------------------------------------- */

/* Reader and RCU thread both read-modify-write rcu_snapshot.  If the reader's operation comes first, the thread
 * sees its grace period and waits.  If the thread's comes first, the reader acquires from it, and so sees
 * everything that was removed before the grace period began.  gp_seq is acquired for that reason, too: a reader
 * that reads the number of a grace period sees the removals before it, so that grace period need not wait for
 * the reader. */
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
	/* release: the section is over for a thread that reads 0, or the store of the next lock */
	atomic_store_explicit(&c->rcu_snapshot, 0, memory_order_release);
}

void rcu_cpu_offline(struct cpu *cpu)
{
	cpu->rcu_depth = 0;
	atomic_store_explicit(&cpu->rcu_snapshot, 0, memory_order_release);
}

void rcu_wake_thread(struct machine *m)
{
	int32_t thread = atomic_load_explicit(&m->rcu->thread, SEQ_CST);

	if (thread >= 0)
		cpu_wake(m, (uint32_t)thread);
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
	/* A read-modify-write: the thread's next one on gp_seq reads from it, so our removals happen before
	 * that grace period begins.  The grace period that has already begun does not count. */
	target = atomic_fetch_add_explicit(&rcu->gp_seq, 0, memory_order_acq_rel) + 1;
	wanted = atomic_load_explicit(&rcu->gp_wanted, SEQ_CST);
	while (wanted < target &&
	       !atomic_compare_exchange_weak_explicit(&rcu->gp_wanted, &wanted, target, SEQ_CST, SEQ_CST))
		;
	rcu_wake_thread(m);
	return wait_count(m, cpu, &rcu->gp_completed, target);
}

int rcu_barrier(struct machine *m, uint32_t cpu)
{
	int r = may_synchronize(m, cpu, "rcu_barrier");

	if (r)
		return r;
	/* Callbacks run in the order of the stack, and are counted before they are pushed: once `queued` of
	 * them have run, all that were pushed before now have. */
	return wait_count(m, cpu, &m->rcu->invoked, atomic_load_explicit(&m->rcu->queued, SEQ_CST));
}

/* --- the thread ------------------------------------------------------------------------------------- */

/* acq_rel: see rcu_read_lock */
static bool is_quiescent(struct cpu *c, uint64_t gp)
{
	uint64_t snapshot = atomic_fetch_add_explicit(&c->rcu_snapshot, 0, memory_order_acq_rel);

	return snapshot == 0 || snapshot >= gp;
}

static bool has_message(struct machine *m, uint32_t cpu)
{
	return cpu_attention(m, cpu) & ATTENTION_MESSAGE;
}

/* Readers do not signal when they leave (that would cost each of them), so this polls, at growing intervals. */
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
		r = has_message(m, cpu) ? ATTENTION_MESSAGE : wait_turn(&w);
	}
	atomic_store_explicit(&m->rcu->holdout, -1, memory_order_relaxed);
	return r;
}

/* Return 0; an error or ATTENTION_MESSAGE: the grace period has not ended. */
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

static bool is_wanted(struct rcu *rcu)
{
	return rcu->taken || atomic_load_explicit(&rcu->pending, SEQ_CST) ||
	       atomic_load_explicit(&rcu->gp_wanted, SEQ_CST) >
		       atomic_load_explicit(&rcu->gp_completed, memory_order_relaxed);
}

/* Wait until there is work, or until there is none and the machine stops: 0.  Else an error or
 * ATTENTION_MESSAGE. */
static int wait_wanted(struct machine *m, uint32_t cpu, bool *wanted)
{
	struct wait w = wait_begin(m, cpu);
	int r = 0;

	w.ignore_stop = w.idle = true;
	while (!r) {
		/* stopping first: work queued before it is set is served */
		uint32_t stopping = atomic_load_explicit(&m->stopping, SEQ_CST);

		*wanted = is_wanted(m->rcu);
		if (has_message(m, cpu))
			return ATTENTION_MESSAGE;
		if (*wanted || stopping)
			return 0;
		r = wait_turn(&w);
	}
	return r;
}

int rcu_thread(struct machine *m, uint32_t cpu)
{
	struct rcu *rcu = m->rcu;
	int32_t runner = -1; /* none */
	bool wanted;
	int r = may_synchronize(m, cpu, "rcu_thread");

	if (r)
		return r;
	if (!atomic_compare_exchange_strong_explicit(&rcu->thread, &runner, (int32_t)cpu, SEQ_CST, SEQ_CST))
		return cpu_misuse(m, cpu, "rcu_thread on CPU %u: it runs on CPU %d already", cpu, runner);
	while (!(r = wait_wanted(m, cpu, &wanted)) && wanted) {
		/* The thread left in the middle of a grace period: the callbacks that waited for it wait for
		 * another one first. */
		struct rcu_head *list = rcu->taken ? rcu->taken : rcu_take_pending(rcu);

		rcu->taken = list;
		r = grace_period(m, cpu);
		if (r)
			break;
		rcu->taken = NULL;
		rcu_invoke(m, cpu, list);
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
	if (!rcu->taken)
		rcu->taken = rcu_take_pending(rcu);
	rcu->stepped_gp = atomic_fetch_add_explicit(&rcu->gp_seq, 1, memory_order_acq_rel) + 1;
	return 1;
}

int rcu_gp_end(struct machine *m, uint32_t cpu)
{
	struct rcu *rcu = m->rcu;
	struct rcu_head *list = rcu->taken;
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
	rcu->taken = NULL;
	rcu->stepped_gp = 0;
	rcu_invoke(m, cpu, list);
	return (int)(atomic_load_explicit(&rcu->invoked, SEQ_CST) - before);
}

int rcu_create(struct machine *m)
{
	struct rcu *rcu = heap_zalloc_lines(m->heap, 1, sizeof(*rcu));

	if (!rcu)
		return MACHINE_NOMEM;
	atomic_init(&rcu->gp_seq, 1);
	atomic_init(&rcu->gp_completed, 1);
	atomic_init(&rcu->gp_wanted, 0);
	atomic_init(&rcu->thread, -1);
	atomic_init(&rcu->holdout, -1);
	rcu->taken = NULL;
	rcu->stepped_gp = 0;
	atomic_init(&rcu->pending, NULL);
	atomic_init(&rcu->queued, 0);
	atomic_init(&rcu->invoked, 0);
	m->rcu = rcu;
	return waiters_init(&rcu->waiters, m);
}

/* No thread is left: every reader is gone, so callbacks that are still queued may run at once. */
void rcu_destroy(struct machine *m)
{
	if (!m->rcu)
		return;
	rcu_invoke(m, 0, m->rcu->taken);
	rcu_invoke(m, 0, rcu_take_pending(m->rcu));
	rcu_free_nodes(m);
	waiters_fini(&m->rcu->waiters, m);
	heap_free(m->heap, m->rcu);
	m->rcu = NULL;
}
