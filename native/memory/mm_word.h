/* KVM's own accesses to a guest's memory through user space's addresses, a 64-bit word at a time: the walk of the guest's
 * tables, and the emulation of its stores.  hva in 4 KiB pages.
 *
 * Each is atomic, and finds the page's frame under the lock under which the host takes it away.  The page must be
 * present, and for a write writable: MACHINE_AGAIN otherwise, and the caller faults it in (mm_fault()). */
#ifndef FLUSHLAB_MM_WORD_H
#define FLUSHLAB_MM_WORD_H

#include "core/machine_types.h"

/* api */
/* kvm_read_guest_page(): read a word into *value.  0 or MACHINE_AGAIN. */
/* call: step guest-memory; reads mm(vm), memory(vm) */
int mm_read_word(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t hva, uint32_t word, uint64_t *value);
/* kvm_write_guest_page(): write a word. */
/* call: step guest-memory; reads mm(vm); writes memory(vm), contents(vm) */
int mm_write_word(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t hva, uint32_t word, uint64_t value);
/* __try_cmpxchg_user() (arch/x86/include/asm/uaccess.h): replace *old by `value`.  0; 1 if the word was another,
 * which *old is now. */
/* call: step guest-memory; reads mm(vm); writes memory(vm), contents(vm) */
int mm_cmpxchg_word(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t hva, uint32_t word, uint64_t *old,
		    uint64_t value);
/* end api */

#endif
