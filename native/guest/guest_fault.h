/* Faults of a guest without EPT as KVM sees and answers them: EXIT_EXCEPTION.
 *
 * KVM fixes its tables, and the guest executes the instruction again; or it injects the fault; or, if the instruction
 * is a store, it emulates that.
 */
#ifndef FLUSHLAB_GUEST_FAULT_H
#define FLUSHLAB_GUEST_FAULT_H

#include "core/machine_types.h"

/* api */
/* Called by the vCPU's thread, outside guest mode, after EXIT_EXCEPTION and before the next entry.  The fields are the
 * vCPU's thread's. */

/* Return whether the instruction that faulted is a store of one 64-bit word, at exit.linear; *value is the word.  (The
 * decoder of the emulator: x86_decode_emulated_instruction().) */
/* call: aside; keeps-gil */
int guest_store_value(struct machine *m, uint32_t vcpu, uint64_t *value);
/* KVM has stored the word itself: the guest goes on behind the store (kvm_skip_emulated_instruction()). */
/* call: aside; keeps-gil */
void guest_store_done(struct machine *m, uint32_t vcpu);
/* kvm_inject_page_fault(): at the next entry, the guest's OS handles a #PF. */
/* call: aside; keeps-gil */
void guest_inject_page_fault(struct machine *m, uint32_t vcpu, uint64_t linear, uint32_t error_code);
/* end api */

struct walk;
/* In guest mode: the access that has just faulted is a store of this word. */
void guest_store_faulted(struct walk *w, uint64_t value);

#endif
