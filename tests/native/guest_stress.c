/* Guests on real threads against a host that unmaps, frees and reuses their pages.
 *
 * Two pCPUs run a guest each; they serve their EPT violations under mmu_lock held for read with
 * mmu_invalidate_seq.  Two host threads go through the mmu_notifier protocol: zap, flush, promise, free.  The
 * migrator is implied: each pCPU's own vCPU stays.  Correct: no violation, and uses were averted.  With the
 * flush left out, or with faults that do not retry: violations.
 */
#include "harness.h"

#include "core/counters.h"
#include "core/machine_types.h"
#include "ept/ept.h"
#include "ept/ept_map.h"
#include "ept/tdp_walk.h"
#include "guest/guest.h"
#include "guest/run.h"
#include "machine/machine.h"
#include "machine/offline.h"
#include "machine/vms.h"
#include "memory/frame.h"
#include "memory/mm.h"
#include "oracle/ledger.h"
#include "oracle/oracle.h"
#include "sync/cpu.h"
#include "sync/ipi.h"
#include "sync/rcu.h"
#include "sync/smp.h"
#include "vm/guest_state.h"
#include "vm/mmu_invalidate.h"
#include "vm/mmu_lock.h"
#include "vm/vm.h"
#include "walk/flush.h"
#include "walk/vmcs.h"
#include "walk/walk.h"

enum { GFNS = 512, PAGES = 128, RECORDS = 4096, REQUEST_FLUSH = 0 };

enum mutant { CORRECT, NO_FLUSH, NO_WAIT, NO_RETRY };

struct world {
	struct machine *m;
	uint32_t vm;
	uint32_t root;
	uint32_t vmcs[2];
	enum mutant mutant;
	_Atomic uint32_t zaps;
	_Atomic uint64_t pages;
	uint64_t records[2][RECORDS];
	uint64_t page[2][PAGES];
};

static uint64_t violations(struct machine *m)
{
	uint64_t counts[VIOLATIONS], all = 0;

	oracle_counts(m, counts);
	for (int i = 0; i < VIOLATIONS; i++)
		all += counts[i];
	return all;
}

/* direct_page_fault(), reduced to 4K pages.  A vCPU that loses a race faults again.
 *
 * A guest without memory at gfn has read its page tables through a stale translation, from a page that is another's
 * by now.  That ends the run: of its violations at least one has been counted. */
static void fault(struct world *w, uint32_t cpu, uint64_t gfn)
{
	uint64_t seq = mmu_invalidate_seq(w->m, w->vm);
	struct mm_page page;

	if (gfn >= GFNS) {
		CHECK(violations(w->m));
		machine_stop(w->m);
		return;
	}
	CHECK(mm_fault(w->m, cpu, w->vm, gfn, 1, &page) == 0);
	if (mmu_read_lock(w->m, cpu, w->vm))
		return;
	if (w->mutant == NO_RETRY || !mmu_invalidate_retry_gfn(w->m, w->vm, seq, gfn)) {
		rcu_read_lock(w->m, cpu);
		ept_map_page(w->m, cpu, w->vm, w->root, gfn, &page);
		rcu_read_unlock(w->m, cpu);
	}
	mmu_read_unlock(w->m, cpu, w->vm);
}

/* vcpu_enter_guest(): mode, then requests. */
static void *run_vcpu(void *argument)
{
	struct actor *actor = argument;
	struct world *w = actor->shared;
	uint32_t vcpu = actor->cpu;
	struct vcpu_exit out;

	cpu_online(actor->m, actor->cpu);
	CHECK(vmptrld(actor->m, actor->cpu, w->vmcs[vcpu]) == 0);
	vcpu_set_cpu(actor->m, vcpu, (int)actor->cpu);
	while (!machine_stopping(actor->m)) {
		int r;

		if (kvm_check_request(actor->m, vcpu, REQUEST_FLUSH))
			flush_invept_global(actor->m, actor->cpu, w->vm, REASON_REMOTE_NOTIFIER);
		local_irq_disable(actor->m, actor->cpu, "vcpu_enter_guest");
		vcpu_set_mode(actor->m, vcpu, IN_GUEST_MODE);
		if (kvm_requests(actor->m, vcpu)) {
			vcpu_set_mode(actor->m, vcpu, OUTSIDE_GUEST_MODE);
			local_irq_enable(actor->m, actor->cpu);
			continue;
		}
		r = guest_run(actor->m, actor->cpu, vcpu, 200000, &out);
		CHECK(r >= 0);
		if (r == EXIT_EPT_VIOLATION)
			fault(w, actor->cpu, out.gpa >> 12);
	}
	cpu_offline(actor->m, actor->cpu);
	return NULL;
}

