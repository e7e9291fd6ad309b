/* Guest programs: for litmus tests, a vCPU can have a list of instructions instead of processes with traces.
 *
 * One operation is one step of the guest.  Page tables are the guest's own, as those of its OS (guest.h): an
 * operation that changes them invalidates nothing, and the oracle calls an old translation stale only once a
 * covering invalidation was executed on this vCPU.
 */
#ifndef FLUSHLAB_PROGRAM_H
#define FLUSHLAB_PROGRAM_H

#include "core/machine_types.h"

/* api */
enum guest_op_kind {
	GUEST_OP_READ,       /* linear: address (guest-physical without paging); flags, also of the next two: GUEST_OP_APIC,
			      * GUEST_OP_FAULTS, GUEST_OP_SUPERVISOR */
	GUEST_OP_WRITE,
	GUEST_OP_EXECUTE,
	GUEST_OP_INVLPG,     /* linear */
	GUEST_OP_INVPCID,    /* flags: type; value: process; linear for type 0 */
	GUEST_OP_MOV_CR3,    /* value: process; flags: GUEST_OP_NOFLUSH */
	GUEST_OP_MAP,        /* linear -> value (gfn); flags: GUEST_OP_READ_ONLY, _GLOBAL, _HUGE, _DIRTY */
	GUEST_OP_UNMAP,      /* linear */
	GUEST_OP_PROTECT,    /* linear loses write access */
	GUEST_OP_STORE,      /* without EPT: the OS stores value to the 8 bytes at guest-physical address linear */
	GUEST_OP_HLT,        /* exit EXIT_HLT */
	GUEST_OP_EXIT,       /* exit EXIT_PROGRAM with `value` in exit.linear */
	GUEST_OP_SIGNAL,     /* add 1 to the machine's signal `value` */
	GUEST_OP_WAIT,       /* in guest mode until signal `linear` is at least `value`; UINT64_MAX: for ever */
	GUEST_OP_VMX,        /* exit EXIT_INSTRUCTION; flags: enum guest_insn | type << 8; value, linear: operands */
	GUEST_OP_EPT12_MAP,  /* linear (a page of L2) -> value (L1's gfn) in L1's EPT flags >> 8; flags: GUEST_OP_READ_ONLY,
			      * GUEST_OP_HUGE */
	GUEST_OP_EPT12_UNMAP, /* flags: GUEST_OP_HUGE: the entry of level 2, and with it the table of 2 MiB */
	GUEST_OP_EPT12_PROTECT, /* the page loses write access */
	GUEST_OP_EPT12_CLEAN,   /* the entry loses its accessed and dirty flags; flags: GUEST_OP_DIRTY: the dirty flag alone */
	GUEST_OPS
};

enum guest_op_flag {
	GUEST_OP_NOFLUSH = 1,
	GUEST_OP_READ_ONLY = 2,
	GUEST_OP_GLOBAL = 4,
	GUEST_OP_HUGE = 8,
	GUEST_OP_DIRTY = 16,
	GUEST_OP_APIC = 32, /* the guest accesses its APIC: EXIT_APIC_ACCESS */
	GUEST_OP_FAULTS = 64, /* without EPT: KVM injects a page fault, and the guest goes on behind the access; an access
			       * that gets its translation is EXIT_TRIPLE_FAULT */
	GUEST_OP_SUPERVISOR = 128, /* without EPT: the guest's kernel accesses the page, not user mode */
};

enum { MACHINE_SIGNALS = 64 };

struct guest_op {
	uint32_t kind;
	uint32_t flags;
	uint64_t linear;
	uint64_t value;
};

/* Copy ops[n], which the vCPU executes from its next entry on until EXIT_PROGRAM_END; it repeats that exit
 * until it is given another program.  Only while the vCPU is outside guest mode.  Pages that are mapped must be
 * among those of its processes (guest_add_process). */
/* call: modelled */
int guest_set_program(struct machine *m, uint32_t vcpu, const struct guest_op *ops, uint32_t n);
/* Return the number of operations completed. */
/* call: aside; keeps-gil */
uint32_t guest_program_position(struct machine *m, uint32_t vcpu);
/* Counters of the machine, for programs and the code around them; any thread. */
/* call: part; writes progress(slot) */
void signal_add(struct machine *m, uint32_t slot, uint64_t n);
/* call: part; reads progress(slot); keeps-gil */
uint64_t signal_get(struct machine *m, uint32_t slot);
/* call: anything */
void signal_reset(struct machine *m);
/* end api */

struct walk;
struct accesses;
struct guest;
/* Return whether the next operation is an access that is to fault, and go on behind it: KVM has injected a page fault. */
bool program_takes_fault(struct guest *g);
/* Do one operation in guest mode.  Returns an exit reason, or EXIT_REASONS: go on. */
uint32_t program_step(struct walk *w, struct accesses *a, uint64_t *budget);
void program_destroy(struct machine *m, struct guest *g);

#endif
