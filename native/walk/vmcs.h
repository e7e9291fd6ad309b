/* Virtual-machine control structures (SDM vol. 3C, chapter 25).
 *
 * A VMCS is a vCPU's; a vCPU may have several.  It holds the VPID and EPT_POINTER, with which the hardware tags
 * and walks, and which its guest never sees.  VMPTRLD makes it active and current on a pCPU, and guest mode runs
 * there with the current VMCS; VMCLEAR makes it inactive.
 *
 * A VMCS is active on one pCPU at most: VMCLEAR must have run there before another pCPU loads it and before it is
 * destroyed, or its memory would be written back later (SDM vol. 3C, 25.11.1).  KVM sees to that; where it does
 * not, the call is MACHINE_MISUSE.  An offline pCPU runs no call, VMCLEAR included, so a VMCS that is active there
 * may be loaded elsewhere, and is not current there any more.
 *
 * The fields are the vCPU's thread's.  It hands them over to another pCPU with VMCLEAR and its acknowledgement, so
 * no call here but the load of a root concerns another thread's later step; VMCLEAR of one VMCS and VMPTRLD of
 * another on one pCPU commute.
 */
#ifndef FLUSHLAB_VMCS_H
#define FLUSHLAB_VMCS_H

#include "core/machine_types.h"

/* api */
/* Create a VMCS of a vCPU, clear and without EPT_POINTER; its number is machine-wide.  VIRTUAL_PROCESSOR_ID stays
 * what it is until vmcs_write_vpid().  VPID 0: "enable VPID" is 0, so VM entry and VM exit drop the mappings tagged
 * with VPID 0.  Returns the number or an error. */
/* call: aside */
int vmcs_create(struct machine *m, uint32_t vcpu, uint32_t vpid);
/* VMWRITE of VIRTUAL_PROCESSOR_ID and "enable VPID", as vmcs_create() sets them.  Outside guest mode. */
/* call: aside */
void vmcs_write_vpid(struct machine *m, uint32_t vmcs, uint32_t vpid);
/* VMWRITE of "enable EPT", which is set in a new VMCS.  Without it the guest's linear addresses are translated by the
 * tables of GUEST_CR3, in one dimension, and cached as linear mappings.  Before the first VM entry. */
/* call: aside */
void vmcs_enable_ept(struct machine *m, uint32_t vmcs, int on);
/* Destroy a VMCS, before its vCPU.  0, or MACHINE_MISUSE while it is active on a pCPU. */
/* call: aside */
int vmcs_destroy(struct machine *m, uint32_t cpu, uint32_t vmcs);
/* VMWRITE of EPT_POINTER: a root page, and the level of its entries. */
/* call: part; reads root_loaded(vmcs, root); keeps-gil */
void vmcs_write_eptp(struct machine *m, uint32_t vmcs, uint32_t root, uint32_t root_level);
/* Do vmcs_write_eptp() for a root that shadows an EPT of L1's.  The walker takes the gfns of leafs from the arrays that
 * the shadow MMU keeps beside its tables (kvm_mmu_page_get_gfn()). */
/* call: part; reads root_loaded(vmcs, root); keeps-gil */
void vmcs_write_nested_eptp(struct machine *m, uint32_t vmcs, uint32_t root, uint32_t root_level);
/* VMWRITE of GUEST_CR3, without EPT: a root page of 4 levels, and the PCID (0 with CR4.PCIDE = 0). */
/* call: part; reads root_loaded(vmcs, root); keeps-gil */
void vmcs_write_guest_cr3(struct machine *m, uint32_t vmcs, uint32_t root, uint32_t pcid);
/* Do VMWRITE of APIC_ACCESS_ADDR, a frame, and of "virtualize APIC accesses", which frame 0 clears; outside guest mode.
 * Guests that replay traces never access the page, only guest programs do. */
/* call: aside */
void vmcs_write_apic_page(struct machine *m, uint32_t vmcs, uint32_t hfn);
/* VMPTRLD on this pCPU: the VMCS is active and current here.  0, or MACHINE_MISUSE while it is active on
 * another pCPU. */
/* call: aside; keeps-gil */
int vmptrld(struct machine *m, uint32_t cpu, uint32_t vmcs);
/* VMPTRST: return the number of the current VMCS of a pCPU; -1: it has none. */
/* call: aside; keeps-gil */
int vmptrst(struct machine *m, uint32_t cpu);
/* VMCLEAR on this pCPU: the VMCS is neither active nor current here.  0, or MACHINE_MISUSE while it is active
 * on another pCPU, which would still hold it. */
/* call: aside */
int vmclear(struct machine *m, uint32_t cpu, uint32_t vmcs);
/* end api */

/* vmcs01, and vmcs02 of a vCPU with a nested guest: most VMCSs per vCPU, on average. */
enum { VMCS_PER_VCPU = 2 };

struct vmcs {
	alignas(CACHELINE) _Atomic uint32_t live; /* slot.h */
	_Atomic int32_t cpu; /* pCPU on which it is active; -1: none */
	uint32_t id;
	uint32_t vcpu;
	uint32_t vpid;       /* VIRTUAL_PROCESSOR_ID */
	bool ept;            /* "enable EPT" */
	bool nested_ept;     /* EPT_POINTER's tables shadow an EPT of L1's */
	/* EPT_POINTER, or GUEST_CR3 without EPT */
	uint32_t root;
	uint32_t root_level;
	uint32_t life;       /* tag of the root page when it was written */
	uint32_t pcid;       /* of GUEST_CR3 */
	uint32_t apic_page;  /* APIC_ACCESS_ADDR; 0: "virtualize APIC accesses" is 0 */
	uint8_t owner;       /* tells the linear mappings of this VMCS from those of earlier owners of its VPID */
};

/* Return the current VMCS of a pCPU, or NULL.  Called by the CPU's thread. */
struct vmcs *vmcs_current(const struct machine *m, uint32_t cpu);
/* Set the handler of IPI_VMCS_CLEAR; its argument is the VM << 32 | the VMCS. */
void vmcs_register(void);
int vmcss_create(struct machine *m);
void vmcss_destroy(struct machine *m);

#endif
