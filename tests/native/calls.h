/* Shared by the tests of calls between CPUs: a function that checks its argument, machines, threads. */
#ifndef FLUSHLAB_TEST_CALLS_H
#define FLUSHLAB_TEST_CALLS_H

#include "harness.h"

#include "core/counters.h"
#include "core/machine_types.h"
#include "sync/cpu.h"
#include "sync/ipi.h"

enum { PCPUS = 4, SENDERS = 2 };

/* Results of functions on their target: plain, because only the target's owner may touch them. */
static struct {
	uint64_t ran;
	uint64_t last[PCPUS + SENDERS]; /* last argument by sender */
	char pad[CACHELINE];
} seen[PCPUS];
/* Set by the target with interrupts off. */
static _Atomic uint32_t closed[PCPUS];
static _Atomic uint32_t senders_left;

static inline uint64_t argument_of(uint32_t sender, uint64_t n)
{
	return (uint64_t)sender << 48 | n;
}

/* Calls of one sender to one target come in order and complete. */
static inline void note_call(struct machine *m, struct cpu *target, uint64_t argument)
{
	uint32_t sender = (uint32_t)(argument >> 48);
	uint64_t n = argument & 0xffffffffffff;

	(void)m;
	CHECK(!atomic_load(&closed[target->id]));
	CHECK(n > seen[target->id].last[sender]);
	seen[target->id].last[sender] = n;
	seen[target->id].ran++;
}

static inline struct machine *begin(const char *name, uint32_t chaos)
{
	struct machine *m = harness_machine(PCPUS, SENDERS + 1, chaos);

	harness_begin(name, 60);
	for (uint32_t cpu = 0; cpu < PCPUS; cpu++) {
		seen[cpu].ran = 0;
		for (uint32_t sender = 0; sender < PCPUS + SENDERS; sender++)
			seen[cpu].last[sender] = 0;
	}
	ipi_register(IPI_INVEPT_GLOBAL, note_call);
	return m;
}

static inline uint64_t total(struct machine *m, uint32_t counter)
{
	uint64_t values[COUNTERS];

	counters_sum(m, values);
	return values[counter];
}

static inline void start_all(struct actor *actors, uint32_t n, struct machine *m, uint32_t first,
			     uint32_t rounds, void *(*body)(void *))
{
	for (uint32_t i = 0; i < n; i++) {
		actors[i] = (struct actor){ .m = m, .cpu = first + i, .rounds = rounds };
		actor_start(&actors[i], body);
	}
}

static inline void join_all(struct actor *actors, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++)
		actor_join(&actors[i]);
}

static inline void wait_online(struct machine *m)
{
	for (uint32_t cpu = 0; cpu < PCPUS; cpu++)
		while (cpu_power(m, cpu) == CPU_OFFLINE)
			usleep(100);
}

#endif