/* kvm_flush_remote_tlbs() */
static int flush(struct world *w, uint32_t cpu)
{
	uint64_t mask = 0;

	if (w->mutant == NO_FLUSH)
		return 0;
	for (uint32_t vcpu = 0; vcpu < 2; vcpu++) {
		kvm_make_request(w->m, vcpu, REQUEST_FLUSH);
		if (vcpu_exiting_guest_mode(w->m, vcpu) != OUTSIDE_GUEST_MODE)
			mask |= 1ull << vcpu_cpu(w->m, vcpu);
	}
	return mask ? smp_call_function_many(w->m, cpu, &mask, IPI_ACK_KICK, 0, w->mutant != NO_WAIT) : 0;
}

static void zap(struct world *w, uint32_t cpu, uint64_t start, uint64_t end)
{
	struct tdp_chunk chunk = { .root = w->root, .root_level = 4, .walk = TDP_ZAP_LEAFS,
				   .next_gfn = start, .end_gfn = end };

	if (mmu_write_lock(w->m, cpu, w->vm))
		return;
	mmu_invalidate_begin(w->m, w->vm);
	mmu_invalidate_range_add(w->m, w->vm, start, end);
	while (!chunk.done)
		CHECK(tdp_walk_chunk(w->m, cpu, w->vm, &chunk, 16) >= 0);
	if (chunk.flush)
		flush(w, cpu);
	mmu_write_unlock(w->m, cpu, w->vm);
	oracle_revoke(w->m, cpu, w->vm, start, end, PROMISE_NOTIFIER, 0);
	atomic_fetch_add_explicit(&w->pages, mm_unmap(w->m, cpu, w->vm, start, end, 1), memory_order_relaxed);
	if (mmu_write_lock(w->m, cpu, w->vm))
		return;
	mmu_invalidate_end(w->m, w->vm);
	mmu_write_unlock(w->m, cpu, w->vm);
}

static void *run_host(void *argument)
{
	struct actor *actor = argument;
	struct world *w = actor->shared;
	uint32_t random = actor->cpu * 2654435761u + 1;

	for (uint32_t i = 0; i < actor->rounds && !machine_stopping(actor->m); i++) {
		uint64_t start;

		random = random * 1664525 + 1013904223;
		start = (random >> 16) % (GFNS - 16);
		zap(w, actor->cpu, start, start + 16);
		/* Room for the guests to fault pages in again. */
		cpu_wait_event(actor->m, actor->cpu, cpu_event(actor->m, actor->cpu), 200);
		atomic_fetch_add_explicit(&w->zaps, 1, memory_order_relaxed);
		if (w->mutant != CORRECT && i > 200 && i % 32 == 0 && violations(actor->m))
			break;
	}
	return NULL;
}

