/* Calls between CPUs: none lost, none run twice, none run while interrupts are off, no wait is endless. */
#include "calls.h"

#include "core/counters.h"
#include "core/cpu_types.h"
#include "core/machine_types.h"
#include "machine/machine.h"
#include "machine/offline.h"
#include "sync/cpu.h"
#include "sync/ipi.h"
#include "sync/smp.h"

/* --- broadcasts against each other ----------------------------------------------------------------- */

static _Atomic uint32_t to_start, to_finish;

/* A barrier that keeps draining. */
static void arrive(struct actor *a, _Atomic uint32_t *missing)
{
	atomic_fetch_sub(missing, 1);
	while (atomic_load(missing)) {
		ipi_drain(a->m, a->cpu);
		sched_yield();
	}
}

static void *broadcaster(void *argument)
{
	struct actor *a = argument;

	cpu_online(a->m, a->cpu);
	arrive(a, &to_start);
	for (uint32_t i = 1; i <= a->rounds; i++) {
		int wait = i % 4 != 0;

		CHECK(on_each_cpu(a->m, a->cpu, IPI_INVEPT_GLOBAL, argument_of(a->cpu, i), wait) == PCPUS);
		for (uint32_t target = 0; wait && target < PCPUS; target++)
			CHECK(seen[target].last[a->cpu] == i); /* acknowledged: it has run */
	}
	arrive(a, &to_finish);
	ipi_drain(a->m, a->cpu);
	cpu_offline(a->m, a->cpu);
	return NULL;
}

static void test_broadcasts(uint32_t rounds, uint32_t chaos)
{
	struct machine *m = begin("broadcasts against each other", chaos);
	struct actor actors[PCPUS];

	atomic_store(&to_start, PCPUS);
	atomic_store(&to_finish, PCPUS);
	start_all(actors, PCPUS, m, 0, rounds, broadcaster);
	join_all(actors, PCPUS);
	for (uint32_t cpu = 0; cpu < PCPUS; cpu++)
		CHECK(seen[cpu].ran == (uint64_t)rounds * PCPUS);
	CHECK(total(m, COUNT_CALLS_RUN) == total(m, COUNT_CSD_QUEUED));
	CHECK(total(m, COUNT_CSD_QUEUED) == (uint64_t)rounds * PCPUS * (PCPUS - 1));
	machine_destroy(m);
}

/* --- senders and targets of different kinds -------------------------------------------------------- */

/* Calls in all forms from a housekeeping CPU. */
static void *sender(void *argument)
{
	struct actor *a = argument;
	uint64_t mask = (1 << PCPUS) - 1;

	for (uint32_t i = 1; i <= a->rounds; i++) {
		uint64_t n = argument_of(a->cpu, i);
		int r;

		if (i % 3 == 0)
			r = smp_call_function_many(a->m, a->cpu, &mask, IPI_INVEPT_GLOBAL, n, i % 2);
		else if (i % 3 == 1)
			r = on_each_cpu(a->m, a->cpu, IPI_INVEPT_GLOBAL, n, i % 2);
		else
			r = smp_call_function_single(a->m, a->cpu, i % PCPUS, IPI_INVEPT_GLOBAL, n, i % 4);
		CHECK(r >= 0);
	}
	atomic_fetch_sub(&senders_left, 1);
	return NULL;
}

static uint64_t calls_expected(uint32_t rounds)
{
	uint64_t calls = 0;

	for (uint32_t i = 1; i <= rounds; i++)
		calls += i % 3 == 2 ? 1 : PCPUS;
	return calls * SENDERS;
}

static void run_senders(const char *name, uint32_t rounds, uint32_t chaos, void *(*target)(void *),
			bool all_run)
{
	struct machine *m = begin(name, chaos);
	struct actor targets[PCPUS], senders[SENDERS];
	uint64_t ran = 0;

	atomic_store(&senders_left, SENDERS);
	start_all(targets, PCPUS, m, 0, rounds, target);
	wait_online(m);
	start_all(senders, SENDERS, m, PCPUS, rounds, sender);
	join_all(senders, SENDERS);
	machine_stop(m);
	join_all(targets, PCPUS);
	for (uint32_t cpu = 0; cpu < PCPUS; cpu++)
		ran += seen[cpu].ran;
	CHECK(ran == total(m, COUNT_CALLS_RUN));
	CHECK(ran <= calls_expected(rounds) && total(m, COUNT_CSD_QUEUED) <= calls_expected(rounds));
	/* The last asynchronous ones may find their target offline; awaited ones did not. */
	if (all_run)
		CHECK(ran + 2 * SENDERS * PCPUS >= calls_expected(rounds));
	machine_destroy(m);
}

