/* mmu_lock: exclusion, fairness, broadcasts under contention, and every way out of a wait. */
#include "harness.h"

#include "core/machine_types.h"
#include "machine/machine.h"
#include "machine/offline.h"
#include "machine/vms.h"
#include "sync/cpu.h"
#include "sync/ipi.h"
#include "sync/smp.h"
#include "vm/mmu_lock.h"

enum { PCPUS = 4 };

static struct {
	uint64_t value; /* plain: TSan checks the lock's ordering */
	uint64_t copy;
} guarded;
static _Atomic uint32_t done;
static _Atomic uint64_t handled;

static void note_call(struct machine *m, struct cpu *target, uint64_t argument)
{
	(void)m;
	(void)target;
	(void)argument;
	atomic_fetch_add_explicit(&handled, 1, memory_order_relaxed);
}

static struct machine *begin(const char *name, uint32_t chaos)
{
	struct machine *m = harness_machine(PCPUS, 3, chaos);

	harness_begin(name, 60);
	ipi_register(IPI_INVEPT_GLOBAL, note_call);
	CHECK(vm_create(m, 16) == 0);
	guarded.value = guarded.copy = 0;
	atomic_store(&done, 0);
	atomic_store(&handled, 0);
	return m;
}

static void end(struct machine *m)
{
	CHECK(mmu_lock_needbreak(m, 0) == 0);
	CHECK(mmu_write_trylock(m, PCPUS, 0) == 0);
	mmu_write_unlock(m, PCPUS, 0);
	machine_destroy(m);
}

static void read_section(struct actor *a)
{
	CHECK(mmu_read_lock(a->m, a->cpu, 0) == 0);
	CHECK(guarded.value == guarded.copy);
	mmu_read_unlock(a->m, a->cpu, 0);
}

static void write_section(struct actor *a, uint32_t broadcast)
{
	CHECK(mmu_write_lock(a->m, a->cpu, 0) == 0);
	guarded.value++;
	if (broadcast)
		CHECK(on_each_cpu(a->m, a->cpu, IPI_INVEPT_GLOBAL, 0, 1) > 0);
	guarded.copy++;
	mmu_write_unlock(a->m, a->cpu, 0);
}

/* pCPUs that read, write, broadcast under the lock and without it, all at once. */
static void *contender(void *argument)
{
	struct actor *a = argument;

	cpu_online(a->m, a->cpu);
	for (uint32_t i = 1; i <= a->rounds; i++) {
		if ((i + a->cpu) % 4 == 0)
			write_section(a, i % 8 < 4);
		else
			read_section(a);
		if (i % 5 == 0)
			CHECK(on_each_cpu(a->m, a->cpu, IPI_INVEPT_GLOBAL, 0, 1) > 0);
	}
	cpu_offline(a->m, a->cpu);
	return NULL;
}

static void test_contention(uint32_t rounds, uint32_t chaos)
{
	struct machine *m = begin("broadcasts under mmu_lock contention", chaos);
	struct actor actors[PCPUS];

	for (uint32_t i = 0; i < PCPUS; i++) {
		actors[i] = (struct actor){ .m = m, .cpu = i, .rounds = rounds };
		actor_start(&actors[i], contender);
	}
	for (uint32_t i = 0; i < PCPUS; i++)
		actor_join(&actors[i]);
	CHECK(guarded.value == guarded.copy);
	CHECK(guarded.value == (uint64_t)PCPUS * (rounds / 4));
	CHECK(atomic_load(&handled) > 0);
	end(m);
}

/* --- fairness --------------------------------------------------------------------------------------- */

static void *endless_reader(void *argument)
{
	struct actor *a = argument;

	cpu_online(a->m, a->cpu);
	while (!atomic_load(&done))
		read_section(a);
	return NULL;
}

static void *endless_writer(void *argument)
{
	struct actor *a = argument;

	cpu_online(a->m, a->cpu);
	while (!atomic_load(&done))
		write_section(a, 0);
	return NULL;
}

/* A thread that asks for the lock between two crowds gets it. */
static void test_fairness(const char *name, uint32_t rounds, void *(*crowd)(void *), bool write)
{
	struct machine *m = begin(name, 0);
	struct actor actors[2], me = { .m = m, .cpu = PCPUS };

	for (uint32_t i = 0; i < 2; i++) {
		actors[i] = (struct actor){ .m = m, .cpu = i };
		actor_start(&actors[i], crowd);
	}
	for (uint32_t i = 0; i < rounds; i++)
		write ? write_section(&me, 0) : read_section(&me);
	atomic_store(&done, 1);
	actor_join(&actors[0]);
	actor_join(&actors[1]);
	end(m);
}

/* --- ways out ---------------------------------------------------------------------------------------- */

struct attempt {
	struct actor actor;
	bool write;
	int result;
};

