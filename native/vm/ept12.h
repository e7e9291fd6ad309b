/* The EPTs that L1 has for its nested guests (EPT12 in KVM), as L1 records them.
 *
 * The tables are in L1's memory, and are written by L1's stores (guest_ept12.h).  Kept here is what L1 has put there, and
 * which of its changes it has not invalidated yet, so that the oracle does not depend on KVM's reading of the tables.
 * Owned by the thread of the pCPU on which the vCPU is loaded, as all of the guest's state.
 */
#ifndef FLUSHLAB_EPT12_H
#define FLUSHLAB_EPT12_H

#include "core/machine_types.h"
#include "tlb/tlb.h"
#include "vm/guest_state.h"

/* api */
/* EPTs of one L1, by number from 1 on. */
enum { EPT12S = 4 };
/* end api */

#define EPT12_MAPPED (UINT64_C(1) << 32)
#define EPT12_WRITABLE (UINT64_C(1) << 33)

struct ept12 {
	uint64_t root_gfn; /* GUEST_NO_GFN: it has no tables yet */
	uint64_t *mapping; /* by guest-physical page of L2: L1's page, and the bits below; NULL: nothing is mapped */
	uint64_t pages;
};

/* A change that L1 has not invalidated yet: the former translation may be used. */
struct ept12_change {
	uint32_t ept12;
	uint64_t page;     /* of L2 */
	uint64_t gfn;      /* L1's page behind it before */
};

struct ept12s {
	struct ept12 ept[EPT12S + 1];
	struct ept12_change *change;
	uint32_t changes, room;
	uint32_t entered;    /* the EPT of the last VM entry; 0: none */
	uint64_t violation; /* the guest-physical page of L2 at which it has exited to L1; GUEST_NO_GFN: none */
};

/* Return L1's mapping of a guest-physical page of L2. */
struct guest_mapping ept12_mapping(const struct ept12 *ept, uint64_t page);
/* Return whether a mapping is one that L1's EPT permits for the nested guest that runs.  Times do not matter, because KVM
 * may derive a mapping from what the tables said long ago. */
enum guest_agreement ept12_agreement(const struct vcpu *vcpu, const struct tlb_entry *entry, uint64_t page, uint32_t type);

#endif
