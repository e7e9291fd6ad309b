/* A storm without EPT: KVM shadows the tables of its guests (storm.h, shadow_machine.h). */
#ifndef FLUSHLAB_TEST_SHADOW_STORM_H
#define FLUSHLAB_TEST_SHADOW_STORM_H

#include "storm.h"

#include "shadow_machine.h"

#include "tlb/tlb_flush.h"
#include "walk/flush.h"

struct shadow_storm {
	struct storm storm; /* first, so that a storm's address is that of its shadow_storm */
	struct shadow_vm shadow;
	struct shadow_vcpu vcpu[STORM_VCPUS];
};

static void shadow_storm_flush(struct storm *s, uint32_t vcpu)
{
	uint32_t vpid = ((struct shadow_storm *)s)->vcpu[vcpu].vpid;

	/* Without a VPID, VM entry and VM exit flush. */
	if (vpid)
		flush_invvpid_single(s->m, vcpu, s->vm, vpid, REASON_REMOTE_NOTIFIER);
}

static bool shadow_storm_exit(struct storm *s, uint32_t vcpu, int reason, const struct vcpu_exit *out)
{
	struct shadow_storm *w = (struct shadow_storm *)s;

	return shadow_exit(&w->shadow, vcpu, &w->vcpu[vcpu], reason, out);
}

static bool shadow_storm_zap(struct storm *s, uint32_t cpu, uint64_t start, uint64_t end)
{
	bool any = false;

	for (uint64_t gfn = start; gfn < end; gfn++)
		any |= shadow_zap_gfn(&((struct shadow_storm *)s)->shadow, cpu, gfn);
	return any;
}

static struct shadow_storm *shadow_storm_create(enum mutant mutant, uint32_t chaos)
{
	static const struct storm_mmu mmu = { shadow_storm_flush, shadow_storm_exit, shadow_storm_zap };
	struct shadow_storm *w = calloc(1, sizeof(*w));

	storm_create(&w->storm, &mmu, mutant, chaos);
	w->shadow = (struct shadow_vm){ .m = w->storm.m, .vm = w->storm.vm, .gfns = STORM_GFNS,
					.no_retry = mutant == NO_RETRY };
	return w;
}

/* Let KVM shadow the tables of a vCPU that the storm has created.  vpid: 0 for none. */
static void shadow_storm_vcpu(struct shadow_storm *w, uint32_t cpu, uint32_t vpid)
{
	w->vcpu[cpu].vcpu = cpu;
	w->vcpu[cpu].deaf = w->storm.mutant == NO_INVLPG;
	shadow_vcpu_create(&w->shadow, STORM_VCPUS, &w->vcpu[cpu], vpid);
	w->storm.vmcs[cpu] = w->vcpu[cpu].vmcs;
}

/* Run the storm and free it; write its counters to values[COUNTERS], and return its violations. */
static uint64_t shadow_storm_end(struct shadow_storm *w, uint32_t rounds, uint64_t *values)
{
	uint64_t all = storm_run(&w->storm, rounds, values);

	printf("    %u zaps, %lu accesses, %lu invalidations, %lu legal stale, %lu exits for faults, %lu for instructions, "
	       "%lu violations\n",
	       atomic_load(&w->storm.zaps), (unsigned long)values[COUNT_ACCESSES],
	       (unsigned long)values[COUNT_GUEST_INVALIDATIONS], (unsigned long)values[COUNT_LEGAL_STALE],
	       (unsigned long)values[COUNT_EXIT_EXCEPTION], (unsigned long)values[COUNT_EXIT_INSTRUCTION],
	       (unsigned long)all);
	CHECK(values[COUNT_EXIT_EXCEPTION] && values[COUNT_EXIT_INSTRUCTION]);
	machine_destroy(w->storm.m);
	free(w);
	return all;
}

#endif
