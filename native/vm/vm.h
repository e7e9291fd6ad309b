/* VMs and vCPUs: the state that several actors share.  Policy and all other state are Python's. */
#ifndef FLUSHLAB_VM_H
#define FLUSHLAB_VM_H

#include "sync/cpu.h"
#include "sync/mmu_lock.h"
#include "sync/rcu.h"

/* api */
enum vcpu_mode { OUTSIDE_GUEST_MODE, IN_GUEST_MODE, EXITING_GUEST_MODE, READING_SHADOW_PAGE_TABLES };

/* Create a VM with guest-physical memory of gfns 0 .. gfns-1.  Returns the VM's number or an error. */
int vm_create(struct machine *m, uint64_t gfns);
void vm_destroy(struct machine *m, uint32_t vm);
/* Create a vCPU of a VM; its number is machine-wide.  It owns the VPID until it is destroyed. */
int vcpu_create(struct machine *m, uint32_t vm, uint32_t vpid);
void vcpu_destroy(struct machine *m, uint32_t vcpu);

/* vcpu->mode; stores are release, the load is acquire, all sequentially consistent (vcpu-requests.rst). */
uint32_t vcpu_mode(struct machine *m, uint32_t vcpu);
void vcpu_set_mode(struct machine *m, uint32_t vcpu, uint32_t mode);
/* kvm_vcpu_exiting_guest_mode(): IN -> EXITING; returns the old mode. */
uint32_t vcpu_exiting_guest_mode(struct machine *m, uint32_t vcpu);
/* vcpu->requests */
void kvm_make_request(struct machine *m, uint32_t vcpu, uint32_t request);
int kvm_check_request(struct machine *m, uint32_t vcpu, uint32_t request);
int kvm_test_request(struct machine *m, uint32_t vcpu, uint32_t request);
uint64_t kvm_requests(struct machine *m, uint32_t vcpu);
/* vcpu->cpu: the pCPU on which it is loaded, -1: none. */
int vcpu_cpu(struct machine *m, uint32_t vcpu);
void vcpu_set_cpu(struct machine *m, uint32_t vcpu, int cpu);
/* Flush reasons of the TLB_FLUSH requests since the last vcpu_take_flush_reasons: a bit per flush_reason. */
void vcpu_add_flush_reason(struct machine *m, uint32_t vcpu, uint32_t reason);
uint32_t vcpu_take_flush_reasons(struct machine *m, uint32_t vcpu);

/* mmu_invalidate_seq, mmu_invalidate_in_progress and the merged range of a VM.  begin and end under
 * mmu_lock held for write; the reads pair with them (acquire/release). */
void mmu_invalidate_begin(struct machine *m, uint32_t vm);
void mmu_invalidate_range_add(struct machine *m, uint32_t vm, uint64_t start, uint64_t end);
/* After mmu_invalidate_begin, before its first range: 1 if an earlier invalidation is in progress and the merged range
 * reaches into [start, end). */
int mmu_invalidate_overlaps(struct machine *m, uint32_t vm, uint64_t start, uint64_t end);
void mmu_invalidate_end(struct machine *m, uint32_t vm);
uint64_t mmu_invalidate_seq(struct machine *m, uint32_t vm);
/* mmu_invalidate_retry_gfn(): 1 if a fault that sampled `seq` must retry. */
int mmu_invalidate_retry_gfn(struct machine *m, uint32_t vm, uint64_t seq, uint64_t gfn);
/* mmu_invalidate_retry_gfn() for gfns [start, end): 1 if one of them may have to retry. */
int mmu_invalidate_retry_range(struct machine *m, uint32_t vm, uint64_t seq, uint64_t start, uint64_t end);

/* VM statistics, under KVM's names. */
enum vm_stat {
	STAT_REMOTE_TLB_FLUSH_REQUESTS,
	STAT_REMOTE_TLB_FLUSH,
	STAT_MMU_LOAD,             /* kvm_mmu_load calls */
	STAT_MAKE_ALL_CPUS_REQUEST, /* kvm_make_all_cpus_request calls */
	STAT_TLB_FLUSH,            /* vCPU stat tlb_flush, summed */
	STAT_FLUSH_ALL,            /* vmx_flush_tlb_all calls */
	STAT_FLUSH_CURRENT,        /* vmx_flush_tlb_current calls */
	STAT_FLUSH_GUEST,          /* vmx_flush_tlb_guest calls */
	STAT_FAULTS,               /* page faults fixed */
	STAT_FAULT_RETRIES,        /* RET_PF_RETRY */
	STAT_EXITS,
	STAT_MIGRATIONS,
	STAT_ZAPS,                 /* range zaps */
	STAT_INVALIDATE_RETRIES,   /* of these: an mmu_notifier's invalidation, in progress or since the fault began */
	STAT_SLOT_RETRIES,         /* of these: a memslot that is being deleted or moved */
	STAT_FROZEN_RETRIES,       /* of these: an SPTE that another CPU has frozen */
	STAT_YIELDS,               /* tdp_mmu_iter_cond_resched that yielded */
	STAT_YIELDS_PENDING,       /* of these: SPTEs had been zapped and were not flushed yet */
	STAT_YIELDS_INVALIDATED,   /* of these: during the yield, the root that was walked became invalid */
	STAT_FLUSHES_ELIDED,       /* flush decisions answered with no flush */
	STAT_ROOTS_ALLOCATED,
	STAT_SMIS,                 /* enter_smm */
	STAT_RESETS,               /* kvm_vcpu_reset of a vCPU that ran */
	STAT_OVERLAPS,             /* invalidations that began while one of their pages was being invalidated */
	STAT_DIRTY_COMPARED,       /* pages that were written while they were logged, and compared with their copies */
	VM_STATS
};
void vm_stat_add(struct machine *m, uint32_t vm, uint32_t stat, uint64_t n);
uint64_t vm_stat(struct machine *m, uint32_t vm, uint32_t stat);
/* Read all statistics of VMs 0 to vms - 1, VM by VM. */
void vm_stats_read(struct machine *m, uint32_t vms, uint64_t *values);
/* end api */

struct ledger;
struct guest;
struct mm;

struct vm {
	_Atomic uint32_t live;
	uint32_t id;
	uint64_t gfns;
	struct mmu_lock mmu_lock;
	struct srcu srcu;
	alignas(CACHELINE) _Atomic uint64_t invalidate_seq;
	_Atomic uint32_t invalidate_in_progress;
	_Atomic uint64_t invalidate_start;
	_Atomic uint64_t invalidate_end;
	alignas(CACHELINE) _Atomic uint64_t stat[VM_STATS];
	struct ledger *ledger;       /* rights by gfn (oracle.h) */
	_Atomic uint64_t promise_clock; /* tickets given out */
	struct mm *mm;               /* user memory behind the memslots (mm.h) */
};

struct vcpu {
	alignas(CACHELINE) _Atomic uint32_t mode;
	_Atomic uint32_t live;
	_Atomic uint64_t requests;
	_Atomic int32_t cpu;
	_Atomic uint32_t flush_reasons;
	uint32_t id;
	uint32_t vm;
	uint32_t vpid;
	uint64_t left_guest_at; /* monotonic ns, for pauses; 0: not runnable meanwhile */
	struct guest *guest;    /* registers and the guest OS (guest.h) */
};

/* Return the VM, or NULL with a MACHINE_MISUSE message on `cpu` if there is none of that number. */
struct vm *vm_get(struct machine *m, uint32_t cpu, uint32_t vm);

int vms_create(struct machine *m);
void vms_destroy(struct machine *m);

#endif
