/* The machine and its configuration: types that all modules share.
 *
 * A machine owns its CPUs, frames, VMs and counters; nothing is global and nothing is thread-local: the CPU
 * that acts is an argument of every call.  CPUs 0 .. pcpus-1 are physical CPUs (they own a TLB and receive
 * IPIs); CPUs pcpus ..  cpus-1 are housekeeping CPUs: the identity that a thread which is not a pCPU has for
 * RCU, locks and sent calls.  A housekeeping CPU is never the target of a call.
 *
 * Python sees the declarations between "api" and "end api"; they use only types that a plain C declaration
 * parser understands.
 */
#ifndef FLUSHLAB_MACHINE_TYPES_H
#define FLUSHLAB_MACHINE_TYPES_H

#include <stdalign.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#define CACHELINE 64

/* api */
/* Every blocking call returns 0 (or a count) or one of these, negative. */
enum machine_error {
	MACHINE_STOPPED = -108, /* the machine is stopping: unwind */
	MACHINE_OFFLINE = -19,  /* this CPU was taken offline */
	MACHINE_AGAIN = -11,    /* a try form did not succeed */
	MACHINE_NOMEM = -12,    /* no frame of that kind is left */
	MACHINE_MISUSE = -35,   /* waiting where waiting is forbidden; machine_error_text() says where */
};

struct machine_config {
	uint32_t pcpus;
	uint32_t housekeeping;
	uint32_t vms;            /* most VMs that live at once */
	uint32_t vcpus;          /* most vCPUs of all VMs that live at once */
	uint32_t root_frames;    /* 4 KiB frames for EPT root pages */
	uint32_t table_frames;   /* 4 KiB frames for the other EPT pages */
	uint32_t guest_frames;   /* 4 KiB frames that are handed out singly to guests */
	uint32_t guest_blocks;   /* 2 MiB blocks for huge pages */
	uint32_t l1_ways;        /* first-level TLB: 64 entries in l1_ways ways; fixed at 4 */
	uint32_t l2_entries;     /* second-level TLB; 0: unbounded, never evicts */
	uint32_t l2_ways;
	uint32_t psc_entries;    /* paging-structure-cache entries per level; 0: unbounded */
	uint32_t chaos;          /* one in this many points delays its caller; 0: never */
	uint32_t snapshots;      /* machine_snapshot() will be used: all memory comes from one region */
	uint32_t hyperv;         /* not 0: the machine is a guest of Hyper-V, which shadows KVM's EPTs */
	uint64_t seed;
};

struct machine;
/* end api */

struct cpu;
struct frames;
struct heap;
struct rcu;
struct vm;
struct vcpu;
struct vmcs;
struct event_ring;
struct oracle;

/* Most CPUs of all kinds: mmu_lock counts its holders in 15 bits. */
#define MACHINE_CPUS_MAX 16384
/* Most host frames: an SPTE has 24 bits for the frame number. */
#define MACHINE_FRAMES_MAX (1u << 24)

struct machine {
	struct machine_config config;
	_Atomic uint32_t stopping;
	uint32_t cpu_count; /* pcpus + housekeeping */
	struct heap *heap;  /* heap.h; NULL: memory is calloc's */
	uint32_t spin_ns;   /* time that a wait spins before it sleeps; 0 where one core runs everything */
	struct cpu *cpus;
	struct frames *frames;
	_Atomic(_Atomic uint64_t *) *shadowed; /* shadow_mmu.h: by table page, the gfns of its entries */
	struct rcu *rcu;
	struct vm *vms;
	struct vcpu *vcpus;
	struct vmcs *vmcss;
	struct event_ring *rings; /* events.h: one per CPU */
	struct oracle *oracle;
	_Atomic uint64_t signals[64]; /* program.h: MACHINE_SIGNALS */
};

#endif
