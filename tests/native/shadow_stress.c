/* Guests without EPT on real threads, against a host that unmaps, frees and reuses their pages.
 *
 * As guest_stress.c, but KVM shadows the guests' tables: the vCPUs serve their page faults and their invalidations.
 * Correct: no violation, with and without VPIDs.  With the flush left out, with faults that do not retry, or with INVLPG
 * that KVM does not emulate: violations.
 */
#include "shadow_storm.h"

static uint64_t run(enum mutant mutant, bool vpid, uint32_t rounds, uint32_t chaos)
{
	struct shadow_storm *w = shadow_storm_create(mutant, chaos);
	uint64_t values[COUNTERS];

	for (uint32_t cpu = 0; cpu < STORM_VCPUS; cpu++) {
		storm_guest(&w->storm, cpu, 96, vpid);
		shadow_storm_vcpu(w, cpu, vpid ? cpu + 1 : 0);
	}
	return shadow_storm_end(w, rounds, values);
}

int main(int argc, char **argv)
{
	uint32_t rounds = argc > 1 ? (uint32_t)atoi(argv[1]) : 1000;

	harness_begin("shadow tables: no stale use", 120);
	CHECK(run(CORRECT, true, rounds, 0) == 0);
	harness_begin("the same without VPIDs and PCIDs", 120);
	CHECK(run(CORRECT, false, rounds, 0) == 0);
	harness_begin("the same with chaos", 120);
	CHECK(run(CORRECT, true, rounds / 4, 200) == 0);
	harness_begin("no flush: stale uses are seen", 120);
	CHECK(run(NO_FLUSH, true, 100 * rounds, 0) > 0);
	harness_begin("no wait for acknowledgements: stale uses are seen", 120);
	CHECK(run(NO_WAIT, true, 100 * rounds, 500) > 0);
	harness_begin("faults that do not retry: stale uses are seen", 120);
	CHECK(run(NO_RETRY, true, 100 * rounds, 500) > 0);
	harness_begin("INVLPG is not emulated: stale uses are seen", 120);
	CHECK(run(NO_INVLPG, true, 100 * rounds, 0) > 0);
	return 0;
}
