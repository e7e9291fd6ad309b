/* Shared by the C tests: a small machine, threads that drive CPUs, checks, and a watchdog. */
#ifndef FLUSHLAB_TEST_HARNESS_H
#define FLUSHLAB_TEST_HARNESS_H

#define _GNU_SOURCE

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "core/cpu_types.h"
#include "core/machine_types.h"
#include "machine/machine.h"
#include "machine/offline.h"
#include "sync/cpu.h"
#include "sync/ipi.h"
#include "sync/rcu.h"

#define CHECK(condition)                                                                           \
	do {                                                                                       \
		if (!(condition)) {                                                                \
			fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);            \
			_exit(1);                                                                  \
		}                                                                                  \
	} while (0)

/* The name of the test, for the watchdog's message. */
static const char *volatile harness_test = "?";

static inline void harness_timeout(int signal)
{
	static const char text[] = "hangs: ";
	const char *name = harness_test;
	size_t n = 0;

	(void)signal;
	while (name[n])
		n++;
	if (write(2, text, sizeof(text) - 1) < 0 || write(2, name, n) < 0 || write(2, "\n", 1) < 0)
		_exit(3);
	_exit(2);
}

/* Before each test: its name, and how long it may take. */
static inline void harness_begin(const char *name, unsigned seconds)
{
	harness_test = name;
	signal(SIGALRM, harness_timeout);
	alarm(seconds);
	printf("  %s\n", name);
	fflush(stdout);
}

/* A turn of a wait for another thread.  It spins, so that both go on at once; the thread may have no processor. */
static inline void harness_spin(uint32_t turn)
{
	cpu_relax();
	if (turn % 4096 == 0)
		sched_yield();
}

static inline struct machine *harness_machine(uint32_t pcpus, uint32_t housekeeping, uint32_t chaos)
{
	struct machine_config config = {
		.pcpus = pcpus, .housekeeping = housekeeping, .vms = 2, .vcpus = 4,
		.root_frames = 8, .table_frames = 64, .guest_frames = 64, .guest_blocks = 0,
		.l1_ways = 4, .l2_entries = 64, .l2_ways = 4, .psc_entries = 16,
		.chaos = chaos, .seed = 1,
	};
	char error[200] = "";
	struct machine *m = machine_create(&config, error, sizeof(error));

	if (!m)
		fprintf(stderr, "%s\n", error);
	CHECK(m);
	return m;
}

/* One thread per CPU. */
struct actor {
	struct machine *m;
	uint32_t cpu;
	uint32_t rounds;
	void *shared;
	pthread_t thread;
};

static inline void actor_start(struct actor *actor, void *(*body)(void *))
{
	CHECK(pthread_create(&actor->thread, NULL, body, actor) == 0);
}

static inline void actor_join(struct actor *actor)
{
	CHECK(pthread_join(actor->thread, NULL) == 0);
}

/* An RCU thread for machines that need one. */
static inline void *harness_rcu(void *argument)
{
	struct actor *actor = argument;

	CHECK(rcu_thread(actor->m, actor->cpu) == 0);
	return NULL;
}

/* Any pCPU that does nothing: halts until the machine stops. */
static inline void *harness_idle(void *argument)
{
	struct actor *actor = argument;
	int r;

	cpu_online(actor->m, actor->cpu);
	while ((r = cpu_halt(actor->m, actor->cpu, 0)) >= 0)
		cpu_clear_attention(actor->m, actor->cpu, (uint32_t)r);
	CHECK(r == MACHINE_STOPPED);
	cpu_offline(actor->m, actor->cpu);
	return NULL;
}

/* Any pCPU that runs a guest: looks at attention only, as guest_run() does between two accesses.  Yields now and
 * then: there are more of these than processors. */
static inline void *harness_guest(void *argument)
{
	struct actor *actor = argument;
	struct cpu *c = &actor->m->cpus[actor->cpu];

	cpu_online(actor->m, actor->cpu);
	for (uint32_t polls = 1;; polls++) {
		uint32_t bits = atomic_load_explicit(&c->attention, memory_order_acquire);

		if (bits & ATTENTION_IPI)
			ipi_drain(actor->m, actor->cpu);
		if (bits & ATTENTION_STOP)
			break;
		if (polls % 64 == 0)
			sched_yield();
	}
	cpu_offline(actor->m, actor->cpu);
	return NULL;
}

#endif
