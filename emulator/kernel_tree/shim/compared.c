/* Locks, RCU and the rest of KVM under a tree's TDP MMU that is compared with the model.
 *
 * An RCU callback runs as soon as no reader is left, which is the earliest moment that a kernel allows.
 */
#include "linux.h"
#include "shim.h"
#include "tree.h"

static struct rcu_head *callbacks, **last_callback = &callbacks;
static rwlock_t *mmu_lock; /* the one that was taken last: there is one */

void shim_reset_rcu(void)
{
	callbacks = NULL;
	last_callback = &callbacks;
}

/* --- mmu_lock -------------------------------------------------------------------------------------------------- */
void shim_lock(rwlock_t *lock, int how)
{
	if (shim.lock || shim.rcu_depth)
		shim_bug(__FILE__, __LINE__, "mmu_lock is taken twice, or inside RCU");
	mmu_lock = lock;
	shim.lock = lock->held = how;
	shim_event(EVENT_LOCK, (u64)how, 0, NULL, 0);
}

void shim_unlock(rwlock_t *lock, int how)
{
	if (shim.lock != how)
		shim_bug(__FILE__, __LINE__, "mmu_lock is released by a thread that does not hold it so");
	shim_event(EVENT_UNLOCK, (u64)how, 0, NULL, 0);
	shim.lock = lock->held = 0;
}

int shim_mmu_lock_held(const void *lock)
{
	return ((const rwlock_t *)lock)->held;
}

void shim_spin_lock(spinlock_t *lock)
{
	if (lock->held)
		shim_bug(__FILE__, __LINE__, "a spinlock is taken twice");
	lock->held = 1;
}

void shim_spin_unlock(spinlock_t *lock)
{
	if (!lock->held)
		shim_bug(__FILE__, __LINE__, "a spinlock is released that is not held");
	lock->held = 0;
}

void shim_assert_lock(int held, int how, const char *file, int line, const char *function)
{
	if (!(held & how) && !(how == SHIM_READ && held == SHIM_WRITE))
		shim_warn(file, line, function, "lockdep: the lock is not held");
}

/* Return the point that the walk has reached, if it has. */
static struct shim_point *point_reached(void)
{
	struct shim_point *point = &shim.points[shim.next_point];

	if (shim.next_point >= shim.n_points || !shim.last_spte || glue_gfn_of(shim.last_spte) < point->gfn)
		return NULL;
	return point;
}

static void other_runs(void)
{
	const volatile void *last = shim.last_spte;
	int lock = shim.lock;
	unsigned int depth = shim.rcu_depth;

	/* Another CPU's view: it holds nothing.  The caller has chosen an operation that may run beside this one. */
	shim.lock = mmu_lock->held = 0;
	shim.rcu_depth = 0;
	shim.other();
	shim.lock = mmu_lock->held = lock;
	shim.rcu_depth = depth;
	shim.last_spte = last;
}

bool shim_needbreak(void)
{
	struct shim_point *point = point_reached();

	if (!point)
		return false;
	if (point->what & POINT_YIELD)
		return true;
	shim.next_point++;
	other_runs();
	return false;
}

bool shim_need_resched(void)
{
	return shim_needbreak();
}

void shim_yield(rwlock_t *lock, int how)
{
	struct shim_point *point = point_reached();

	if (shim.rcu_depth)
		shim_warn(__FILE__, __LINE__, __func__, "mmu_lock is dropped for another thread inside RCU");
	shim_event(EVENT_YIELD, point ? point->gfn : 0, 0, NULL, 1);
	shim_unlock(lock, how);
	if (point) {
		shim.next_point++;
		if (point->what & POINT_OTHER)
			other_runs();
	}
	shim_lock(lock, how);
}

int tree_locks(void)
{
	return shim.lock | (int)shim.rcu_depth << 8;
}

/* --- RCU ------------------------------------------------------------------------------------------------------- */
static void run_callbacks(void)
{
	while (callbacks && !shim.rcu_depth) {
		struct rcu_head *head = callbacks;

		callbacks = head->next;
		if (!callbacks)
			last_callback = &callbacks;
		head->func(head);
	}
}

void rcu_read_lock(void)
{
	shim.rcu_depth++;
}

void rcu_read_unlock(void)
{
	if (!shim.rcu_depth)
		shim_bug(__FILE__, __LINE__, "RCU's read section is left twice");
	if (!--shim.rcu_depth)
		run_callbacks();
}

void shim_call_rcu(struct rcu_head *head, void (*func)(struct rcu_head *head))
{
	shim_event(EVENT_CALL_RCU, 0, 0, NULL, 0);
	head->func = func;
	head->next = NULL;
	*last_callback = head;
	last_callback = &head->next;
	run_callbacks();
}

void rcu_barrier(void)
{
	run_callbacks();
}

/* --- work queues ------------------------------------------------------------------------------------------------ */
bool queue_work(struct workqueue_struct *queue, struct work_struct *work)
{
	work->next = queue->first;
	queue->first = work;
	return true;
}

void flush_workqueue(struct workqueue_struct *queue)
{
	while (queue->first) {
		struct work_struct *work = queue->first;

		queue->first = work->next;
		work->func(work);
	}
}

/* --- the rest of KVM: no prototypes of the tree's are in sight, because they differ between versions --------------- */
void kvm_flush_remote_tlbs(void *kvm)
{
	(void)kvm;
	shim_event(EVENT_FLUSH, 0, 0, NULL, 1);
}

void kvm_flush_remote_tlbs_range(void *kvm, u64 gfn, u64 pages_)
{
	(void)kvm;
	shim_event(EVENT_FLUSH_RANGE, gfn, pages_, NULL, 1);
}

void kvm_flush_remote_tlbs_with_address(void *kvm, u64 gfn, u64 pages_)
{
	kvm_flush_remote_tlbs_range(kvm, gfn, pages_);
}

static u64 slot_number(const void *slot)
{
	return slot == shim.slots[1];
}

void kvm_flush_remote_tlbs_memslot(void *kvm, const void *slot)
{
	(void)kvm;
	shim_event(EVENT_FLUSH_SLOT, slot_number(slot), 0, NULL, 1);
}

void kvm_arch_flush_remote_tlbs_memslot(void *kvm, const void *slot)
{
	kvm_flush_remote_tlbs_memslot(kvm, slot);
}

void mark_page_dirty_in_slot(void *kvm, const void *slot, u64 gfn)
{
	(void)kvm;
	if (shim.slots_logging[slot_number(slot)])
		shim_event(EVENT_DIRTY, slot_number(slot), gfn, NULL, 0);
}

void kvm_set_pfn_dirty(u64 pfn)
{
	(void)pfn;
}

void kvm_set_pfn_accessed(u64 pfn)
{
	(void)pfn;
}

int mmu_try_to_unsync_pages(void)
{
	return 0;
}

int kvm_mmu_max_mapping_level(u64 kvm, u64 second, u64 third, u64 fourth)
{
	u64 arguments[] = { kvm, second, third, fourth };

	const void *slot = (const void *)(unsigned long)arguments[TREE_ARG_kvm_mmu_max_mapping_level_slot];

	return shim.levels[slot_number(slot)][arguments[TREE_ARG_kvm_mmu_max_mapping_level_gfn] >> 9 & 63];
}
