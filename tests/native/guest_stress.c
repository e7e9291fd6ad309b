/* Guests on real threads against a host that unmaps, frees and reuses their pages.
 *
 * The vCPUs serve their EPT violations under mmu_lock held for read with mmu_invalidate_seq.  Correct: no violation,
 * and uses were averted; so on Hyper-V, where a flush is a hypercall.  With the flush left out, or with faults that do not
 * retry: violations.
 */
#include "storm.h"

#include "ept/ept.h"
#include "ept/ept_map.h"
#include "ept/tdp_walk.h"
#include "memory/frame.h"
#include "sync/rcu.h"
#include "walk/flush.h"

struct world {
	struct storm storm; /* first, so that a storm's address is its world's */
	uint32_t root;
};

static void flush(struct storm *s, uint32_t vcpu)
{
	flush_invept_global(s->m, vcpu, s->vm, REASON_REMOTE_NOTIFIER);
}

/* direct_page_fault(), reduced to 4K pages.  A vCPU that loses a race faults again. */
static bool fault(struct storm *s, uint32_t cpu, int reason, const struct vcpu_exit *out)
{
	uint64_t seq = mmu_invalidate_seq(s->m, s->vm), gfn = out->gpa >> 12;
	struct mm_page page;

	if (reason != EXIT_EPT_VIOLATION)
		return true;
	if (gfn >= STORM_GFNS)
		return false;
	CHECK(mm_fault(s->m, cpu, s->vm, gfn, 1, &page) == 0);
	if (mmu_read_lock(s->m, cpu, s->vm))
		return true;
	if (s->mutant == NO_RETRY || !mmu_invalidate_retry_gfn(s->m, s->vm, seq, gfn)) {
		rcu_read_lock(s->m, cpu);
		ept_map_page(s->m, cpu, s->vm, ((struct world *)s)->root, gfn, &page);
		rcu_read_unlock(s->m, cpu);
	}
	mmu_read_unlock(s->m, cpu, s->vm);
	return true;
}

static bool zap(struct storm *s, uint32_t cpu, uint64_t start, uint64_t end)
{
	struct tdp_chunk chunk = { .root = ((struct world *)s)->root, .root_level = 4, .walk = TDP_ZAP_LEAFS,
				   .next_gfn = start, .end_gfn = end };

	while (!chunk.done)
		CHECK(tdp_walk_chunk(s->m, cpu, s->vm, &chunk, 16) >= 0);
	return chunk.flush;
}

static uint64_t run(enum mutant mutant, uint32_t rounds, uint32_t chaos, bool hyperv)
{
	static const struct storm_mmu tdp = { flush, fault, zap };
	struct world *w = calloc(1, sizeof(*w));
	struct storm *s = &w->storm;
	uint64_t values[COUNTERS], all;

	s->hyperv = hyperv;
	storm_create(s, &tdp, mutant, chaos);
	s->hyperv_root = w->root = (uint32_t)ept_table_alloc(s->m, 0, FRAME_ROOT);
	for (uint32_t cpu = 0; cpu < STORM_VCPUS; cpu++) {
		storm_guest(s, cpu, 128, true);
		s->vmcs[cpu] = (uint32_t)vmcs_create(s->m, cpu, cpu + 1);
		vmcs_write_eptp(s->m, s->vmcs[cpu], w->root, 4);
	}
	all = storm_run(s, rounds, values);
	printf("    %u zaps, %lu pages, %lu accesses, %lu averted, %lu legal stale, %lu violations\n",
	       atomic_load(&s->zaps), (unsigned long)atomic_load(&s->pages),
	       (unsigned long)values[COUNT_ACCESSES], (unsigned long)values[COUNT_AVERTED],
	       (unsigned long)values[COUNT_LEGAL_STALE], (unsigned long)all);
	CHECK(atomic_load(&s->pages));
	if (mutant == CORRECT && !chaos)
		CHECK(values[COUNT_AVERTED]);
	if (hyperv) /* beneath the guests, which do not exit */
		CHECK(values[COUNT_HYPERCALL_FLUSHES] && !values[COUNT_INTERRUPTIONS]);
	machine_destroy(s->m);
	free(w);
	return all;
}

int main(int argc, char **argv)
{
	uint32_t rounds = argc > 1 ? (uint32_t)atoi(argv[1]) : 2000;

	harness_begin("zap, flush, promise, free: no stale use", 120);
	CHECK(run(CORRECT, rounds, 0, false) == 0);
	harness_begin("the same with chaos", 120);
	CHECK(run(CORRECT, rounds / 4, 200, false) == 0);
	harness_begin("hypercalls instead of requests and interrupts", 120);
	CHECK(run(CORRECT, rounds, 0, true) == 0);
	CHECK(run(CORRECT, rounds / 4, 200, true) == 0);
	harness_begin("no flush: stale uses are seen", 120);
	CHECK(run(NO_FLUSH, 100 * rounds, 0, false) > 0);
	harness_begin("no wait for acknowledgements: stale uses are seen", 120);
	CHECK(run(NO_WAIT, 100 * rounds, 500, false) > 0);
	harness_begin("faults that do not retry: stale uses are seen", 120);
	CHECK(run(NO_RETRY, 100 * rounds, 500, false) > 0);
	return 0;
}
