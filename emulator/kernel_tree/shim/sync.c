/* Locks, RCU and work queues of a tree's TDP MMU: the core's. */
#include "linux.h"
#include "machine_internal.h"

#include <sched.h>

void cpu_relax(void)
{
	if (shim_explored()) {
		shim_python(CALL_RELAX, 0, 0, NULL);
		return;
	}
	sched_yield();
}

void shim_spin_lock(spinlock_t *lock)
{
	int free;

	if (lock != &shim_objects_lock && shim_explored())
		shim_python(CALL_SPIN_LOCK, (u64)(unsigned long)&lock->held, glue_name_of(lock), NULL);
	while (free = 0, !__atomic_compare_exchange_n(&lock->held, &free, 1, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED))
		sched_yield();
	if (lock != &shim_objects_lock)
		here->spin = lock;
}

void shim_spin_unlock(spinlock_t *lock)
{
	if (!lock->held)
		shim_bug("spin_unlock", 0, "the lock is not held");
	if (lock != &shim_objects_lock)
		here->spin = NULL;
	__atomic_store_n(&lock->held, 0, __ATOMIC_RELEASE);
	if (lock != &shim_objects_lock)
		shim_tell(CALL_SPIN_UNLOCK, 0, glue_name_of(lock));
}

void shim_lock(rwlock_t *lock, int how)
{
	int r;

	(void)lock;
	if (here->api.lock)
		shim_bug("mmu_lock", 0, "it is taken twice by a thread");
	shim_point(POINT_MMU_LOCK, how == SHIM_WRITE);
	if (shim_explored())
		r = shim_python(CALL_LOCK, how == SHIM_WRITE, 0, NULL);
	else
		r = (how == SHIM_WRITE ? core.write_lock : core.read_lock)(core.machine, here->api.id, here->api.vm);
	if (r)
		shim_give_up(r);
	here->api.lock = (unsigned int)how;
}

void shim_unlock(rwlock_t *lock, int how)
{
	(void)lock;
	if (here->api.lock != (unsigned int)how)
		shim_bug("mmu_lock", 0, "it is released by a thread that does not hold it so");
	shim_release((unsigned int)how);
	shim_point(POINT_MMU_LOCK, how == SHIM_WRITE);
}

int shim_mmu_lock_held(const void *lock)
{
	(void)lock;
	return (int)here->api.lock;
}

void shim_assert_lock(int held, int how, const char *file, int line, const char *function)
{
	if (!(held & how) && !(how == SHIM_READ && held == SHIM_WRITE))
		shim_finding(FINDING_LOCKDEP, file, line, function, "lockdep: the lock is not held");
}

bool shim_need_resched(void)
{
	return here->api.resched && here->looked >= here->api.resched;
}

bool shim_needbreak(void)
{
	return shim_explored() ? shim_needbreak_step() : (bool)core.needbreak(core.machine, here->api.vm);
}

void shim_yield(rwlock_t *lock, int how)
{
	bool scheduled = shim_need_resched(), pending = here->unflushed || here->flushed_last;
	unsigned int hfn = 0;
	const void *sp = here->last && shim_in_frames(here->last, &hfn) ? shim_table_sp(hfn) : NULL;
	bool was_valid = sp && !glue_root_invalid(sp);

	if (here->api.rcu_depth)
		shim_finding(FINDING_LOCKDEP, "tdp_mmu.c", 0, NULL, "mmu_lock is dropped for another thread inside RCU");
	shim_step(STEP_YIELDED, here->at.gfn, 1);
	shim_unlock(lock, how);
	if (scheduled)
		shim_python(CALL_SCHEDULE, 0, 0, NULL);
	shim_lock(lock, how);
	here->looked = here->unflushed = 0;
	here->flushed_last = false;
	/* The walk has a reference on its root, but the table of its last SPTE may be gone. */
	shim_python(CALL_YIELDED, pending, was_valid && shim_table_lives(hfn) && glue_root_invalid(sp), NULL);
}

/* --- RCU -------------------------------------------------------------------------------------------------------------- */
void rcu_read_lock(void)
{
	if (shim_explored())
		shim_python(CALL_RCU_LOCK, 0, 0, NULL);
	else
		core.rcu_read_lock(core.machine, here->api.id);
	here->api.rcu_depth++;
}

void rcu_read_unlock(void)
{
	if (!here->api.rcu_depth)
		shim_bug("rcu_read_unlock", 0, "RCU's read section is left twice");
	here->api.rcu_depth--;
	if (shim_explored())
		shim_tell(CALL_RCU_UNLOCK, 0, 0);
	else
		core.rcu_read_unlock(core.machine, here->api.id);
	if (!here->api.error)
		shim_point(POINT_RCU, true);
}

static void run_callback(unsigned int cpu, u64 argument)
{
	struct rcu_head *head = (struct rcu_head *)(unsigned long)argument;
	struct shim_cpu *before = here;
	int points;

	here = shim_cpu_of(cpu);
	/* A callback has no steps of its own: it belongs to the end of its grace period. */
	points = here->api.points;
	here->api.points = POINTS_NONE;
	here->api.inside = 1;
	here->entry = __builtin_frame_address(0);
	head->func(head);
	here->api.inside = 0;
	here->api.points = points;
	here = before;
}

void shim_call_rcu(struct rcu_head *head, void (*func)(struct rcu_head *head))
{
	int r;

	shim_point(POINT_CALL_RCU, true);
	head->func = func;
	shim_step(STEP_QUEUED, glue_table_of(head), 1);
	if (shim_explored())
		r = shim_python(CALL_RCU_LATER, (u64)(unsigned long)head, glue_table_of(head), NULL);
	else
		r = core.queue_callback(core.machine, here->api.id, core.rcu_function, (u64)(unsigned long)head);
	if (r < 0)
		shim_give_up(r);
}

void rcu_barrier(void)
{
	int r = shim_explored() ? shim_python(CALL_RCU_BARRIER, 0, 0, NULL) : core.rcu_barrier(core.machine, here->api.id);

	if (r < 0)
		shim_give_up(r);
}

/* --- work queues: the thread that flushes a queue executes its work ---------------------------------------------- */
static spinlock_t works_lock;

bool queue_work(struct workqueue_struct *queue, struct work_struct *work)
{
	shim_spin_lock(&works_lock);
	work->next = queue->first;
	queue->first = work;
	shim_spin_unlock(&works_lock);
	return true;
}

void flush_workqueue(struct workqueue_struct *queue)
{
	for (;;) {
		struct work_struct *work;

		shim_spin_lock(&works_lock);
		work = queue->first;
		if (work)
			queue->first = work->next;
		shim_spin_unlock(&works_lock);
		if (!work)
			return;
		work->func(work);
	}
}

void *shim_rcu_function(void)
{
	return run_callback;
}
