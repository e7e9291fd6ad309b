#include "core/chaos.h"

#include <sched.h>

#include "core/counters.h"
#include "core/cpu_types.h"
#include "core/machine_types.h"

/* xorshift64 (Marsaglia 2003). */
static uint64_t chaos_next(struct cpu *c)
{
	uint64_t x = atomic_load_explicit(&c->chaos_state, memory_order_relaxed);

	x ^= x << 13;
	x ^= x >> 7;
	x ^= x << 17;
	atomic_store_explicit(&c->chaos_state, x, memory_order_relaxed);
	return x;
}

void chaos_delay(struct machine *m, uint32_t cpu)
{
	struct cpu *c = &m->cpus[cpu];
	uint64_t x = chaos_next(c), until;

	if ((x >> 16) % m->config.chaos)
		return;
	if ((x & 7) == 0) {
		sched_yield();
		return;
	}
	/* 0.2 us to 52 us, short ones far more often */
	until = monotonic_ns() + 200 + ((x >> 40) & 1023) * (1 + ((x & 0x38) == 0) * 50);
	while (monotonic_ns() < until)
		cpu_relax();
}
