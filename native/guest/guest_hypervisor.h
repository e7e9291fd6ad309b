/* The hypervisor of a guest OS (L1) that replays traces: it runs nested guests, which have OSes and traces of their own.
 *
 * A nested guest exits to L1 after some accesses (VMCALL stands for any exit that L1 handles).  L1 handles the exit with
 * some accesses of its own and enters a nested guest again.  In between it does what hypervisors do: it loads another
 * VMCS12, gives a nested guest another VPID, takes pages away in its EPT, switches EPTs, invalidates, and leaves VMX
 * operation.  It invalidates whatever its changes oblige it to.
 *
 * A nested guest with a VPID leaves some of its own invalidations to L1, as one does that asks its hypervisor to flush.
 * One whose L1 has no EPT, but an APIC-access page for it, accesses its APIC, which exits to L1; L1 uses the page as memory.
 */
#ifndef FLUSHLAB_GUEST_HYPERVISOR_H
#define FLUSHLAB_GUEST_HYPERVISOR_H

#include "core/machine_types.h"
#include "walk/walk.h"

/* api */
struct hypervisor_config {
	uint32_t guests;        /* nested guests, from 1 to NESTED_GUESTS */
	uint32_t vpid;          /* L1 gives them VPIDs */
	uint32_t ept;           /* L1 has EPTs for them */
	uint32_t ad;            /* with accessed and dirty flags */
	uint64_t apic_gfn;      /* APIC_ACCESS_ADDR of their VMCS12s, which no OS hands out; 0: none */
	/* Exits of nested guests to L1 between two of each, on average; 0: never */
	uint32_t switch_every;  /* VMPTRLD of another nested guest's VMCS12, half of the times behind a VMCLEAR of this one */
	uint32_t vpid_every;    /* another VPID for the nested guest, behind an INVVPID of it */
	uint32_t invvpid_every; /* INVVPID of any type; and as often one that the nested guest has asked for */
	uint32_t unmap_every;   /* a few pages that L1 unmaps or write-protects in its EPT, then INVEPT */
	uint32_t eptp_every;    /* another EPT for the nested guest */
	uint32_t vmxoff_every;  /* VMXOFF, then VMXON */
};

/* Let the vCPU's own guest run its nested guests, which have been created and configured.  Before it runs. */
/* call: aside */
int guest_hypervise(struct machine *m, uint32_t vcpu, const struct hypervisor_config *config);
/* end api */

/* In guest mode: do what the hypervisor or its nested guest does next, before the next access.  Returns an exit reason;
 * EXIT_REASONS: the guest goes on with its accesses. */
uint32_t hypervisor_step(struct walk *w);

#endif
