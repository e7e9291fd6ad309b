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

#include "core/machine_types.h"
#include "vm/guest_state.h"

/* api */
/* call: aside */
int guest_configure(struct machine *m, uint32_t vcpu, const struct guest_config *config);
/* Add a process that replays records[n] (as emulator.traces defines them) for ever; pages[] are the sorted
 * distinct page numbers in them.  The caller keeps the arrays, which must outlive the guest. */
/* call: aside */
int guest_add_process(struct machine *m, uint32_t vcpu, const uint64_t *records, uint64_t n,
		      const uint64_t *pages, uint64_t n_pages);
/* Let the vCPU's last process translate by a PML4 table that is in guest memory already, and that several vCPUs may share,
 * as threads of a process do.  The OS neither knows nor changes its pages; MOV to CR3 is left to
 * guest_execute().  Before the vCPU runs. */
/* call: aside */
void guest_share_tables(struct machine *m, uint32_t vcpu, uint64_t cr3_gfn);

/* Let the vCPU run threads of another vCPU's processes, which replay the same records.  Both then run one OS, which
 * has the memory, tables and pages of the other vCPU, and may change them on either; without EPT only.  Call it after
 * both have got all their processes, and before they run.  Neither may get an INIT. */
/* call: aside */
void guest_run_threads(struct machine *m, uint32_t vcpu, uint32_t of);

/* Let the vCPU's processes translate by the tables of another vCPU's processes of the same numbers, which both may change
 * from here on; its OS records their pages as that vCPU's does now.  Return the CR3 of the current process.  While neither
 * vCPU runs, after both have booted. */
/* call: aside */
uint64_t guest_join_tables(struct machine *m, uint32_t vcpu, uint32_t other);
/* KVM_SET_SREGS with another CR3: from the next entry on the guest runs this process.  Returns its CR3; 0: it has no tables.
 * Called by the vCPU's thread, outside guest mode. */
/* call: aside */
uint64_t guest_set_process(struct machine *m, uint32_t vcpu, uint32_t process);

/* Return the number of guest-physical frames that this vCPU's OS uses now. */
/* call: anything */
uint64_t guest_frames_used(struct machine *m, uint32_t vcpu);
/* Return the accesses and changes so far, with the vCPU's number above bit GUEST_CLOCK_VCPU.  The guest stores
 * this value, so no two stores of a machine have equal values. */
enum { GUEST_CLOCK_VCPU = 48 };
/* call: aside */
uint64_t guest_clock(struct machine *m, uint32_t vcpu);
/* Skip the instruction that exited (MMIO emulated by user space). */
/* call: aside; keeps-gil */
void guest_skip(struct machine *m, uint32_t vcpu);
/* end api */

static inline struct guest_process *guest_current(struct guest *g)
{
	return &g->process[g->current];
}

/* Return the next number of the guest's random sequence. */
uint64_t guest_random(struct guest *g);
/* Return the clock of the next event of the guest's OS. */
uint64_t os_next_event(const struct guest *g);
/* Write the current process's PML4 table and PCID to CR3. */
void guest_write_cr3(struct guest *g);
/* Set when an event is due next. */
void os_schedule(struct guest *g, enum guest_event event);

/* Return a guest of a vCPU, with nothing set up, or NULL. */
struct guest *guest_new(struct machine *m, const struct vcpu *vcpu);
int guest_create(struct machine *m, struct vcpu *vcpu);
void guest_destroy(struct machine *m, struct vcpu *vcpu);

#endif
