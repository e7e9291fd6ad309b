/* RCU and SRCU: nothing is reused while a reader may see it, callbacks all run, and no wait is for ever. */
#include "harness.h"

#include "core/chaos.h"
#include "core/counters.h"
#include "core/machine_types.h"
#include "machine/machine.h"
#include "machine/offline.h"
#include "machine/vms.h"
#include "sync/cpu.h"
#include "sync/rcu.h"
#include "sync/rcu_callback.h"
#include "vm/mmu_lock.h"
#include "vm/srcu.h"
#include "vm/vm.h"

enum { READERS = 3, OBJECTS = 64 };

/* Objects are plain memory: TSan sees a reuse that a reader did not order, and the check sees poison. */
static struct {
	uint64_t alive;
	uint64_t generation;
	char pad[CACHELINE];
} objects[OBJECTS];
static _Atomic uint64_t current;
static _Atomic uint32_t in_use[OBJECTS];
static _Atomic uint32_t done;
static _Atomic uint64_t freed;

static void free_object(struct machine *m, struct cpu *cpu, uint64_t argument)
{
	(void)m;
	(void)cpu;
	objects[argument].alive = 0;
	atomic_store_explicit(&in_use[argument], 0, memory_order_release);
	atomic_fetch_add(&freed, 1);
}

/* Publish a fresh object, return the one that no reader finds any more. */
static uint64_t replace(void)
{
	static uint64_t hint;

	for (;; hint++) {
		uint64_t i = hint % OBJECTS;
		uint32_t unused = 0;

		if (!atomic_compare_exchange_strong(&in_use[i], &unused, 1)) {
			if (i == 0)
				sched_yield();
			continue;
		}
		objects[i].alive = 1;
		objects[i].generation++;
		return atomic_exchange_explicit(&current, i, memory_order_acq_rel);
	}
}

static struct machine *begin(const char *name, uint32_t chaos)
{
	struct machine *m = harness_machine(READERS, 3, chaos);

	harness_begin(name, 60);
	rcu_register(RCU_FREE_FRAME, free_object);
	CHECK(vm_create(m, 16) == 0);
	for (uint32_t i = 0; i < OBJECTS; i++)
		atomic_store(&in_use[i], 0);
	objects[0].alive = 1;
	atomic_store(&in_use[0], 1);
	atomic_store(&current, 0);
	atomic_store(&done, 0);
	atomic_store(&freed, 0);
	return m;
}

static uint64_t total(struct machine *m, uint32_t counter)
{
	uint64_t values[COUNTERS];

	counters_sum(m, values);
	return values[counter];
}

/* --- read against free ------------------------------------------------------------------------------ */

/* Inside a read section: long enough that an update happens meanwhile. */
static void look(struct actor *a, uint32_t n)
{
	uint64_t i = atomic_load_explicit(&current, memory_order_acquire);
	uint64_t generation = objects[i].generation;

	for (int again = 0; again < 50; again++)
		CHECK(objects[i].alive == 1);
	if (n % 16 == 0)
		sched_yield();
	chaos_point(a->m, a->cpu);
	CHECK(objects[i].alive == 1);
	CHECK(objects[i].generation == generation);
}

static void *rcu_reader(void *argument)
{
	struct actor *a = argument;

	cpu_online(a->m, a->cpu);
	for (uint32_t n = 1; !atomic_load(&done); n++) {
		rcu_read_lock(a->m, a->cpu);
		rcu_read_lock(a->m, a->cpu);
		look(a, n);
		rcu_read_unlock(a->m, a->cpu);
		look(a, n);
		rcu_read_unlock(a->m, a->cpu);
		if (n % 1024 == 0)
			cpu_halt(a->m, a->cpu, 10);
	}
	cpu_offline(a->m, a->cpu);
	return NULL;
}

static void *srcu_reader(void *argument)
{
	struct actor *a = argument;

	cpu_online(a->m, a->cpu);
	for (uint32_t n = 1; !atomic_load(&done); n++) {
		int index = srcu_read_lock(a->m, a->cpu, 0);

		CHECK(index == 0 || index == 1);
		look(a, n);
		look(a, n);
		srcu_read_unlock(a->m, a->cpu, 0, index);
	}
	cpu_offline(a->m, a->cpu);
	return NULL;
}

