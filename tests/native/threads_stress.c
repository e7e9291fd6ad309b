/* A guest OS with processes that run threads on two vCPUs, without EPT, on real threads.
 *
 * The vCPUs share the OS's lock, records, memory and batches of changes, and each invalidates a batch by itself, while host
 * threads unmap, free and reuse the guest's pages.  Correct: no violation, with PCIDs and without, with the kernel's tables
 * shared and not.  With INVLPG and INVPCID not emulated, or the host's flush left out: violations.
 */
#include "shadow_storm.h"

enum { ENOUGH = 200 }; /* invalidations */

static void create_vcpu(struct shadow_storm *w, uint32_t cpu, bool pcid, bool own_kernel)
{
	struct guest_config config = { .end_gfn = STORM_GFNS, .paging = 1, .pcid = pcid, .switch_every = 500,
				       .unmap_every = 60, .protect_every = 90, .table_every = 2000, .wp_every = 3000,
				       .batch = 8, .interrupts_off = 4096, .own_kernel = own_kernel, .seed = cpu + 1 };

	storm_vcpu_create(&w->storm, cpu, 96, &config);
	if (cpu)
		guest_run_threads(w->storm.m, cpu, 0);
	shadow_storm_vcpu(w, cpu, cpu + 1);
}

/* Add the invalidations of this run to `invalidations`, and return its violations. */
static uint64_t run(enum mutant mutant, bool pcid, bool own_kernel, uint32_t rounds, uint32_t chaos, uint64_t *invalidations)
{
	struct shadow_storm *w = shadow_storm_create(mutant, chaos);
	uint64_t values[COUNTERS], all;

	for (uint32_t cpu = 0; cpu < STORM_VCPUS; cpu++)
		create_vcpu(w, cpu, pcid, own_kernel);
	all = shadow_storm_end(w, rounds, values);
	*invalidations += values[COUNT_GUEST_INVALIDATIONS];
	return all;
}

/* The host's rounds take as long on a busy machine, on which the guests do little meanwhile: so run until they have done enough. */
static void clean(bool pcid, bool own_kernel, uint32_t rounds, uint32_t chaos)
{
	uint64_t invalidations = 0;

	while (invalidations < ENOUGH)
		CHECK(run(CORRECT, pcid, own_kernel, rounds, chaos, &invalidations) == 0);
}

static void broken(enum mutant mutant, bool own_kernel, uint32_t rounds)
{
	uint64_t invalidations = 0;

	CHECK(run(mutant, true, own_kernel, rounds, 0, &invalidations) > 0);
}

int main(int argc, char **argv)
{
	uint32_t rounds = argc > 1 ? (uint32_t)atoi(argv[1]) : 1000;

	harness_begin("threads of one process on two vCPUs: no stale use", 120);
	clean(true, false, rounds, 0);
	harness_begin("the same without PCIDs", 120);
	clean(false, false, rounds, 0);
	harness_begin("each process has tables of its own for the kernel, with chaos", 120);
	clean(true, true, rounds / 4, 200);
	harness_begin("no flush: stale uses are seen", 120);
	broken(NO_FLUSH, false, 100 * rounds);
	harness_begin("INVLPG is not emulated: stale uses are seen", 120);
	broken(NO_INVLPG, true, 100 * rounds);
	return 0;
}