/* Halts for a moment, again and again. */
static void *dozer(void *argument)
{
	struct actor *a = argument;
	uint64_t own = 0;
	int r;

	cpu_online(a->m, a->cpu);
	while ((r = cpu_halt(a->m, a->cpu, 1 + a->cpu * 30)) != MACHINE_STOPPED) {
		CHECK(r == 0);
		seen[a->cpu].ran += 1; /* TSan: a sender that serves us must not be here */
		seen[a->cpu].ran -= 1;
		own++;
	}
	cpu_offline(a->m, a->cpu);
	CHECK(own > 0);
	return NULL;
}

/* Goes offline and comes back. */
static void *hotplugged(void *argument)
{
	struct actor *a = argument;

	while (!machine_stopping(a->m)) {
		cpu_online(a->m, a->cpu);
		for (int i = 0; i < 20; i++)
			ipi_drain(a->m, a->cpu);
		cpu_halt(a->m, a->cpu, 5);
		cpu_offline(a->m, a->cpu);
	}
	return NULL;
}

/* Interrupts off most of the time. */
static void *closer(void *argument)
{
	struct actor *a = argument;

	cpu_online(a->m, a->cpu);
	while (!machine_stopping(a->m)) {
		local_irq_disable(a->m, a->cpu, "closer");
		atomic_store(&closed[a->cpu], 1);
		for (int i = 0; i < 50; i++)
			CHECK(ipi_drain(a->m, a->cpu) == 0);
		CHECK(cpu_halt(a->m, a->cpu, 1) == MACHINE_MISUSE);
		atomic_store(&closed[a->cpu], 0);
		local_irq_enable(a->m, a->cpu);
		sched_yield(); /* there are more of these than processors */
	}
	cpu_offline(a->m, a->cpu);
	return NULL;
}

/* --- one call against one change of power ------------------------------------------------------------ */

static _Atomic uint32_t round_of[2]; /* of the target, of the sender */

/* Nothing but the call itself can end the sender's wait: the target neither looks nor comes back before. */
static void *changing(void *argument)
{
	struct actor *a = argument;
	bool unplug = a->shared != NULL;

	cpu_online(a->m, a->cpu);
	for (uint32_t i = 1; i <= a->rounds; i++) {
		atomic_store(&round_of[0], i);
		if (unplug) {
			cpu_offline(a->m, a->cpu);
			while (atomic_load(&round_of[1]) < i)
				sched_yield();
			cpu_online(a->m, a->cpu);
		} else {
			CHECK(cpu_halt(a->m, a->cpu, 0) & ATTENTION_MESSAGE);
			cpu_clear_attention(a->m, a->cpu, ATTENTION_MESSAGE);
		}
	}
	cpu_offline(a->m, a->cpu);
	return NULL;
}

static void test_power(const char *name, uint32_t rounds, uint32_t chaos, bool unplug)
{
	struct machine *m = begin(name, chaos);
	struct actor target = { .m = m, .cpu = 0, .rounds = rounds, .shared = unplug ? m : NULL };

	atomic_store(&round_of[0], 0);
	atomic_store(&round_of[1], 0);
	actor_start(&target, changing);
	for (uint32_t i = 1; i <= rounds; i++) {
		for (uint32_t turn = 1; atomic_load(&round_of[0]) < i; turn++)
			harness_spin(turn);
		for (uint32_t pause = i * 7 % 300; pause; pause--)
			cpu_relax();
		CHECK(smp_call_function_single(m, PCPUS, 0, IPI_ACK_KICK, 0, 1) >= 0);
		atomic_store(&round_of[1], i);
		if (!unplug)
			cpu_notify(m, 0, ATTENTION_MESSAGE);
	}
	actor_join(&target);
	machine_destroy(m);
}

int main(int argc, char **argv)
{
	uint32_t rounds = argc > 1 ? (uint32_t)atoi(argv[1]) : 2000;

	for (uint32_t chaos = 0; chaos <= 8; chaos += 8) {
		uint32_t n = chaos ? rounds / 4 : rounds;

		test_broadcasts(n, chaos);
		test_power("a call against halting", n, chaos, false);
		test_power("a call against going offline", n, chaos, true);
		run_senders("guests that look at attention only", n, chaos, harness_guest, true);
		run_senders("idle targets", n, chaos, harness_idle, true);
		run_senders("targets that doze", n, chaos, dozer, true);
		run_senders("targets with interrupts off", n, chaos, closer, true);
		run_senders("targets that come and go", n, chaos, hotplugged, false);
	}
	return 0;
}