/* Retires objects by callback, mostly, and by waiting. */
static void *rcu_updater(void *argument)
{
	struct actor *a = argument;

	for (uint32_t i = 1; i <= a->rounds; i++) {
		uint64_t old = replace();

		if (i % 16)
			CHECK(call_rcu(a->m, a->cpu, RCU_FREE_FRAME, old) == 0);
		else {
			CHECK(synchronize_rcu(a->m, a->cpu) == 0);
			free_object(a->m, NULL, old);
		}
		if (i % 256 == 0) {
			CHECK(rcu_barrier(a->m, a->cpu) == 0);
			CHECK(rcu_pending(a->m) == 0);
		}
	}
	CHECK(rcu_barrier(a->m, a->cpu) == 0);
	CHECK(atomic_load(&freed) == a->rounds);
	return NULL;
}

static void *srcu_updater(void *argument)
{
	struct actor *a = argument;

	for (uint32_t i = 1; i <= a->rounds; i++) {
		uint64_t old = replace();

		CHECK(synchronize_srcu(a->m, a->cpu, 0) == 0);
		free_object(a->m, NULL, old);
	}
	return NULL;
}

static void run(const char *name, uint32_t rounds, uint32_t chaos, void *(*reader)(void *),
		void *(*updater)(void *))
{
	struct machine *m = begin(name, chaos);
	struct actor readers[READERS], thread = { .m = m, .cpu = READERS };
	struct actor update = { .m = m, .cpu = READERS + 1, .rounds = rounds };

	actor_start(&thread, harness_rcu);
	for (uint32_t i = 0; i < READERS; i++) {
		readers[i] = (struct actor){ .m = m, .cpu = i };
		actor_start(&readers[i], reader);
	}
	actor_start(&update, updater);
	actor_join(&update);
	atomic_store(&done, 1);
	for (uint32_t i = 0; i < READERS; i++)
		actor_join(&readers[i]);
	machine_stop(m);
	actor_join(&thread);
	CHECK(rcu_pending(m) == 0);
	CHECK(total(m, COUNT_RCU_INVOKED) == total(m, COUNT_RCU_CALLBACKS));
	machine_destroy(m);
}

/* --- single cases ------------------------------------------------------------------------------------ */

/* A grace period waits for the reader that was there before, not for one that came later; and it is over
 * when that reader dies. */
static void test_holdout(void)
{
	struct machine *m = begin("who is waited for", 0);
	struct actor thread = { .m = m, .cpu = READERS };

	actor_start(&thread, harness_rcu);
	rcu_read_lock(m, 0);
	CHECK(call_rcu(m, 1, RCU_NOTHING, 0) == 0);
	while (rcu_holdout(m) != 0)
		usleep(100);
	rcu_read_lock(m, 1);
	CHECK(rcu_pending(m) == 1);
	rcu_read_unlock(m, 0);
	CHECK(rcu_barrier(m, READERS + 1) == 0);
	CHECK(rcu_holdout(m) == -1);
	CHECK(call_rcu(m, 0, RCU_NOTHING, 0) == 0);
	while (rcu_holdout(m) != 1)
		usleep(100);
	cpu_online(m, 1);
	cpu_offline(m, 1);
	CHECK(rcu_barrier(m, READERS + 1) == 0);
	machine_stop(m);
	actor_join(&thread);
	machine_destroy(m);
}

static void *synchronize_srcu_once(void *argument)
{
	struct actor *a = argument;

	CHECK(synchronize_srcu(a->m, a->cpu, 0) == 0);
	atomic_store(&done, 1);
	return NULL;
}

/* A reader that read the index, was delayed while another CPU synchronized, and is counted under the old index:
 * the next synchronizer waits for it. */
