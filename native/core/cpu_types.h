/* The state of a CPU, of which each module uses its part. */
#ifndef FLUSHLAB_CPU_TYPES_H
#define FLUSHLAB_CPU_TYPES_H

#include "core/machine_types.h"

struct flush_account;
struct counters;
struct csd;
struct run;
struct rcu_head;
struct rcu_chunk;
struct tlb;
struct vmcs;

/* The place of a CPU in the queue of the one mmu_lock that it waits for (mmu_lock.c). */
struct lock_waiter {
	struct lock_waiter *next;
	uint32_t cpu;
	bool write;
	bool queued; /* under the queue's lock: not granted yet */
	_Atomic uint32_t granted;
};

/* The operands of a hypercall that flushes an EPT (hypercall.h). */
struct hv_flush {
	uint32_t vm;
	uint32_t root;
	uint64_t gfn;
	uint64_t pages;
	uint32_t reason;
};

struct cpu {
	/* written by any thread; on one line, so that queueing a call and kicking cost one transfer */
	alignas(CACHELINE) _Atomic uint32_t attention;
	_Atomic uint32_t event;
	_Atomic uint32_t power;
	_Atomic(struct csd *) call_queue;
	/* written by the owner; the RCU thread reads it with a read-modify-write (rcu.c) */
	alignas(CACHELINE) _Atomic uint64_t rcu_snapshot; /* 0: quiescent; else the grace period at lock */
	/* accessed only by the owner (or the thread that holds the CPU SERVICED) */
	alignas(CACHELINE) uint32_t id;
	uint32_t rcu_depth;
	uint32_t locks_held; /* mmu_locks held: no synchronize_* while not 0 */
	uint32_t irqs_off;
	uint32_t in_call; /* runs an IPI function, which may neither wait nor send */
	uint32_t guest_vm; /* VM of the guest that runs here or ran here last */
	bool concerned;    /* a call since then concerned that VM */
	bool kicked;       /* a call since then was other than IPI_VMCS_CLEAR */
	bool interrupted;  /* that guest was left because of an IPI */
	struct run *stepped; /* guest mode step by step, between guest_enter() and guest_leave() */
	uint64_t stepped_budget;
	bool calls_held;   /* ipi_hold(): set while no other thread runs */
	struct counters *counters;
	struct tlb *tlb; /* NULL on a housekeeping CPU */
	struct vmcs *vmcs; /* the last VMPTRLD's (vmcs.h); NULL: none */
	_Atomic uint64_t chaos_state; /* relaxed: two threads may act for a CPU at its power changes */
	struct flush_account *flush_account; /* flush.c */
	char irqs_off_where[48];
	struct csd *csds;     /* one node per target, allocated at the first call sent */
	uint64_t *calls_sent; /* scratch masks of the call being sent: the CPUs called, and */
	uint64_t *calls_kick; /* the CPUs that must be serviced or interrupted for it */
	struct rcu_head *rcu_free; /* callback nodes at hand */
	struct rcu_chunk *rcu_chunks;
	_Atomic(struct rcu_head *) rcu_returned; /* callback nodes that the RCU thread gave back */
	struct lock_waiter lock_waiter;
	struct hv_flush hv_flush; /* of this CPU's hypercall: its targets read it until they have acknowledged */
	char error[160];
};

static inline bool cpu_is_target(const struct machine *m, uint32_t cpu)
{
	return cpu < m->config.pcpus;
}

static inline void cpu_relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
	__builtin_ia32_pause();
#endif
}

#endif
