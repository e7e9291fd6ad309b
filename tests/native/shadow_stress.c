/* Guests without EPT on real threads, against a host that unmaps, frees and reuses their pages.
 *
 * As guest_stress.c, but KVM shadows the guests' tables: two pCPUs run a guest each and serve its page faults and its
 * invalidations, two host threads go through the mmu_notifier protocol.  Correct: no violation, with and without VPIDs.
 * With the flush left out, with faults that do not retry, or with INVLPG that KVM does not emulate: violations.
 */
#include "shadow_machine.h"

#include "core/counters.h"
#include "core/machine_types.h"
#include "guest/guest.h"
#include "guest/run.h"
#include "machine/machine.h"
#include "machine/vms.h"
#include "oracle/ledger.h"
#include "oracle/oracle.h"
#include "sync/cpu.h"
#include "sync/ipi.h"
#include "sync/smp.h"
#include "tlb/tlb_flush.h"

enum { GFNS = 512, PAGES = 96, RECORDS = 4096, REQUEST_FLUSH = 0 };

enum mutant { CORRECT, NO_FLUSH, NO_WAIT, NO_RETRY, NO_INVLPG };

struct world {
	struct shadow_vm shadow;
	struct shadow_vcpu vcpu[2];
	enum mutant mutant;
	_Atomic uint32_t zaps;
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

static void *run_vcpu(void *argument)
{
	struct actor *actor = argument;
	struct world *w = actor->shared;
	struct shadow_vcpu *v = &w->vcpu[actor->cpu];
	struct vcpu_exit out;

	cpu_online(actor->m, actor->cpu);
	CHECK(vmptrld(actor->m, actor->cpu, v->vmcs) == 0);
	vcpu_set_cpu(actor->m, v->vcpu, (int)actor->cpu);
	while (!machine_stopping(actor->m)) {
		int r;

		if (kvm_check_request(actor->m, v->vcpu, REQUEST_FLUSH) && v->vpid)
			flush_invvpid_single(actor->m, actor->cpu, w->shadow.vm, v->vpid, REASON_REMOTE_NOTIFIER);
		local_irq_disable(actor->m, actor->cpu, "vcpu_enter_guest");
		vcpu_set_mode(actor->m, v->vcpu, IN_GUEST_MODE);
		if (kvm_requests(actor->m, v->vcpu)) {
			vcpu_set_mode(actor->m, v->vcpu, OUTSIDE_GUEST_MODE);
			local_irq_enable(actor->m, actor->cpu);
			continue;
		}
		r = guest_run(actor->m, actor->cpu, v->vcpu, 200000, &out);
		CHECK(r >= 0);
		/* Its page tables, read through a stale translation, are bytes of another. */
		if (!shadow_exit(&w->shadow, actor->cpu, v, r, &out)) {
			CHECK(violations(actor->m));
			machine_stop(actor->m);
		}
	}
	cpu_offline(actor->m, actor->cpu);
	return NULL;
}

/* kvm_flush_remote_tlbs() */
static int flush(struct world *w, uint32_t cpu)
{
	struct machine *m = w->shadow.m;
	uint64_t mask = 0;

	if (w->mutant == NO_FLUSH)
		return 0;
	for (uint32_t vcpu = 0; vcpu < 2; vcpu++) {
		kvm_make_request(m, vcpu, REQUEST_FLUSH);
		if (vcpu_exiting_guest_mode(m, vcpu) != OUTSIDE_GUEST_MODE)
			mask |= 1ull << vcpu_cpu(m, vcpu);
	}
	return mask ? smp_call_function_many(m, cpu, &mask, IPI_ACK_KICK, 0, w->mutant != NO_WAIT) : 0;
}

static void zap(struct world *w, uint32_t cpu, uint64_t start, uint64_t end)
{
	struct machine *m = w->shadow.m;
	uint32_t vm = w->shadow.vm;
	bool any = false;

	if (mmu_write_lock(m, cpu, vm))
		return;
	mmu_invalidate_begin(m, vm);
	mmu_invalidate_range_add(m, vm, start, end);
	for (uint64_t gfn = start; gfn < end; gfn++)
		any |= shadow_zap_gfn(&w->shadow, cpu, gfn);
	if (any)
		flush(w, cpu);
	mmu_write_unlock(m, cpu, vm);
	oracle_revoke(m, cpu, vm, start, end, PROMISE_NOTIFIER, 0);
	mm_unmap(m, cpu, vm, start, end, 1);
	if (mmu_write_lock(m, cpu, vm))
		return;
	mmu_invalidate_end(m, vm);
	mmu_write_unlock(m, cpu, vm);
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
		if (w->mutant != NO_INVLPG)
			zap(w, actor->cpu, start, start + 16);
		cpu_wait_event(actor->m, actor->cpu, cpu_event(actor->m, actor->cpu), 200);
		atomic_fetch_add_explicit(&w->zaps, 1, memory_order_relaxed);
		if (w->mutant != CORRECT && i % 32 == 31 && violations(actor->m))
			break;
	}
	return NULL;
}

