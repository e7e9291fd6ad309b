#include "machine/cpus.h"

#include "core/counters.h"
#include "core/cpu_types.h"
#include "core/heap.h"
#include "core/machine_types.h"
#include "sync/cpu.h"
#include "tlb/tlb.h"
#include "walk/flush.h"

/* splitmix64 (Steele, Lea, Flood 2014): different CPUs, different streams; never 0. */
static uint64_t chaos_seed(uint64_t seed, uint32_t cpu)
{
	uint64_t z = seed + (cpu + 1) * 0x9e3779b97f4a7c15ull;

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
	z ^= z >> 31;
	return z ? z : 1;
}

static int cpu_create(struct machine *m, uint32_t id)
{
	struct cpu *c = &m->cpus[id];

	c->id = id;
	atomic_init(&c->chaos_state, chaos_seed(m->config.seed, id));
	atomic_init(&c->power, cpu_is_target(m, id) ? CPU_OFFLINE : CPU_RUNNING);
	c->counters = counters_create(m);
	if (!c->counters)
		return MACHINE_NOMEM;
	if (!cpu_is_target(m, id))
		return 0;
	c->tlb = tlb_create_in(m->heap, &m->config);
	return c->tlb ? 0 : MACHINE_NOMEM;
}

int cpus_create(struct machine *m)
{
	m->cpus = heap_zalloc_lines(m->heap, m->cpu_count, sizeof(*m->cpus));
	if (!m->cpus)
		return MACHINE_NOMEM;
	for (uint32_t id = 0; id < m->cpu_count; id++) {
		int r = cpu_create(m, id);

		if (r)
			return r;
	}
	return 0;
}

void cpus_destroy(struct machine *m)
{
	for (uint32_t id = 0; m->cpus && id < m->cpu_count; id++) {
		struct cpu *c = &m->cpus[id];

		if (c->tlb)
			tlb_destroy(c->tlb);
		counters_destroy(m, c->counters);
		flush_account_destroy(m, c);
		heap_free(m->heap, c->csds);
		heap_free(m->heap, c->calls_sent);
		heap_free(m->heap, c->stepped);
	}
	heap_free(m->heap, m->cpus);
	m->cpus = NULL;
}
