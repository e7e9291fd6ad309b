/* The guest: registers, 4-level page tables in guest memory, and a small guest OS.
 *
 * The OS runs the processes of one vCPU in turn: each has an address space with its own PCID and a recorded
 * memory trace.  The OS maps on demand, unmaps and remaps pages, removes and restores write access, shares
 * pages between processes, keeps a global kernel mapping, switches address spaces, and invalidates with INVLPG,
 * INVPCID and MOV CR3 as an OS must; KVM sees none of it.  Every table entry that it reads or writes is a
 * guest-physical access through the pCPU's TLB and EPT.
 */
#ifndef FLUSHLAB_GUEST_H
#define FLUSHLAB_GUEST_H

#include "core/machine.h"

/* api */
struct guest_config {
	uint64_t first_gfn;      /* guest-physical memory that this vCPU's OS hands out */
	uint64_t end_gfn;
	uint32_t stride;         /* vCPUs of a VM that share the range page by page (2 MiB block by block) */
	uint32_t phase;          /* this vCPU has every stride-th, from phase on; stride 0: all of it */
	uint64_t mmio_gfn;       /* 0: none; else gfns of a second memslot that the OS maps, too */
	uint64_t mmio_end_gfn;
	uint32_t switch_every;   /* accesses between context switches; 0: never */
	uint32_t unmap_every;    /* accesses between unmapping one page; 0: never */
	uint32_t protect_every;  /* accesses between write-protecting one page; 0: never */
	uint32_t hugepages;      /* map anonymous regions with 2 MiB guest pages where they fit */
	uint32_t pcid;           /* CR4.PCIDE */
	uint32_t paging;         /* 0: CR0.PG = 0, addresses are guest-physical */
	uint32_t halt_every;     /* accesses between HLTs; 0: never */
	uint32_t halt_us;        /* 0: HLT exits (kvm_vcpu_block); else it does not exit, and a timer ends it
				  * after this time */
	uint32_t seed;
};

int guest_configure(struct machine *m, uint32_t vcpu, const struct guest_config *config);
/* Add a process that replays records[n] (as emulator.traces defines them) for ever; pages[] are the sorted
 * distinct page numbers in them.  The caller keeps the arrays, which must outlive the guest. */
int guest_add_process(struct machine *m, uint32_t vcpu, const uint64_t *records, uint64_t n,
		      const uint64_t *pages, uint64_t n_pages);

enum exit_reason {
	EXIT_INTERRUPT,      /* external interrupt: calls were run and acknowledged */
	EXIT_EPT_VIOLATION,  /* gpa, linear, access, present rights */
	EXIT_EPT_MISCONFIG,  /* an SPTE that hardware cannot use */
	EXIT_HLT,
	EXIT_PREEMPTION_TIMER, /* the slice is used up */
	EXIT_MESSAGE,        /* attention other than an IPI: message, resched, stop */
	EXIT_TRIPLE_FAULT,   /* the guest OS cannot go on: out of memory, or its tables are garbage */
	EXIT_INSTRUCTION,    /* guest_insn.h: access is the instruction, linear its operand */
	EXIT_PROGRAM,        /* program.h: GUEST_OP_EXIT, linear its value */
	EXIT_PROGRAM_END,    /* the program has no operation left */
	EXIT_REASONS
};

struct vcpu_exit {
	uint32_t reason;
	uint32_t access;     /* access_type of an EPT violation */
	uint64_t gpa;
	uint64_t linear;
	uint32_t rights;     /* R/W/X of the SPTE met */
	uint32_t attention;  /* attention bits at exit */
	uint64_t accesses;   /* guest accesses done since entry */
};

/* Set EPT_POINTER: the root that this vCPU's VMCS points to. */
void vcpu_set_eptp(struct machine *m, uint32_t vcpu, uint32_t root, uint32_t root_level);

/* Run the guest from VM entry to VM exit.  Before: interrupts off, mode IN_GUEST_MODE, the vCPU loaded on this
 * pCPU.  Runs at most `budget` guest accesses.  At exit: mode OUTSIDE_GUEST_MODE, then interrupts on and queued
 * calls run and acknowledged, in that order.  Returns the exit reason or an error. */
int guest_run(struct machine *m, uint32_t cpu, uint32_t vcpu, uint64_t budget, struct vcpu_exit *out);
/* guest_run() in steps: guest_enter() enters; each guest_step() does one operation of a program, until it
 * returns an exit reason (EXIT_REASONS: go on); guest_leave() exits with that reason. */
int guest_enter(struct machine *m, uint32_t cpu, uint32_t vcpu, uint64_t budget, struct vcpu_exit *out);
int guest_step(struct machine *m, uint32_t cpu);
int guest_leave(struct machine *m, uint32_t cpu, uint32_t reason);
/* Between guest_enter and guest_leave: the processor fetches the translation of a linear address (gpa without
 * paging) for a read that never happens, as it may at any time (SDM vol. 3A, 4.10.2.3), with the
 * paging-structure-cache entries on the way, and sets accessed flags.  If an access would fault, or would meet
 * a frame that it must not use, nothing happens, because the oracle judges uses only.  1: the translation was
 * not cached and is now; 0: not. */
int guest_speculate(struct machine *m, uint32_t cpu, uint64_t linear);
/* Called by the vCPU's thread, outside guest mode, after a reset (INIT) has cleared CR0.PG: the guest OS starts
 * again.  It knows nothing of the former contents of its memory: all of it is free, page tables are built anew,
 * and no earlier translation is valid.  First it sets up CR4 and CR0, which exits.  A program is only taken out
 * of HLT and continues. */
void guest_boot(struct machine *m, uint32_t vcpu);
/* Return the number of guest-physical frames that this vCPU's OS uses now. */
uint64_t guest_frames_used(struct machine *m, uint32_t vcpu);
/* Return the accesses and changes so far, with the vCPU's number above bit GUEST_CLOCK_VCPU.  The guest stores
 * this value, so no two stores of a machine have equal values. */
enum { GUEST_CLOCK_VCPU = 48 };
uint64_t guest_clock(struct machine *m, uint32_t vcpu);
/* Skip the instruction that exited (MMIO emulated by user space). */
void guest_skip(struct machine *m, uint32_t vcpu);
/* Do one guest memory access now, as guest_run would, for tests and litmus programs: linear address (or gpa
 * with paging 0); value stored for writes.  Preconditions and results as for guest_run. */
int guest_access(struct machine *m, uint32_t cpu, uint32_t vcpu, uint64_t linear, uint32_t type,
		 struct vcpu_exit *out);
/* end api */

struct vcpu;
int guest_create(struct machine *m, struct vcpu *vcpu);
void guest_destroy(struct machine *m, struct vcpu *vcpu);

#endif
