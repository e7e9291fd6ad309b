#include "vm/mmu_lock.h"

#include <sched.h>

#include "core/chaos.h"
#include "core/counters.h"
#include "core/cpu_types.h"
#include "core/heap.h"
#include "core/machine_types.h"
#include "core/spin.h"
#include "sync/cpu.h"
#include "sync/ipi.h"
#include "vm/vm.h"

/* Orders: taking the lock acquires, giving it back releases, on `state`.  A grant is a release store to the
 * waiter's `granted`, acquired by the waiter; the CPU that makes it has taken `state` for the waiter with
 * acquire. */

int mmu_lock_init(struct mmu_lock *lock, const struct machine *m)
{
	atomic_init(&lock->state, 0);
	atomic_init(&lock->queue_lock, 0);
	atomic_init(&lock->writer, 0);
	lock->first = lock->last = NULL;
	lock->readers = heap_zalloc(m->heap, m->cpu_count, sizeof(*lock->readers));
	return lock->readers ? 0 : MACHINE_NOMEM;
}

void mmu_lock_fini(struct mmu_lock *lock, const struct machine *m)
{
	heap_free(m->heap, lock->readers);
	lock->readers = NULL;
}

/* --- the queue -------------------------------------------------------------------------------------- */

static void queue_append(struct mmu_lock *lock, struct lock_waiter *waiter)
{
	waiter->next = NULL;
	waiter->queued = true;
	if (lock->last)
		lock->last->next = waiter;
	else
		lock->first = waiter;
	lock->last = waiter;
	/* acq_rel: either the owner's unlock comes later and sees the bit, or we see that it is gone */
	atomic_fetch_or_explicit(&lock->state, MMU_LOCK_WAITERS, memory_order_acq_rel);
}

static void queue_remove(struct mmu_lock *lock, struct lock_waiter *waiter)
{
	struct lock_waiter **link = &lock->first, *previous = NULL;

	while (*link != waiter) {
		previous = *link;
		link = &previous->next;
	}
	*link = waiter->next;
	if (lock->last == waiter)
		lock->last = previous;
	waiter->queued = false;
	if (!lock->first)
		atomic_fetch_and_explicit(&lock->state, ~MMU_LOCK_WAITERS, memory_order_relaxed);
}

/* Take the lock for a waiter if its state permits.  While the queue is not empty, other CPUs can only give the
 * lock back, so a free lock stays free. */
static bool take_for(struct mmu_lock *lock, const struct lock_waiter *waiter)
{
	uint32_t state = atomic_load_explicit(&lock->state, memory_order_acquire);

	if (waiter->write) {
		if (state & ~MMU_LOCK_WAITERS)
			return false;
		atomic_fetch_or_explicit(&lock->state, MMU_LOCK_WRITER, memory_order_acquire);
		return true;
	}
	if (state & MMU_LOCK_WRITER)
		return false;
	atomic_fetch_add_explicit(&lock->state, 1, memory_order_acquire);
	return true;
}

/* With the queue locked: hand the lock to the first waiter that can have it, and to the readers behind a
 * reader.  Returns them as a list; they are notified afterwards, with the queue unlocked. */
static struct lock_waiter *take_for_first(struct mmu_lock *lock)
{
	struct lock_waiter *granted = NULL, **end = &granted;

	while (lock->first && take_for(lock, lock->first)) {
		struct lock_waiter *waiter = lock->first;

		queue_remove(lock, waiter);
		waiter->next = NULL;
		*end = waiter;
		end = &waiter->next;
	}
	return granted;
}

static void tell_granted(struct machine *m, struct lock_waiter *granted)
{
	while (granted) {
		struct lock_waiter *next = granted->next;
		uint32_t cpu = granted->cpu;

		/* After this store the waiter may use its node for another lock. */
		atomic_store_explicit(&granted->granted, 1, memory_order_seq_cst);
		cpu_wake(m, cpu);
		granted = next;
	}
}

static void hand_over(struct machine *m, struct mmu_lock *lock)
{
	struct lock_waiter *granted;

	spin_lock(&lock->queue_lock);
	granted = take_for_first(lock);
	spin_unlock(&lock->queue_lock);
	tell_granted(m, granted);
}