static void *attempt(void *argument)
{
	struct attempt *t = argument;
	struct actor *a = &t->actor;

	t->result = t->write ? mmu_write_lock(a->m, a->cpu, 0) : mmu_read_lock(a->m, a->cpu, 0);
	return NULL;
}

static void attempt_start(struct attempt *t, struct machine *m, uint32_t cpu, bool write)
{
	*t = (struct attempt){ .actor = { .m = m, .cpu = cpu }, .write = write };
	CHECK(pthread_create(&t->actor.thread, NULL, attempt, t) == 0);
	while (cpu_power(m, cpu) != CPU_HALTED)
		usleep(100);
}

static void test_hand_over(void)
{
	struct machine *m = begin("first come, first served", 0);
	struct attempt writer, reader;

	CHECK(mmu_read_lock(m, PCPUS, 0) == 0);
	CHECK(!mmu_lock_needbreak(m, 0));
	attempt_start(&writer, m, PCPUS + 1, true);
	CHECK(mmu_lock_needbreak(m, 0));
	attempt_start(&reader, m, PCPUS + 2, false); /* behind the writer though a reader holds it */
	CHECK(mmu_read_trylock(m, PCPUS, 0) == MACHINE_MISUSE);
	mmu_read_unlock(m, PCPUS, 0);
	actor_join(&writer.actor);
	CHECK(writer.result == 0);
	CHECK(mmu_read_trylock(m, PCPUS, 0) == MACHINE_AGAIN);
	CHECK(cpu_power(m, PCPUS + 2) == CPU_HALTED);
	mmu_write_unlock(m, PCPUS + 1, 0);
	actor_join(&reader.actor);
	CHECK(reader.result == 0);
	mmu_read_unlock(m, PCPUS + 2, 0);
	end(m);
}

static void test_stop(void)
{
	struct machine *m = begin("stop while others wait for it", 0);
	struct attempt writer, reader;

	CHECK(mmu_write_lock(m, PCPUS, 0) == 0);
	attempt_start(&writer, m, PCPUS + 1, true);
	attempt_start(&reader, m, PCPUS + 2, false);
	machine_stop(m);
	actor_join(&writer.actor);
	actor_join(&reader.actor);
	CHECK(writer.result == MACHINE_STOPPED && reader.result == MACHINE_STOPPED);
	mmu_write_unlock(m, PCPUS, 0);
	end(m);
}

/* A writer that gives up lets the readers behind it go on; a holder that dies lets everybody. */
static void test_deaths(void)
{
	struct machine *m = begin("waiters and holders that die", 0);
	struct attempt writer, reader;

	cpu_online(m, 0);
	cpu_online(m, 1);
	CHECK(mmu_read_lock(m, 0, 0) == 0);
	attempt_start(&writer, m, 1, true);
	attempt_start(&reader, m, PCPUS, false);
	cpu_offline(m, 1);
	actor_join(&writer.actor);
	actor_join(&reader.actor);
	CHECK(writer.result == MACHINE_OFFLINE && reader.result == 0);
	attempt_start(&writer, m, PCPUS + 1, true);
	mmu_read_unlock(m, PCPUS, 0);
	CHECK(cpu_power(m, PCPUS + 1) == CPU_HALTED);
	cpu_offline(m, 0); /* abandons its read hold */
	actor_join(&writer.actor);
	CHECK(writer.result == 0);
	cpu_offline(m, PCPUS + 1);
	end(m);
}

static void test_misuse(void)
{
	struct machine *m = begin("misuse", 0);

	CHECK(mmu_read_lock(m, PCPUS, 1) == MACHINE_MISUSE);
	printf("    %s\n", machine_error_text(m, PCPUS));
	CHECK(mmu_write_lock(m, PCPUS, 0) == 0);
	CHECK(mmu_read_lock(m, PCPUS, 0) == MACHINE_MISUSE);
	printf("    %s\n", machine_error_text(m, PCPUS));
	CHECK(cpu_halt(m, PCPUS, 1) == MACHINE_MISUSE);
	mmu_read_unlock(m, PCPUS, 0);
	printf("    %s\n", machine_error_text(m, PCPUS));
	mmu_write_unlock(m, PCPUS, 0);
	local_irq_disable(m, PCPUS, "test_misuse");
	CHECK(mmu_read_lock(m, PCPUS, 0) == MACHINE_MISUSE);
	local_irq_enable(m, PCPUS);
	end(m);
}

int main(int argc, char **argv)
{
	uint32_t rounds = argc > 1 ? (uint32_t)atoi(argv[1]) & ~15u : 4000;

	test_misuse();
	test_hand_over();
	test_stop();
	test_deaths();
	test_fairness("a writer among readers", rounds, endless_reader, true);
	test_fairness("a reader among writers", rounds, endless_writer, false);
	test_fairness("a writer among writers", rounds, endless_writer, true);
	test_contention(rounds, 0);
	test_contention(rounds / 4, 8);
	return 0;
}
