/* VMs and vCPUs: the state that several actors share.  Policy and all other state are Python's.  vms.h makes them. */
#ifndef FLUSHLAB_VM_H
#define FLUSHLAB_VM_H

#include "core/machine_types.h"
#include "vm/mmu_lock.h"
#include "vm/slot.h"
#include "vm/srcu.h"

/* api */
enum vcpu_mode { OUTSIDE_GUEST_MODE, IN_GUEST_MODE, EXITING_GUEST_MODE, READING_SHADOW_PAGE_TABLES };

/* vcpu->mode; stores are release, the load is acquire, all sequentially consistent (vcpu-requests.rst). */
/* call: step mode; reads mode(vcpu); quiet; keeps-gil */
uint32_t vcpu_mode(struct machine *m, uint32_t vcpu);
/* call: step mode; writes mode(vcpu); keeps-gil */
void vcpu_set_mode(struct machine *m, uint32_t vcpu, uint32_t mode);
/* kvm_vcpu_exiting_guest_mode(): IN -> EXITING; returns the old mode. */
/* call: step mode; reads mode(vcpu); writes mode(vcpu) if result == IN_GUEST_MODE; keeps-gil */
uint32_t vcpu_exiting_guest_mode(struct machine *m, uint32_t vcpu);
/* vcpu->requests */
/* call: step requests; writes request(vcpu, request), requests(vcpu); keeps-gil */
void kvm_make_request(struct machine *m, uint32_t vcpu, uint32_t request);
/* call: step requests; reads request(vcpu, request); writes request(vcpu, request), requests(vcpu) if result;
 * quiet; keeps-gil */
int kvm_check_request(struct machine *m, uint32_t vcpu, uint32_t request);
/* call: step requests; reads request(vcpu, request); quiet; keeps-gil */
int kvm_test_request(struct machine *m, uint32_t vcpu, uint32_t request);
/* call: step requests; reads requests(vcpu); keeps-gil */
uint64_t kvm_requests(struct machine *m, uint32_t vcpu);
/* vcpu->cpu: the pCPU on which it is loaded, -1: none. */
/* call: step vcpu->cpu; reads vcpu_cpu(vcpu); keeps-gil */
int vcpu_cpu(struct machine *m, uint32_t vcpu);
/* call: step vcpu->cpu; writes vcpu_cpu(vcpu); keeps-gil */
void vcpu_set_cpu(struct machine *m, uint32_t vcpu, int cpu);
/* Flush reasons of the TLB_FLUSH requests since the last vcpu_take_flush_reasons: a bit per flush_reason. */
/* call: local; keeps-gil */
void vcpu_add_flush_reason(struct machine *m, uint32_t vcpu, uint32_t reason);
/* call: aside; keeps-gil */
uint32_t vcpu_take_flush_reasons(struct machine *m, uint32_t vcpu);

/* Nested guests (L2) that a vCPU's own guest (L1) may have; their numbers begin at 1. */
enum { NESTED_GUESTS = 3 };