/* The one read-modify-write of an unlock. */
static void give_back(struct machine *m, struct mmu_lock *lock, bool write)
{
	uint32_t held = write ? MMU_LOCK_WRITER : 1;
	uint32_t left = atomic_fetch_sub_explicit(&lock->state, held, memory_order_release) - held;

	if (left == MMU_LOCK_WAITERS)
		hand_over(m, lock);
}

/* --- waiting ---------------------------------------------------------------------------------------- */

/* Stop waiting for the lock: true if that was too late, and the lock is ours. */
static bool give_up(struct machine *m, struct mmu_lock *lock, struct lock_waiter *waiter)
{
	bool was_queued;

	spin_lock(&lock->queue_lock);
	was_queued = waiter->queued;
	if (was_queued)
		queue_remove(lock, waiter);
	spin_unlock(&lock->queue_lock);
	if (was_queued) {
		hand_over(m, lock); /* readers behind a writer that gave up */
		return false;
	}
	while (!atomic_load_explicit(&waiter->granted, memory_order_acquire))
		sched_yield(); /* the CPU that granted it is about to notify us */
	return true;
}

static int wait_granted(struct machine *m, struct cpu *c, struct mmu_lock *lock, struct lock_waiter *waiter)
{
	struct wait w = wait_begin(m, c->id);

	while (!atomic_load_explicit(&waiter->granted, memory_order_seq_cst)) {
		int r = wait_turn(&w);

		if (!r)
			continue;
		if (!give_up(m, lock, waiter))
			return r;
		if (r != MACHINE_OFFLINE)
			return 0;
		give_back(m, lock, waiter->write); /* an offline CPU cannot give it back later */
		return r;
	}
	return 0;
}

static int lock_slow(struct machine *m, struct cpu *c, struct mmu_lock *lock, bool write)
{
	struct lock_waiter *waiter = &c->lock_waiter, *granted;
	uint64_t began = monotonic_ns();
	int r;

	waiter->cpu = c->id;
	waiter->write = write;
	atomic_store_explicit(&waiter->granted, 0, memory_order_relaxed);
	spin_lock(&lock->queue_lock);
	queue_append(lock, waiter);
	granted = take_for_first(lock); /* it may have become free before WAITERS was set */
	spin_unlock(&lock->queue_lock);
	tell_granted(m, granted);
	chaos_point(m, c->id);
	r = wait_granted(m, c, lock, waiter);
	histogram_record(m, c->id, HISTOGRAM_LOCK_WAIT, monotonic_ns() - began);
	return r;
}

/* --- taking and giving back ------------------------------------------------------------------------- */

static bool read_try(struct mmu_lock *lock)
{
	uint32_t state = atomic_load_explicit(&lock->state, memory_order_relaxed);

	while (!(state & (MMU_LOCK_WRITER | MMU_LOCK_WAITERS)))
		if (atomic_compare_exchange_weak_explicit(&lock->state, &state, state + 1,
							  memory_order_acquire, memory_order_relaxed))
			return true;
	return false;
}

static bool write_try(struct mmu_lock *lock)
{
	uint32_t state = 0;

	return atomic_compare_exchange_strong_explicit(&lock->state, &state, MMU_LOCK_WRITER,
						       memory_order_acquire, memory_order_relaxed);
}

/* Record holds, so that they can be undone for a CPU that died; the owner's relaxed stores, as with counters. */
static void note_reader(struct cpu *c, struct mmu_lock *lock, int change)
{
	uint32_t held = atomic_load_explicit(&lock->readers[c->id], memory_order_relaxed);

	atomic_store_explicit(&lock->readers[c->id], held + (uint32_t)change, memory_order_relaxed);
	c->locks_held += (uint32_t)change;
}

static void note_writer(struct cpu *c, struct mmu_lock *lock, bool held)
{
	atomic_store_explicit(&lock->writer, held ? c->id + 1 : 0, memory_order_relaxed);
	c->locks_held += held ? 1u : (uint32_t)-1;
}

static bool reads(const struct mmu_lock *lock, uint32_t cpu)
{
	return atomic_load_explicit(&lock->readers[cpu], memory_order_relaxed) != 0;
}

static bool writes(const struct mmu_lock *lock, uint32_t cpu)
{
	return atomic_load_explicit(&lock->writer, memory_order_relaxed) == cpu + 1;
}

static struct vm *may_lock(struct machine *m, uint32_t cpu, uint32_t vm, const char *what)
{
	struct vm *v;

