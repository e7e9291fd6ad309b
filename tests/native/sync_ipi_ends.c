/* Calls between CPUs that end otherwise: the machine stops, a target or a sender goes, or the call is none. */
#include "calls.h"

#include "core/machine_types.h"
#include "machine/machine.h"
#include "machine/offline.h"
#include "sync/cpu.h"
#include "sync/ipi.h"
#include "sync/smp.h"

static void *stuck_sender(void *argument)
{
	struct actor *a = argument;

	cpu_online(a->m, a->cpu);
	CHECK(smp_call_function_single(a->m, a->cpu, 0, IPI_ACK_KICK, 0, 1) == *(int *)a->shared);
	atomic_fetch_sub(&senders_left, 1);
	return NULL;
}

/* CPU 0 is online and drains nothing: senders wait until it dies or the machine stops. */
static void test_ends_wait(const char *name, int expected)
{
	struct machine *m = begin(name, 0);
	struct actor senders[PCPUS - 1];

	cpu_online(m, 0);
	atomic_store(&senders_left, PCPUS - 1);
	for (uint32_t i = 0; i < PCPUS - 1; i++) {
		senders[i] = (struct actor){ .m = m, .cpu = i + 1, .shared = &expected };
		actor_start(&senders[i], stuck_sender);
	}
	for (uint32_t cpu = 1; cpu < PCPUS; cpu++)
		while (cpu_power(m, cpu) != CPU_HALTED)
			usleep(100);
	CHECK(atomic_load(&senders_left) == PCPUS - 1);
	if (expected == MACHINE_STOPPED)
		machine_stop(m);
	else
		cpu_offline(m, 0);
	join_all(senders, PCPUS - 1);
	machine_destroy(m);
}

/* A sender that was taken offline gets to know, and its calls still reach their targets. */
static void test_sender_dies(void)
{
	struct machine *m = begin("a sender taken offline mid-broadcast", 0);
	int expected = MACHINE_OFFLINE;
	struct actor sender = { .m = m, .cpu = 1, .shared = &expected };

	cpu_online(m, 0);
	atomic_store(&senders_left, 1);
	actor_start(&sender, stuck_sender);
	while (cpu_power(m, 1) != CPU_HALTED)
		usleep(100);
	cpu_offline(m, 1);
	actor_join(&sender);
	CHECK(ipi_drain(m, 0) == 1);
	machine_destroy(m);
}

static void *blocked_broadcaster(void *argument)
{
	struct actor *a = argument;

	cpu_online(a->m, a->cpu);
	CHECK(smp_call_function_single(a->m, a->cpu, 3, IPI_ACK_KICK, 0, 0) == 1);
	/* queued for 0, then stuck: the node for 3 is in use */
	CHECK(on_each_cpu(a->m, a->cpu, IPI_INVEPT_GLOBAL, argument_of(a->cpu, 1), 1) == MACHINE_OFFLINE);
	return NULL;
}

/* A sender that gives up half-way kicks whom it queued for: later senders count on it. */
static void test_half_sent(void)
{
	struct machine *m = begin("a sender taken offline half-way", 0);
	struct actor idle = { .m = m, .cpu = 0 }, half = { .m = m, .cpu = 1 };

	cpu_online(m, 3);
	actor_start(&idle, harness_idle);
	while (cpu_power(m, 0) != CPU_HALTED)
		usleep(100);
	actor_start(&half, blocked_broadcaster);
	while (cpu_power(m, 1) != CPU_HALTED)
		usleep(100);
	cpu_offline(m, 1);
	actor_join(&half);
	CHECK(smp_call_function_single(m, PCPUS, 0, IPI_ACK_KICK, 0, 1) == 1);
	CHECK(seen[0].ran == 1);
	machine_stop(m);
	actor_join(&idle);
	machine_destroy(m);
}

static void test_misuse(void)
{
	struct machine *m = begin("misuse", 0);
	uint64_t mask = 3;

	CHECK(on_each_cpu(m, 0, IPI_ACK_KICK, 0, 1) == MACHINE_OFFLINE);
	cpu_online(m, 0);
	CHECK(on_each_cpu(m, 0, IPI_ACK_KICK, 0, 1) == 1);
	CHECK(smp_call_function_single(m, 0, 1, IPI_ACK_KICK, 0, 1) == 0);
	CHECK(smp_call_function_single(m, 0, PCPUS, IPI_ACK_KICK, 0, 1) == MACHINE_MISUSE);
	CHECK(smp_call_function_many(m, 0, &mask, IPI_FUNCTIONS, 0, 1) == MACHINE_MISUSE);
	local_irq_disable(m, 0, "test_misuse");
	CHECK(irqs_disabled(m, 0));
	CHECK(smp_call_function_many(m, 0, &mask, IPI_ACK_KICK, 0, 1) == MACHINE_MISUSE);
	printf("    %s\n", machine_error_text(m, 0));
	local_irq_enable(m, 0);
	CHECK(smp_call_function_many(m, 0, &mask, IPI_ACK_KICK, 0, 1) == 0);
	machine_destroy(m);
}

int main(void)
{
	test_misuse();
	test_ends_wait("stop while senders wait", MACHINE_STOPPED);
	test_ends_wait("a target dies while senders wait", 1);
	test_sender_dies();
	test_half_sent();
	return 0;
}
