/* SRCU of a VM: the two-index algorithm of kernel/rcu/srcutree.c with one pair of counters per index. */
#include "vm/srcu.h"

#include "core/chaos.h"
#include "core/cpu_types.h"
#include "core/machine_types.h"
#include "sync/cpu.h"
#include "sync/ipi.h"
#include "sync/rcu.h"
#include "sync/waiters.h"
#include "vm/vm.h"

/* Unless stated otherwise: Dekker between a reader that leaves and the synchronizer that waits. */
#define SEQ_CST memory_order_seq_cst

int srcu_init(struct srcu *srcu, const struct machine *m)
{
	atomic_init(&srcu->index, 0);
	for (int i = 0; i < 2; i++) {
		atomic_init(&srcu->lock_count[i], 0);
		atomic_init(&srcu->unlock_count[i], 0);
	}
	atomic_init(&srcu->synchronizing, 0);
	atomic_init(&srcu->waiting, 0);
	return waiters_init(&srcu->queue, m);
}

void srcu_fini(struct srcu *srcu, const struct machine *m)
{
	waiters_fini(&srcu->queue, m);
}

int srcu_read_lock(struct machine *m, uint32_t cpu, uint32_t vm)
{
	struct vm *v = vm_get(m, cpu, vm);
	uint32_t index;

	if (!v)
		return MACHINE_MISUSE;
	ipi_poll(m, &m->cpus[cpu]);
	/* relaxed: the second phase of synchronize_srcu covers a stale index */
	index = atomic_load_explicit(&v->srcu.index, memory_order_relaxed) & 1;
	chaos_point(m, cpu);
	atomic_fetch_add_explicit(&v->srcu.lock_count[index], 1, SEQ_CST);
	return (int)index;
}

void srcu_read_unlock(struct machine *m, uint32_t cpu, uint32_t vm, int index)
{
	struct srcu *srcu = &m->vms[vm].srcu;
	uint32_t waiting;

	atomic_fetch_add_explicit(&srcu->unlock_count[index & 1], 1, SEQ_CST);
	chaos_point(m, cpu);
	/* Dekker: the synchronizer announces that it waits, then counts */
	waiting = atomic_load_explicit(&srcu->waiting, SEQ_CST);
	if (waiting)
		cpu_wake(m, waiting - 1);
}

/* Unlocks are counted before locks, so a reader that is counted in the unlocks is counted in the locks, too.
 * Locks are counted with a read-modify-write: a later reader acquires from it (as with rcu_snapshot). */
static bool srcu_is_drained(struct srcu *srcu, uint32_t index)
{
	uint64_t unlocks = atomic_load_explicit(&srcu->unlock_count[index], SEQ_CST);

	return atomic_fetch_add_explicit(&srcu->lock_count[index], 0, SEQ_CST) == unlocks;
}

static int srcu_wait_drained(struct machine *m, uint32_t cpu, struct srcu *srcu, uint32_t index)
{
	struct wait w = wait_begin(m, cpu);
	int r = 0;

	atomic_store_explicit(&srcu->waiting, cpu + 1, SEQ_CST);
	while (!r && !srcu_is_drained(srcu, index))
		r = wait_turn(&w);
	atomic_store_explicit(&srcu->waiting, 0, SEQ_CST);
	return r;
}

/* Both indices: readers that took a stale index before the last flip are on the idle one. */
static int srcu_grace_period(struct machine *m, uint32_t cpu, struct srcu *srcu)
{
	uint32_t index = atomic_load_explicit(&srcu->index, SEQ_CST) & 1;
	int r = srcu_wait_drained(m, cpu, srcu, index ^ 1);

	if (r)
		return r;
	atomic_store_explicit(&srcu->index, index ^ 1, SEQ_CST);
	chaos_point(m, cpu);
	return srcu_wait_drained(m, cpu, srcu, index);
}

static int srcu_become_synchronizer(struct machine *m, uint32_t cpu, struct srcu *srcu)
{
	struct wait w = wait_begin(m, cpu);

	for (;;) {
		uint32_t none = 0;
		int r;

		waiters_add(&srcu->queue, cpu);
		if (atomic_compare_exchange_strong_explicit(&srcu->synchronizing, &none, cpu + 1, SEQ_CST,
							    SEQ_CST))
			return 0;
		r = wait_turn(&w);
		if (r)
			return r;
	}
}

int synchronize_srcu(struct machine *m, uint32_t cpu, uint32_t vm)
{
	struct vm *v = vm_get(m, cpu, vm);
	int r = v ? may_synchronize(m, cpu, "synchronize_srcu") : MACHINE_MISUSE;

	if (!r)
		r = srcu_become_synchronizer(m, cpu, &v->srcu);
	if (r)
		return r;
	r = srcu_grace_period(m, cpu, &v->srcu);
	atomic_store_explicit(&v->srcu.synchronizing, 0, SEQ_CST);
	waiters_wake(m, &v->srcu.queue);
	return r;
}