static void make_guest(struct world *w, uint32_t cpu, bool vpid)
{
	struct guest_config config = { .first_gfn = cpu * 256, .end_gfn = cpu * 256 + 256, .paging = 1,
				       .pcid = vpid, .switch_every = 3000, .unmap_every = 700,
				       .protect_every = 900, .seed = cpu + 1 };
	struct machine *m = w->shadow.m;
	int vcpu = vcpu_create(m, w->shadow.vm);

	CHECK(vcpu == (int)cpu);
	for (uint64_t i = 0; i < PAGES; i++)
		w->page[cpu][i] = 0x1000 + i * 3;
	for (uint64_t i = 0; i < RECORDS; i++)
		w->records[cpu][i] = (i % 3 == 0 ? 1ull << 62 : 0) |
				     w->page[cpu][i * 2654435761u / 64 % PAGES] << 12 | (i * 8 & 0xff8);
	CHECK(guest_configure(m, (uint32_t)vcpu, &config) == 0);
	for (int i = 0; i < 3; i++)
		CHECK(guest_add_process(m, (uint32_t)vcpu, w->records[cpu], RECORDS, w->page[cpu], PAGES) == 0);
	w->vcpu[cpu].vcpu = (uint32_t)vcpu;
	w->vcpu[cpu].deaf = w->mutant == NO_INVLPG;
	shadow_vcpu_create(&w->shadow, 2, &w->vcpu[cpu], vpid ? cpu + 1 : 0);
}

static uint64_t run(enum mutant mutant, bool vpid, uint32_t rounds, uint32_t chaos)
{
	struct machine_config config = { .pcpus = 2, .housekeeping = 3, .vms = 1, .vcpus = 2,
					 .root_frames = 16, .table_frames = 1024, .guest_frames = 1024,
					 .guest_blocks = 1, .l1_ways = 4, .l2_entries = 1536, .l2_ways = 12,
					 .psc_entries = 32, .chaos = chaos, .seed = 7 };
	struct world *w = calloc(1, sizeof(*w));
	uint64_t values[COUNTERS], all;
	struct actor actors[5];
	char error[200];

	w->shadow.m = machine_create(&config, error, sizeof(error));
	CHECK(w->shadow.m);
	w->mutant = mutant;
	w->shadow.no_retry = mutant == NO_RETRY;
	w->shadow.gfns = GFNS;
	w->shadow.vm = (uint32_t)vm_create(w->shadow.m, GFNS);
	for (uint32_t cpu = 0; cpu < 2; cpu++)
		make_guest(w, cpu, vpid);
	for (uint32_t i = 0; i < 5; i++) {
		actors[i] = (struct actor){ .m = w->shadow.m, .cpu = i, .rounds = rounds, .shared = w };
		actor_start(&actors[i], i < 2 ? run_vcpu : i < 4 ? run_host : harness_rcu);
	}
	actor_join(&actors[2]);
	actor_join(&actors[3]);
	machine_stop(w->shadow.m);
	for (uint32_t i = 0; i < 5; i++)
		if (i != 2 && i != 3)
			actor_join(&actors[i]);
	all = violations(w->shadow.m);
	counters_sum(w->shadow.m, values);
	printf("    %u zaps, %lu accesses, %lu exits for faults, %lu for instructions, %lu violations\n",
	       atomic_load(&w->zaps), (unsigned long)values[COUNT_ACCESSES],
	       (unsigned long)values[COUNT_EXIT_EXCEPTION], (unsigned long)values[COUNT_EXIT_INSTRUCTION],
	       (unsigned long)all);
	CHECK(values[COUNT_ACCESSES] && values[COUNT_EXIT_EXCEPTION] && values[COUNT_EXIT_INSTRUCTION]);
	machine_destroy(w->shadow.m);
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