static void test_stale_index(void)
{
	struct machine *m = begin("SRCU: a reader under the old index", 0);
	struct srcu *srcu = &m->vms[0].srcu;
	struct actor waiter = { .m = m, .cpu = READERS };
	uint32_t stale = atomic_load(&srcu->index) & 1;

	CHECK(synchronize_srcu(m, READERS, 0) == 0);
	CHECK((atomic_load(&srcu->index) & 1) != stale);
	atomic_fetch_add(&srcu->lock_count[stale], 1);
	actor_start(&waiter, synchronize_srcu_once);
	while (cpu_power(m, waiter.cpu) != CPU_HALTED && !atomic_load(&done))
		usleep(100);
	CHECK(!atomic_load(&done));
	srcu_read_unlock(m, 0, 0, (int)stale);
	actor_join(&waiter);
	machine_destroy(m);
}

static void *synchronize(void *argument)
{
	struct actor *a = argument;

	CHECK(synchronize_rcu(a->m, a->cpu) == MACHINE_STOPPED);
	CHECK(synchronize_srcu(a->m, a->cpu, 0) == MACHINE_STOPPED);
	return NULL;
}

/* Stopping ends the wait of a synchronizer; callbacks still wait for their reader, and then run. */
static void test_stop(void)
{
	struct machine *m = begin("stop while a reader reads", 0);
	struct actor thread = { .m = m, .cpu = READERS }, waiter = { .m = m, .cpu = READERS + 1 };
	int index = srcu_read_lock(m, 0, 0);

	rcu_read_lock(m, 0);
	actor_start(&thread, harness_rcu);
	for (uint64_t i = 1; i <= 10; i++)
		CHECK(call_rcu(m, 1, RCU_FREE_FRAME, i) == 0);
	actor_start(&waiter, synchronize);
	while (cpu_power(m, waiter.cpu) != CPU_HALTED)
		usleep(100);
	machine_stop(m);
	actor_join(&waiter);
	CHECK(atomic_load(&freed) == 0 && rcu_pending(m) == 10);
	rcu_read_unlock(m, 0);
	srcu_read_unlock(m, 0, 0, index);
	actor_join(&thread);
	CHECK(atomic_load(&freed) == 10 && rcu_pending(m) == 0);
	machine_destroy(m);
}

static void test_misuse(void)
{
	struct machine *m = begin("misuse", 0);
	uint32_t cpu = READERS;

	rcu_read_lock(m, cpu);
	CHECK(synchronize_rcu(m, cpu) == MACHINE_MISUSE);
	printf("    %s\n", machine_error_text(m, cpu));
	CHECK(rcu_barrier(m, cpu) == MACHINE_MISUSE);
	CHECK(synchronize_srcu(m, cpu, 0) == MACHINE_MISUSE);
	CHECK(cpu_halt(m, cpu, 1) == MACHINE_MISUSE);
	rcu_read_unlock(m, cpu);
	CHECK(mmu_read_lock(m, cpu, 0) == 0);
	CHECK(synchronize_srcu(m, cpu, 0) == MACHINE_MISUSE);
	printf("    %s\n", machine_error_text(m, cpu));
	mmu_read_unlock(m, cpu, 0);
	local_irq_disable(m, cpu, "test_misuse");
	CHECK(synchronize_rcu(m, cpu) == MACHINE_MISUSE);
	local_irq_enable(m, cpu);
	CHECK(synchronize_srcu(m, cpu, 0) == 0);
	CHECK(call_rcu(m, cpu, RCU_CALLBACKS, 0) == MACHINE_MISUSE);
	/* no thread: queued callbacks run when the machine goes */
	CHECK(call_rcu(m, cpu, RCU_FREE_FRAME, 1) == 0);
	machine_destroy(m);
	CHECK(atomic_load(&freed) == 1);
}

int main(int argc, char **argv)
{
	uint32_t rounds = argc > 1 ? (uint32_t)atoi(argv[1]) : 4000;

	test_misuse();
	test_holdout();
	test_stop();
	test_stale_index();
	for (uint32_t chaos = 0; chaos <= 8; chaos += 8) {
		run("RCU: read against free", rounds, chaos, rcu_reader, rcu_updater);
		run("SRCU: read against free", rounds / 4, chaos, srcu_reader, srcu_updater);
	}
	return 0;
}
