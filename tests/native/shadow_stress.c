/* Guests without EPT on real threads, against a host that unmaps, frees and reuses their pages.
 *
 * As guest_stress.c, but KVM shadows the guests' tables: the vCPUs serve their page faults and their invalidations.
 * Correct: no violation, with and without VPIDs.  With the flush left out, with faults that do not retry, or with INVLPG
 * that KVM does not emulate: violations.
 */
#include "storm.h"

#include "shadow_machine.h"

#include "tlb/tlb_flush.h"
#include "walk/flush.h"

struct world {
	struct storm storm; /* first, so that a storm's address is its world's */
	struct shadow_vm shadow;
	struct shadow_vcpu vcpu[STORM_VCPUS];
};

static void flush(struct storm *s, uint32_t vcpu)
{
	uint32_t vpid = ((struct world *)s)->vcpu[vcpu].vpid;

	/* VM entry and exit flush without a VPID. */
	if (vpid)
		flush_invvpid_single(s->m, vcpu, s->vm, vpid, REASON_REMOTE_NOTIFIER);
}

static bool handle_exit(struct storm *s, uint32_t vcpu, int reason, const struct vcpu_exit *out)
{
	struct world *w = (struct world *)s;

	return shadow_exit(&w->shadow, vcpu, &w->vcpu[vcpu], reason, out);
}

static bool zap(struct storm *s, uint32_t cpu, uint64_t start, uint64_t end)
{
	bool any = false;

	for (uint64_t gfn = start; gfn < end; gfn++)
		any |= shadow_zap_gfn(&((struct world *)s)->shadow, cpu, gfn);
	return any;
}

static uint64_t run(enum mutant mutant, bool vpid, uint32_t rounds, uint32_t chaos)
{
	static const struct storm_mmu shadow_mmu = { flush, handle_exit, zap };
	struct world *w = calloc(1, sizeof(*w));
	struct storm *s = &w->storm;
	uint64_t values[COUNTERS], all;

	storm_create(s, &shadow_mmu, mutant, chaos);
	w->shadow.m = s->m;
	w->shadow.vm = s->vm;
	w->shadow.gfns = STORM_GFNS;
	w->shadow.no_retry = mutant == NO_RETRY;
	for (uint32_t cpu = 0; cpu < STORM_VCPUS; cpu++) {
		storm_guest(s, cpu, 96, vpid);
		w->vcpu[cpu].vcpu = cpu;
		w->vcpu[cpu].deaf = mutant == NO_INVLPG;
		shadow_vcpu_create(&w->shadow, STORM_VCPUS, &w->vcpu[cpu], vpid ? cpu + 1 : 0);
		s->vmcs[cpu] = w->vcpu[cpu].vmcs;
	}
	all = storm_run(s, rounds, values);
	printf("    %u zaps, %lu accesses, %lu exits for faults, %lu for instructions, %lu violations\n",
	       atomic_load(&s->zaps), (unsigned long)values[COUNT_ACCESSES],
	       (unsigned long)values[COUNT_EXIT_EXCEPTION], (unsigned long)values[COUNT_EXIT_INSTRUCTION],
	       (unsigned long)all);
	CHECK(values[COUNT_EXIT_EXCEPTION] && values[COUNT_EXIT_INSTRUCTION]);
	machine_destroy(s->m);
	free(w);
	return all;
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
