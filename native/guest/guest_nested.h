/* Nested guests: a vCPU's own guest (L1) is a hypervisor, and its guests (L2) run on the same vCPU.
 *
 * A nested guest has registers, page tables and an OS of its own.  It executes the operations of L1's program that lie
 * between VMLAUNCH and the VM exit: one list holds the vCPU's instructions in the order in which they are executed.
 *
 * VMX instructions exit, and KVM emulates them.  Recorded here is only what the architecture promises to L1: which
 * mappings an instruction invalidates.  So the oracle does not depend on the emulation.
 */
#ifndef FLUSHLAB_GUEST_NESTED_H
#define FLUSHLAB_GUEST_NESTED_H

#include "core/machine_types.h"
#include "walk/walk.h"

/* api */
/* Create nested guest `number`, from 1 to NESTED_GUESTS, without tables.  Every function that takes a vCPU concerns the
 * guest that vcpu_set_guest_mode() has chosen: guest_configure() and guest_add_process() set up a nested guest while it
 * is chosen.  Before L1's first program. */
/* call: aside */
int guest_create_nested(struct machine *m, uint32_t vcpu, uint32_t number);
/* enter_guest_mode() and leave_guest_mode(): choose the guest of the next VM entry, a nested one or (0) L1.  Called by
 * the vCPU's thread, outside guest mode. */
/* call: aside */
void vcpu_set_guest_mode(struct machine *m, uint32_t vcpu, uint32_t number);
/* Return the number of the guest that is chosen. */
/* call: aside; keeps-gil */
uint32_t vcpu_guest_mode(struct machine *m, uint32_t vcpu);
/* Record that the nested guest exits to L1 for an EPT violation at this guest-physical address of the nested guest's;
 * L1 handles it at the next VM entry (guest_ept12.h).  mapped: L1's EPT maps the page, and forbids the access; such a
 * violation invalidates the page's mappings (SDM vol. 3C, 29.4.3.1).  The vCPU's thread calls it outside guest mode,
 * before vcpu_set_guest_mode() leaves the nested guest. */
/* call: aside */
void vcpu_nested_ept_violation(struct machine *m, uint32_t vcpu, uint64_t gpa, int mapped);
/* Return whether L1 is about to handle such an exit, instead of the next operation of the program. */
/* call: aside; keeps-gil */
int vcpu_handles_violation(struct machine *m, uint32_t vcpu);
/* end api */

struct guest_op;
/* Make the tables that the operands of an operation GUEST_OP_VMX need, in guest mode. */
enum walk_result vmx_prepare(struct walk *w, const struct guest_op *op);
/* In guest mode: record what the VM exit of the running nested guest to L1 invalidates. */
void vmexit_executed(struct walk *w);
/* In guest mode: execute an operation GUEST_OP_VMX, of L1 or (VMCALL) of a nested guest, with which the vCPU exits. */
void vmx_execute(struct walk *w, const struct guest_op *op);

#endif
