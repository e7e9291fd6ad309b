/* Counters: one block per CPU, written by its owner alone, summed by any reader.
 *
 * A counter is a relaxed atomic that only the owner stores to (load, add, store: no locked instruction), so a
 * reader sees each value whole but never stops a pCPU.  Histograms have one bucket per power of two of
 * nanoseconds.  No value ever decreases.
 */
#ifndef FLUSHLAB_COUNTERS_H
#define FLUSHLAB_COUNTERS_H

#include "core/machine_types.h"

/* api */
enum counter {
	COUNT_ACCESSES,          /* guest accesses completed */
	COUNT_POLLS,             /* interrupt polls in guest mode */
	COUNT_LOOKUPS,           /* TLB lookups for guest accesses */
	COUNT_CHECKS,            /* custody checks for guest accesses */
	COUNT_L1_MISSES,         /* of COUNT_LOOKUPS: not in the first-level TLB */
	COUNT_L2_MISSES,         /* not in the second-level TLB either: a walk */
	COUNT_GPA_LOOKUPS,       /* guest-physical lookups of two-dimensional walks, and lookups of the guest's OS */
	COUNT_GPA_MISSES,
	COUNT_WALK_REFERENCES,   /* table entries read by hardware walks, both dimensions */
	COUNT_WALK_UPDATES,      /* SPTEs in which hardware walks set A or D */
	COUNT_REFILLS,           /* misses that match a ghost: refills caused by a flush */
	COUNT_AVERTED,           /* of those, ghosts that would have been a violation if used */
	COUNT_LEGAL_STALE,       /* stale translations used before their revocation completed */
	COUNT_ORACLE_SLOW,       /* custody checks that needed the slow path */
	COUNT_SHADOW_EPT_FILLS,  /* on Hyper-V, of COUNT_REFILLS: after a flush for which Hyper-V drops its shadow of an EPT */
	COUNT_SPECULATIVE,       /* translations filled without an access (guest_speculate) */
	COUNT_CSD_QUEUED,        /* calls queued by this CPU */
	COUNT_IPIS_SENT,         /* of those, first in the target's queue: an interrupt */
	COUNT_IPIS_RECEIVED,     /* queues drained on this CPU that an interrupt announced */
	COUNT_CALLS_RUN,         /* calls run on this CPU */
	COUNT_CALLS_SERVICED,    /* of those, run by their sender while this CPU was halted */
	COUNT_HYPERCALLS,        /* hypercalls that flush an EPT */
	COUNT_HYPERCALL_FLUSHES, /* pCPUs that Hyper-V flushed for them */
	COUNT_INTERRUPTIONS,     /* guest mode left because of an IPI */
	COUNT_BYSTANDER,         /* of those, interruptions in which no call concerned the interrupted guest's VM */
	COUNT_IPIS_VMCLEAR,      /* of COUNT_IPIS_SENT: for a VMCLEAR, which every migration needs */
	COUNT_INTERRUPTIONS_VMCLEAR, /* of COUNT_INTERRUPTIONS: caused by such IPIs alone */
	COUNT_NECESSARY_INTERRUPTIONS, /* flushes that an interruption led to and that averted a use */
	COUNT_VM_ENTRIES,
	COUNT_LEVEL1_ENTRIES,    /* of those, into the vCPU's own guest */
	COUNT_LEVEL2_ENTRIES,    /* of those, into a nested guest */
	COUNT_LEVEL1_FLUSHES,    /* flush instructions, unless the vCPU of this CPU's current VMCS is in a nested guest */
	COUNT_LEVEL2_FLUSHES,    /* the others */
	COUNT_NO_VPID_EXITS,     /* VM exits without a VPID: each drops linear and combined mappings, as the entry does */
	COUNT_RCU_CALLBACKS,     /* queued */
	COUNT_RCU_INVOKED,
	COUNT_GRACE_PERIODS,
	COUNT_FRAMES_FREED,      /* guest frames freed */
	COUNT_TABLES_FREED,      /* EPT pages freed */
	COUNT_PFNS_SET,          /* guest frames that KVM marked dirty or accessed as it zapped their SPTEs */
	COUNT_SPTES_ZAPPED,      /* present leaf SPTEs removed, in 4 KiB pages */
	COUNT_SPTES_MAPPED,      /* leaf SPTEs installed, in 4 KiB pages */
	COUNT_COLLATERAL,        /* live TLB entries of other contexts that a flush removed */
	COUNT_WAIT_NANOSECONDS,  /* in waits of any kind */
	COUNT_GUEST_FAULTS,      /* #PF served by the guest OS */
	COUNT_GUEST_INVALIDATIONS, /* INVLPG, INVPCID, MOV CR3 with flush by the guest */
	COUNT_GUEST_SWITCHES,    /* MOV CR3 */
	COUNT_GUEST_ROLE_WINDOWS, /* pairs of MOV to CR0 or CR4 that change a role and change it back (without EPT) */
	COUNT_STALE_WALKS,       /* walks that a cached pointer led into a table that was unlinked but not yet
				  * free */
	COUNT_CALLS_CROSSED,     /* of COUNT_CALLS_RUN: this CPU had sent a call to the sender, which had yet to
				  * run it */
	COUNT_APIC_ALIASES,      /* accesses to an APIC-access page that this CPU had also cached as memory */
	COUNT_DEAD_ROOT_ENTRIES, /* translations of earlier owners of a root page, found when it was loaded */
	COUNT_EXIT_INTERRUPT,    /* VM exits by reason, in the order of exit_reason (guest_state.h) */
	COUNT_EXIT_EPT_VIOLATION,
	COUNT_EXIT_EPT_MISCONFIG,
	COUNT_EXIT_HLT,
	COUNT_EXIT_PREEMPTION_TIMER,
	COUNT_EXIT_MESSAGE,
	COUNT_EXIT_TRIPLE_FAULT,
	COUNT_EXIT_INSTRUCTION,
	COUNT_EXIT_PROGRAM,
	COUNT_EXIT_PROGRAM_END,
	COUNT_EXIT_EXCEPTION,
	COUNT_EXIT_APIC_ACCESS,
	COUNTERS
};