/* VM statistics, under KVM's names. */
enum vm_stat {
	STAT_REMOTE_TLB_FLUSH_REQUESTS,
	STAT_REMOTE_TLB_FLUSH,
	STAT_MMU_LOAD,             /* kvm_mmu_load calls */
	STAT_CACHED_ROOTS,         /* kvm_mmu_new_pgd calls that found a root of the PGD and the role */
	STAT_MAKE_ALL_CPUS_REQUEST, /* kvm_make_all_cpus_request calls */
	STAT_TLB_FLUSH,            /* vCPU stat tlb_flush, summed */
	STAT_FLUSH_ALL,            /* vmx_flush_tlb_all calls */
	STAT_FLUSH_CURRENT,        /* vmx_flush_tlb_current calls */
	STAT_FLUSH_GUEST,          /* vmx_flush_tlb_guest calls */
	STAT_FAULTS,               /* page faults fixed */
	STAT_PF_FAST,              /* page faults that needed no mmu_lock: fixed, or spurious */
	STAT_PF_SPURIOUS,          /* page faults whose SPTE allowed the access already */
	STAT_PF_EMULATE,           /* page faults that ended in an emulated access, other than MMIO's */
	STAT_FAULT_RETRIES,        /* RET_PF_RETRY */
	STAT_EXITS,
	STAT_MIGRATIONS,
	STAT_ZAPS,                 /* range zaps */
	STAT_INVALIDATE_RETRIES,   /* of these: an mmu_notifier's invalidation, in progress or since the fault began */
	STAT_SLOT_RETRIES,         /* of these: a memslot that is being deleted or moved */
	STAT_SLOT_WAITS,           /* updates of the memslots that waited for an mmu_notifier's invalidation */
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
	STAT_MMU_SHADOW_ZAPPED,    /* shadow pages taken out of use */
	STAT_MMU_PTE_WRITE,        /* emulated stores of the guest to its tables */
	STAT_MMU_FLOODED,          /* of these: the page was hardly a table any more, and was zapped */
	STAT_MMU_CACHE_MISS,       /* shadow pages made because the hash had none */
	STAT_MMU_RECYCLED,         /* of those taken out of use: the oldest, to make room */
	STAT_MMU_UNSYNC,           /* shadow pages that became unsync */
	STAT_MMU_SYNCED,           /* shadow pages compared with the guest's tables */
	STAT_MMU_PREFETCHED,       /* pages that faults of the shadow MMU looked up to map them with their own */
	STAT_PF_MMIO_SPTE_CREATED, /* MMIO SPTEs made, without EPT */
	STAT_READERS_AWAITED,      /* kicks of a vCPU that read SPTEs without mmu_lock: their sender waits for it */
	STAT_APIC_WITHHELD,        /* faults of a nested guest on the page of L1's APIC, for which it gets no mapping */
	STAT_NESTED_RUN,           /* VM entries that L1 made into nested guests */
	STAT_NESTED_TRANSITION_FLUSHES, /* flushes requested because L1 and L2 changed places */
	STAT_NESTED_INVEPT,        /* emulated INVEPTs of L1 */
	STAT_NESTED_INVVPID,       /* emulated INVVPIDs of L1 */
	STAT_NESTED_ROOTS,         /* shadow pages that became roots for L1's EPTs */
	STAT_NESTED_ROOTS_FREED,   /* roots of L1's EPTs that L1's INVEPT, VMCLEAR, VMPTRLD or VMXOFF freed */
	VM_STATS
};
/* call: local; keeps-gil */
void vm_stat_add(struct machine *m, uint32_t vm, uint32_t stat, uint64_t n);
/* call: aside; keeps-gil */
uint64_t vm_stat(struct machine *m, uint32_t vm, uint32_t stat);
/* Read all statistics of VMs 0 to vms - 1, VM by VM. */
/* call: aside */
void vm_stats_read(struct machine *m, uint32_t vms, uint64_t *values);
/* end api */

struct ledger;
struct guest;
struct mm;

/* Whether a slot for a VM or a vCPU is taken; BUSY: it is being filled or emptied. */
struct vm {
	_Atomic uint32_t live; /* slot_state */
	uint32_t id;
	uint64_t gfns;
	struct mmu_lock mmu_lock;
	struct srcu srcu;
	alignas(CACHELINE) _Atomic uint64_t invalidate_seq;
	_Atomic uint32_t invalidate_in_progress;
	_Atomic uint64_t invalidate_start;
	_Atomic uint64_t invalidate_end;
	alignas(CACHELINE) _Atomic uint64_t stat[VM_STATS];
	struct ledger *ledger;       /* rights by gfn (ledger.h) */
	_Atomic uint64_t promise_clock; /* tickets given out */
	struct mm *mm;               /* user memory behind the memslots (mm.h) */
	_Atomic(_Atomic uint64_t *) tracked; /* by gfn, the pages of which KVM sees the stores (tracking.h) */
};

struct vcpu {
	alignas(CACHELINE) _Atomic uint32_t mode;
	_Atomic uint32_t live; /* slot_state */
	_Atomic uint64_t requests;
	_Atomic int32_t cpu;
	_Atomic uint32_t flush_reasons;
	uint32_t id;
	uint32_t vm;
	uint64_t left_guest_at; /* monotonic ns, for pauses; 0: not runnable meanwhile */
	struct guest *guest;    /* registers and the guest OS (guest_state.h): of L1, or of the L2 that it runs */
	struct guest *guests[1 + NESTED_GUESTS]; /* L1's, and L2's by their numbers; NULL: none */
};

static inline bool vm_is_live(const struct vm *vm)
{
	return slot_is_live(&vm->live);
}

static inline bool vcpu_is_live(const struct vcpu *vcpu)
{
	return slot_is_live(&vcpu->live);
}

/* Return the VM, or NULL with a MACHINE_MISUSE message on `cpu` if there is none of that number. */
struct vm *vm_get(struct machine *m, uint32_t cpu, uint32_t vm);

#endif
