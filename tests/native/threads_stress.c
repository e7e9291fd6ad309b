/* A guest OS with processes that run threads on two vCPUs, without EPT, on real threads.
 *
 * The vCPUs share the OS's lock, records, memory and batches of changes, and each invalidates a batch by itself, while host
 * threads unmap, free and reuse the guest's pages.  Correct: no violation, with PCIDs and without, with the kernel's tables
 * shared and not.  With INVLPG and INVPCID not emulated, or the host's flush left out: violations.
 */
#include "storm.h"

#include "shadow_machine.h"

#include "tlb/tlb_flush.h"
#include "walk/flush.h"

enum { ENOUGH = 200 }; /* invalidations */

struct world {
	struct storm storm; /* first, so that a storm's address is its world's */
	struct shadow_vm shadow;
	struct shadow_vcpu vcpu[STORM_VCPUS];
};

static void flush(struct storm *s, uint32_t vcpu)
{
	flush_invvpid_single(s->m, vcpu, s->vm, ((struct world *)s)->vcpu[vcpu].vpid, REASON_REMOTE_NOTIFIER);
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

static void create_vcpu(struct world *w, uint32_t cpu, bool pcid, bool own_kernel)
{
	struct guest_config config = { .end_gfn = STORM_GFNS, .paging = 1, .pcid = pcid, .switch_every = 500,
				       .unmap_every = 60, .protect_every = 90, .table_every = 2000, .wp_every = 3000,
				       .batch = 8, .interrupts_off = 4096, .own_kernel = own_kernel, .seed = cpu + 1 };
	struct storm *s = &w->storm;

	storm_vcpu_create(s, cpu, 96, &config);
	if (cpu)
		guest_run_threads(s->m, cpu, 0);
	w->vcpu[cpu].vcpu = cpu;
	w->vcpu[cpu].deaf = s->mutant == NO_INVLPG;
	shadow_vcpu_create(&w->shadow, STORM_VCPUS, &w->vcpu[cpu], cpu + 1);
	s->vmcs[cpu] = w->vcpu[cpu].vmcs;
}

/* Add the invalidations of this run to `invalidations`, and return its violations. */
static uint64_t run(enum mutant mutant, bool pcid, bool own_kernel, uint32_t rounds, uint32_t chaos, uint64_t *invalidations)
{
	static const struct storm_mmu shadow_mmu = { flush, handle_exit, zap };
	struct world *w = calloc(1, sizeof(*w));
	struct storm *s = &w->storm;
	uint64_t values[COUNTERS], all;

	storm_create(s, &shadow_mmu, mutant, chaos);
	w->shadow = (struct shadow_vm){ .m = s->m, .vm = s->vm, .gfns = STORM_GFNS };
	for (uint32_t cpu = 0; cpu < STORM_VCPUS; cpu++)
		create_vcpu(w, cpu, pcid, own_kernel);
	all = storm_run(s, rounds, values);
	printf("    %u zaps, %lu accesses, %lu invalidations, %lu legal stale, %lu exits for instructions, %lu violations\n",
	       atomic_load(&s->zaps), (unsigned long)values[COUNT_ACCESSES],
	       (unsigned long)values[COUNT_GUEST_INVALIDATIONS], (unsigned long)values[COUNT_LEGAL_STALE],
	       (unsigned long)values[COUNT_EXIT_INSTRUCTION], (unsigned long)all);
	CHECK(values[COUNT_EXIT_EXCEPTION] && values[COUNT_EXIT_INSTRUCTION]);
	*invalidations += values[COUNT_GUEST_INVALIDATIONS];
	machine_destroy(s->m);
	free(w);
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