enum histogram {
	HISTOGRAM_IPI_WAIT,     /* a waiting sender, from the first call queued to the last acknowledgement */
	HISTOGRAM_VCPU_PAUSE,   /* a runnable vCPU, from leaving guest mode to entering it again */
	HISTOGRAM_GRACE_PERIOD,
	HISTOGRAM_REMOTE_FLUSH, /* kvm_flush_remote_tlbs, whole */
	HISTOGRAM_LOCK_WAIT,    /* mmu_lock */
	HISTOGRAMS
};

/* Upper bounds are 2^i nanoseconds; the last bucket takes all larger values. */
enum { HISTOGRAM_BUCKETS = 36 };

/* The entries that a flush drops, by the SDM's name for its scope. */
enum flush_scope {
	SCOPE_INVEPT_GLOBAL,
	SCOPE_INVEPT_SINGLE,
	SCOPE_INVVPID_SINGLE,
	SCOPE_INVVPID_ALL,
	SCOPE_INVVPID_ADDRESS,
	SCOPE_HV_SPACE,         /* HvCallFlushGuestPhysicalAddressSpace, on each pCPU */
	SCOPE_HV_LIST,          /* HvCallFlushGuestPhysicalAddressList, on each pCPU */
	SCOPES
};

/* KVM's reasons to flush.  At most 16, because a flush's number has four bits for the reason. */
enum flush_reason {
	REASON_REMOTE_ZAP,      /* KVM_REQ_TLB_FLUSH after SPTEs were removed */
	REASON_REMOTE_NOTIFIER, /* KVM_REQ_TLB_FLUSH by an mmu_notifier */
	REASON_REMOTE_PROTECT,  /* KVM_REQ_TLB_FLUSH after write access was removed (dirty log) */
	REASON_REMOTE_REPLACE,  /* KVM_REQ_TLB_FLUSH after a huge leaf replaced a table */
	REASON_REMOTE_RECOVER,  /* KVM_REQ_TLB_FLUSH after huge pages were recovered */
	REASON_MIGRATION,       /* the VMCS was loaded on another pCPU */
	REASON_ROOT_LOAD,       /* kvm_mmu_load */
	REASON_GUEST,           /* KVM_REQ_TLB_FLUSH_GUEST */
	REASON_RESET,           /* vCPU creation and reset */
	REASON_ROOT_ALLOC,      /* a page became a root (INVEPT by IPI) */
	REASON_PCPU_MASK,       /* the VM runs on this pCPU for the first time */
	REASON_ROOT_PUT,        /* the last reference to a root was put */
	REASON_CACHED_ROOT,     /* a previous root became current */
	REASON_OTHER,
	REASONS
};

/* Sum all CPUs' counters into values[COUNTERS]. */
/* call: aside */
void counters_sum(struct machine *m, uint64_t *values);
/* Return the sum of one counter. */
/* call: anything */
uint64_t counter_sum(struct machine *m, uint32_t counter);
/* Read one CPU's values[COUNTERS]. */
/* call: aside */
void counters_read(struct machine *m, uint32_t cpu, uint64_t *values);
/* Sum a histogram into buckets[HISTOGRAM_BUCKETS], and its nanoseconds into sum. */
/* call: anything */
void histogram_sum(struct machine *m, uint32_t histogram, uint64_t *buckets, uint64_t *sum);
/* Sum flushes[vms * SCOPES * REASONS] and, in that shape, the flushes that averted a use (necessary). */
/* call: anything */
void flushes_sum(struct machine *m, uint64_t *flushes, uint64_t *necessary);
/* call: anything; keeps-gil */
void counter_add(struct machine *m, uint32_t cpu, uint32_t counter, uint64_t n);
/* call: local; keeps-gil */
void histogram_record(struct machine *m, uint32_t cpu, uint32_t histogram, uint64_t nanoseconds);
/* end api */

struct counters {
	_Atomic uint64_t value[COUNTERS];
	_Atomic uint64_t bucket[HISTOGRAMS][HISTOGRAM_BUCKETS];
	_Atomic uint64_t nanoseconds[HISTOGRAMS];
	_Atomic uint64_t *flushes;   /* [vm][SCOPES][REASONS] */
	_Atomic uint64_t *necessary; /* as flushes */
	/* [vm]: whether any of its flushes are counted here.  A pCPU runs few VMs, so of thousands times
	 * thousands of rows nearly all are zero, and sums leave those out. */
	_Atomic uint8_t *flushed;
};

struct counters *counters_create(const struct machine *m);
void counters_destroy(const struct machine *m, struct counters *c);

static inline void count(struct counters *c, uint32_t which, uint64_t n)
{
	uint64_t v = atomic_load_explicit(&c->value[which], memory_order_relaxed);
	atomic_store_explicit(&c->value[which], v + n, memory_order_relaxed);
}

uint64_t monotonic_ns(void);

#endif
