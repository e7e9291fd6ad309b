/* Two guests on real threads against two host threads that unmap, free and reuse their pages: shared by the tests with
 * EPT and without.  Each pCPU keeps its own vCPU; KVM is reduced to entry, requests and the mmu_notifier protocol. */
#ifndef FLUSHLAB_TEST_STORM_H
#define FLUSHLAB_TEST_STORM_H

#include "harness.h"

#include "core/counters.h"
#include "core/machine_types.h"
#include "guest/guest.h"
#include "guest/run.h"
#include "machine/machine.h"
#include "machine/vms.h"
#include "memory/mm.h"
#include "oracle/ledger.h"
#include "oracle/oracle.h"
#include "sync/cpu.h"
#include "sync/ipi.h"
#include "sync/smp.h"
#include "vm/guest_state.h"
#include "vm/mmu_invalidate.h"
#include "vm/mmu_lock.h"
#include "vm/vm.h"
#include "walk/hypercall.h"
#include "walk/vmcs.h"

enum { STORM_GFNS = 512, STORM_VCPUS = 2, STORM_HOSTS = 2, STORM_PAGES = 128, STORM_RECORDS = 4096, STORM_FLUSH = 0 };

/* Mistakes of the KVM under test.  NO_INVLPG: without EPT; the host leaves the pages alone. */
enum mutant { CORRECT, NO_FLUSH, NO_WAIT, NO_RETRY, NO_INVLPG };

struct storm;

struct storm_mmu {
	/* KVM_REQ_TLB_FLUSH */
	void (*flush)(struct storm *s, uint32_t vcpu);
	/* Handle a VM exit.  Returns false if the guest uses memory that it does not have. */
	bool (*exit)(struct storm *s, uint32_t vcpu, int reason, const struct vcpu_exit *out);
	/* Zap a range, under mmu_lock for write.  Returns whether a flush is due. */
	bool (*zap)(struct storm *s, uint32_t cpu, uint64_t start, uint64_t end);
};

struct storm {
	const struct storm_mmu *mmu;
	struct machine *m;
	uint32_t vm;
	enum mutant mutant;
	bool hyperv;          /* flush hyperv_root by hypercall; set before storm_create() */
	uint32_t hyperv_root;
	uint32_t vmcs[STORM_VCPUS];
	_Atomic uint32_t zaps;
	_Atomic uint64_t pages; /* that the host has taken away */
	uint64_t records[STORM_VCPUS][STORM_RECORDS];
	uint64_t page[STORM_VCPUS][STORM_PAGES];
};

static inline uint64_t storm_violations(struct machine *m)
{
	uint64_t counts[VIOLATIONS], all = 0;

	oracle_counts(m, counts);
	for (int i = 0; i < VIOLATIONS; i++)
		all += counts[i];
	return all;
}

/* vcpu_enter_guest(): mode, then requests.  vCPU and pCPU have the same number.
 *
 * A guest without memory at its address has read its page tables through a stale translation, from a page that has
 * another owner by now.  That ends the storm: of its violations at least one has been counted. */
static inline void *storm_vcpu(void *argument)
{
	struct actor *actor = argument;
	struct storm *s = actor->shared;
	uint32_t vcpu = actor->cpu;
	struct vcpu_exit out;

	cpu_online(s->m, actor->cpu);
	CHECK(vmptrld(s->m, actor->cpu, s->vmcs[vcpu]) == 0);
	vcpu_set_cpu(s->m, vcpu, (int)actor->cpu);
	while (!machine_stopping(s->m)) {
		int r;

		if (kvm_check_request(s->m, vcpu, STORM_FLUSH))
			s->mmu->flush(s, vcpu);
		local_irq_disable(s->m, actor->cpu, "vcpu_enter_guest");
		vcpu_set_mode(s->m, vcpu, IN_GUEST_MODE);
		if (kvm_requests(s->m, vcpu)) {
			vcpu_set_mode(s->m, vcpu, OUTSIDE_GUEST_MODE);
			local_irq_enable(s->m, actor->cpu);
			continue;
		}
		r = guest_run(s->m, actor->cpu, vcpu, 200000, &out);
		CHECK(r >= 0);
		if (!s->mmu->exit(s, vcpu, r, &out)) {
			CHECK(storm_violations(s->m));
			machine_stop(s->m);
		}
	}
	cpu_offline(s->m, actor->cpu);
	return NULL;
}

/* kvm_flush_remote_tlbs(), by hypercall on Hyper-V */
static inline int storm_flush(struct storm *s, uint32_t cpu)
{
	uint64_t mask = 0;

	if (s->mutant == NO_FLUSH)
		return 0;
	if (s->hyperv)
		return hv_flush_guest_mapping(s->m, cpu, s->vm, s->hyperv_root, 0, 0, REASON_REMOTE_NOTIFIER);
	for (uint32_t vcpu = 0; vcpu < STORM_VCPUS; vcpu++) {
		kvm_make_request(s->m, vcpu, STORM_FLUSH);
		if (vcpu_exiting_guest_mode(s->m, vcpu) != OUTSIDE_GUEST_MODE)
			mask |= 1ull << vcpu_cpu(s->m, vcpu);
	}
	return mask ? smp_call_function_many(s->m, cpu, &mask, IPI_ACK_KICK, 0, s->mutant != NO_WAIT) : 0;
}

