/* Hyper-V below KVM: its hypercalls that flush an EPT of KVM's on all pCPUs (Hypervisor Top-Level Functional
 * Specification, HvCallFlushGuestPhysicalAddressSpace and HvCallFlushGuestPhysicalAddressList).
 *
 * Hyper-V interrupts the pCPUs beneath KVM: a guest that runs there does not exit to KVM, and KVM's interrupt flag does
 * not matter to Hyper-V.  (Here a pCPU with interrupts off is flushed when it enables them or enters a guest.)  When the
 * hypercall returns, all pCPUs have been flushed.
 */
#ifndef FLUSHLAB_HYPERCALL_H
#define FLUSHLAB_HYPERCALL_H

#include "core/machine_types.h"

/* api */
/* Flush the EPT with this root on all pCPUs that are online, for the pages from gfn on; pages 0: for all.  vm and reason
 * are for the accounts only.  Waits; returns 0 or an error. */
/* call: modelled; at call_queue; fence */
int hv_flush_guest_mapping(struct machine *m, uint32_t cpu, uint32_t vm, uint32_t root, uint64_t gfn, uint64_t pages,
			   uint32_t reason);
/* For a scheduler that runs one CPU at a time, in the place of that: record the hypercall; flush one pCPU. */
/* call: anything */
void hv_hypercall(struct machine *m, uint32_t cpu, uint32_t vm, uint32_t root, uint64_t gfn, uint64_t pages);
/* call: anything */
void hv_flush_pcpu(struct machine *m, uint32_t target, uint32_t vm, uint32_t root, uint64_t gfn, uint64_t pages,
		   uint32_t reason);
/* end api */

/* Set the handler of IPI_HV_FLUSH. */
void hypercall_register(void);

#endif