	if (cpu_may_wait(m, cpu, what))
		return NULL;
	ipi_poll(m, &m->cpus[cpu]);
	v = vm_get(m, cpu, vm);
	if (v && (reads(&v->mmu_lock, cpu) || writes(&v->mmu_lock, cpu))) {
		/* not recursive: a writer that queues in between would deadlock with the second hold */
		cpu_misuse(m, cpu, "%s on CPU %u: it holds VM %u's already", what, cpu, vm);
		return NULL;
	}
	return v;
}

int mmu_read_lock(struct machine *m, uint32_t cpu, uint32_t vm)
{
	struct vm *v = may_lock(m, cpu, vm, "mmu_read_lock");
	struct cpu *c = &m->cpus[cpu];
	int r = 0;

	if (!v)
		return MACHINE_MISUSE;
	if (!read_try(&v->mmu_lock))
		r = lock_slow(m, c, &v->mmu_lock, false);
	if (!r)
		note_reader(c, &v->mmu_lock, 1);
	return r;
}

int mmu_write_lock(struct machine *m, uint32_t cpu, uint32_t vm)
{
	struct vm *v = may_lock(m, cpu, vm, "mmu_write_lock");
	struct cpu *c = &m->cpus[cpu];
	int r = 0;

	if (!v)
		return MACHINE_MISUSE;
	if (!write_try(&v->mmu_lock))
		r = lock_slow(m, c, &v->mmu_lock, true);
	if (!r)
		note_writer(c, &v->mmu_lock, true);
	return r;
}

int mmu_read_trylock(struct machine *m, uint32_t cpu, uint32_t vm)
{
	struct vm *v = may_lock(m, cpu, vm, "mmu_read_trylock");

	if (!v)
		return MACHINE_MISUSE;
	if (!read_try(&v->mmu_lock))
		return MACHINE_AGAIN;
	note_reader(&m->cpus[cpu], &v->mmu_lock, 1);
	return 0;
}

int mmu_write_trylock(struct machine *m, uint32_t cpu, uint32_t vm)
{
	struct vm *v = may_lock(m, cpu, vm, "mmu_write_trylock");

	if (!v)
		return MACHINE_MISUSE;
	if (!write_try(&v->mmu_lock))
		return MACHINE_AGAIN;
	note_writer(&m->cpus[cpu], &v->mmu_lock, true);
	return 0;
}

void mmu_read_unlock(struct machine *m, uint32_t cpu, uint32_t vm)
{
	struct mmu_lock *lock = &m->vms[vm].mmu_lock;

	chaos_point(m, cpu);
	if (!reads(lock, cpu)) {
		cpu_misuse(m, cpu, "mmu_read_unlock on CPU %u: VM %u's is not held", cpu, vm);
		return;
	}
	note_reader(&m->cpus[cpu], lock, -1);
	give_back(m, lock, false);
	ipi_poll(m, &m->cpus[cpu]);
}

void mmu_write_unlock(struct machine *m, uint32_t cpu, uint32_t vm)
{
	struct mmu_lock *lock = &m->vms[vm].mmu_lock;

	chaos_point(m, cpu);
	if (!writes(lock, cpu)) {
		cpu_misuse(m, cpu, "mmu_write_unlock on CPU %u: VM %u's is not held", cpu, vm);
		return;
	}
	note_writer(&m->cpus[cpu], lock, false);
	give_back(m, lock, true);
	ipi_poll(m, &m->cpus[cpu]);
}

int mmu_lock_needbreak(struct machine *m, uint32_t vm)
{
	/* relaxed: a hint; a CPU that acts on it takes the lock anew */
	return (atomic_load_explicit(&m->vms[vm].mmu_lock.state, memory_order_relaxed) & MMU_LOCK_WAITERS) != 0;
}

static void abandon(struct machine *m, uint32_t cpu, uint32_t vm)
{
	struct mmu_lock *lock = &m->vms[vm].mmu_lock;

	if (!lock->readers)
		return; /* no such VM */
	if (reads(lock, cpu))
		mmu_read_unlock(m, cpu, vm);
	if (writes(lock, cpu))
		mmu_write_unlock(m, cpu, vm);
}

void mmu_locks_abandon(struct machine *m, uint32_t cpu)
{
	for (uint32_t vm = 0; vm < m->config.vms; vm++)
		abandon(m, cpu, vm);
}