static inline void storm_unmap(struct storm *s, uint32_t cpu, uint64_t start, uint64_t end)
{
	if (mmu_write_lock(s->m, cpu, s->vm))
		return;
	mmu_invalidate_begin(s->m, s->vm);
	mmu_invalidate_range_add(s->m, s->vm, start, end);
	if (s->mmu->zap(s, cpu, start, end))
		storm_flush(s, cpu);
	mmu_write_unlock(s->m, cpu, s->vm);
	oracle_revoke(s->m, cpu, s->vm, start, end, PROMISE_NOTIFIER, 0);
	atomic_fetch_add_explicit(&s->pages, mm_unmap(s->m, cpu, s->vm, start, end, 1), memory_order_relaxed);
	if (mmu_write_lock(s->m, cpu, s->vm))
		return;
	mmu_invalidate_end(s->m, s->vm);
	mmu_write_unlock(s->m, cpu, s->vm);
}

static inline void *storm_host(void *argument)
{
	struct actor *actor = argument;
	struct storm *s = actor->shared;
	uint32_t random = actor->cpu * 2654435761u + 1;

	for (uint32_t i = 0; i < actor->rounds && !machine_stopping(s->m); i++) {
		uint64_t start;

		random = random * 1664525 + 1013904223;
		start = (random >> 16) % (STORM_GFNS - 16);
		if (s->mutant != NO_INVLPG)
			storm_unmap(s, actor->cpu, start, start + 16);
		/* Room for the guests to fault pages in again. */
		cpu_wait_event(s->m, actor->cpu, cpu_event(s->m, actor->cpu), 200);
		atomic_fetch_add_explicit(&s->zaps, 1, memory_order_relaxed);
		if (s->mutant != CORRECT && i % 32 == 31 && storm_violations(s->m))
			break;
	}
	return NULL;
}

/* Create a vCPU and its guest's processes, each of which uses `pages` pages. */
static inline void storm_vcpu_create(struct storm *s, uint32_t cpu, uint64_t pages, const struct guest_config *config)
{
	CHECK(pages <= STORM_PAGES);
	CHECK(vcpu_create(s->m, s->vm) == (int)cpu);
	for (uint64_t i = 0; i < pages; i++)
		s->page[cpu][i] = 0x1000 + i * 3;
	for (uint64_t i = 0; i < STORM_RECORDS; i++)
		s->records[cpu][i] = (i % 3 == 0 ? 1ull << 62 : 0) |
				     s->page[cpu][i * 2654435761u / 64 % pages] << 12 | (i * 8 & 0xff8);
	CHECK(guest_configure(s->m, cpu, config) == 0);
	for (int i = 0; i < 3; i++)
		CHECK(guest_add_process(s->m, cpu, s->records[cpu], STORM_RECORDS, s->page[cpu], pages) == 0);
}

/* storm_vcpu_create() with an OS of its own, in half of the VM's memory. */
static inline void storm_guest(struct storm *s, uint32_t cpu, uint64_t pages, bool pcid)
{
	uint64_t half = STORM_GFNS / STORM_VCPUS;
	struct guest_config config = { .first_gfn = cpu * half, .end_gfn = (cpu + 1) * half, .paging = 1,
				       .pcid = pcid, .switch_every = 3000, .unmap_every = 700,
				       .protect_every = 900, .seed = cpu + 1 };

	storm_vcpu_create(s, cpu, pages, &config);
}

static inline void storm_create(struct storm *s, const struct storm_mmu *mmu, enum mutant mutant, uint32_t chaos)
{
	struct machine_config config = { .pcpus = STORM_VCPUS, .housekeeping = STORM_HOSTS + 1, .vms = 1,
					 .vcpus = STORM_VCPUS, .root_frames = 16, .table_frames = 1024,
					 .guest_frames = 1024, .guest_blocks = 1, .l1_ways = 4,
					 .l2_entries = 1536, .l2_ways = 12, .psc_entries = 32,
					 .chaos = chaos, .seed = 7, .hyperv = s->hyperv };
	char error[200] = "";

	s->m = machine_create(&config, error, sizeof(error));
	if (!s->m)
		fprintf(stderr, "%s\n", error);
	CHECK(s->m);
	s->mmu = mmu;
	s->mutant = mutant;
	s->vm = (uint32_t)vm_create(s->m, STORM_GFNS);
}

/* Run the guests until the host is through with its rounds.  Returns the number of violations; `values` are the
 * counters. */
static inline uint64_t storm_run(struct storm *s, uint32_t rounds, uint64_t *values)
{
	enum { HOST = STORM_VCPUS, RCU = HOST + STORM_HOSTS, ACTORS };
	struct actor actors[ACTORS];

	for (uint32_t i = 0; i < ACTORS; i++) {
		actors[i] = (struct actor){ .m = s->m, .cpu = i, .rounds = rounds, .shared = s };
		actor_start(&actors[i], i < HOST ? storm_vcpu : i < RCU ? storm_host : harness_rcu);
	}
	for (uint32_t i = HOST; i < RCU; i++)
		actor_join(&actors[i]);
	machine_stop(s->m);
	for (uint32_t i = 0; i < ACTORS; i++)
		if (i < HOST || i >= RCU)
			actor_join(&actors[i]);
	counters_sum(s->m, values);
	CHECK(values[COUNT_ACCESSES]);
	return storm_violations(s->m);
}

#endif
