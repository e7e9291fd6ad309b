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
/* end api */

struct walk;
struct guest_op;
/* In guest mode: execute an operation GUEST_OP_VMX, of L1 or (VMCALL) of a nested guest, with which the vCPU exits. */
void vmx_execute(struct walk *w, const struct guest_op *op);

#endif