static void make_guest(struct world *w, uint32_t cpu)
{
	struct guest_config config = { .first_gfn = cpu * 256, .end_gfn = cpu * 256 + 256, .paging = 1,
				       .pcid = 1, .switch_every = 3000, .unmap_every = 700,
				       .protect_every = 900, .seed = cpu + 1 };
	int vcpu = vcpu_create(w->m, w->vm);

	CHECK(vcpu == (int)cpu);
	for (uint64_t i = 0; i < PAGES; i++)
		w->page[cpu][i] = 0x1000 + i * 3;
	for (uint64_t i = 0; i < RECORDS; i++)
		w->records[cpu][i] = (i % 3 == 0 ? 1ull << 62 : 0) |
				     w->page[cpu][i * 2654435761u / 64 % PAGES] << 12 | (i * 8 & 0xff8);
	CHECK(guest_configure(w->m, (uint32_t)vcpu, &config) == 0);
	for (int i = 0; i < 3; i++)
		CHECK(guest_add_process(w->m, (uint32_t)vcpu, w->records[cpu], RECORDS, w->page[cpu],
					PAGES) == 0);
	w->vmcs[cpu] = (uint32_t)vmcs_create(w->m, (uint32_t)vcpu, cpu + 1);
	vmcs_write_eptp(w->m, w->vmcs[cpu], w->root, 4);
}

static uint64_t run(enum mutant mutant, uint32_t rounds, uint32_t chaos)
{
	struct machine_config config = { .pcpus = 2, .housekeeping = 3, .vms = 1, .vcpus = 2,
					 .root_frames = 4, .table_frames = 64, .guest_frames = 1024,
					 .guest_blocks = 1, .l1_ways = 4, .l2_entries = 1536, .l2_ways = 12,
					 .psc_entries = 32, .chaos = chaos, .seed = 7 };
	struct world *w = calloc(1, sizeof(*w));
	uint64_t values[COUNTERS], all;
	struct actor actors[5];
	char error[200];

	w->m = machine_create(&config, error, sizeof(error));
	CHECK(w->m);
	w->mutant = mutant;
	w->vm = (uint32_t)vm_create(w->m, GFNS);
	w->root = (uint32_t)ept_table_alloc(w->m, 0, FRAME_ROOT);
	for (uint32_t cpu = 0; cpu < 2; cpu++)
		make_guest(w, cpu);
	for (uint32_t i = 0; i < 5; i++) {
		actors[i] = (struct actor){ .m = w->m, .cpu = i, .rounds = rounds, .shared = w };
		actor_start(&actors[i], i < 2 ? run_vcpu : i < 4 ? run_host : harness_rcu);
	}
	actor_join(&actors[2]);
	actor_join(&actors[3]);
	machine_stop(w->m);
	for (uint32_t i = 0; i < 5; i++)
		if (i != 2 && i != 3)
			actor_join(&actors[i]);
	all = violations(w->m);
	counters_sum(w->m, values);
	printf("    %u zaps, %lu pages, %lu accesses, %lu averted, %lu legal stale, %lu violations\n",
	       atomic_load(&w->zaps), (unsigned long)atomic_load(&w->pages),
	       (unsigned long)values[COUNT_ACCESSES], (unsigned long)values[COUNT_AVERTED],
	       (unsigned long)values[COUNT_LEGAL_STALE], (unsigned long)all);
	CHECK(atomic_load(&w->pages) && values[COUNT_ACCESSES]);
	if (mutant == CORRECT && !chaos)
		CHECK(values[COUNT_AVERTED]);
	machine_destroy(w->m);
	free(w);
	return all;
}

int main(int argc, char **argv)
{
	uint32_t rounds = argc > 1 ? (uint32_t)atoi(argv[1]) : 2000;

	harness_begin("zap, flush, promise, free: no stale use", 120);
	CHECK(run(CORRECT, rounds, 0) == 0);
	harness_begin("the same with chaos", 120);
	CHECK(run(CORRECT, rounds / 4, 200) == 0);
	harness_begin("no flush: stale uses are seen", 120);
	CHECK(run(NO_FLUSH, 100 * rounds, 0) > 0);
	harness_begin("no wait for acknowledgements: stale uses are seen", 120);
	CHECK(run(NO_WAIT, 100 * rounds, 500) > 0);
	harness_begin("faults that do not retry: stale uses are seen", 120);
	CHECK(run(NO_RETRY, 100 * rounds, 500) > 0);
	return 0;
}
