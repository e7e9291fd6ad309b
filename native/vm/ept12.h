/* The EPTs that L1 has for its nested guests (EPT12 in KVM), as L1 records them.
 *
 * The tables are in L1's memory, and L1's stores write them (guest_ept12.h).  These records hold the mappings that L1
 * has written, and the changes that L1 has not invalidated yet, so that the oracle does not depend on KVM's reading
 * of the tables.  As all of a guest's state, they belong to the thread of the pCPU on which the vCPU is loaded.
 */
#ifndef FLUSHLAB_EPT12_H
#define FLUSHLAB_EPT12_H

#include "core/machine_types.h"
#include "tlb/tlb.h"
#include "vm/guest_state.h"

/* api */
/* EPTs that one L1 may have, numbered from 1 on. */
enum { EPT12S = 4 };
/* end api */

#define EPT12_MAPPED (UINT64_C(1) << 32)
#define EPT12_WRITABLE (UINT64_C(1) << 33)
/* SDM vol. 3C, 29.3.2: of an entry. */
#define EPT12_ACCESSED UINT64_C(0x100)
#define EPT12_DIRTY UINT64_C(0x200)

enum { EPT12_CLEANED = 16 };

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

/* An entry of which L1 has cleared the flags: an access of the nested guest has to set them again, before it is done. */
struct ept12_cleaned {
	uint32_t ept12;
	uint64_t page;                 /* of L2 */
	const _Atomic uint64_t *entry; /* in the host's frame, which the host must leave there */
};

struct ept12s {
	struct ept12 ept[EPT12S + 1];
	struct ept12_change *change;
	uint32_t changes, room;
	struct ept12_cleaned cleaned[EPT12_CLEANED];
	uint32_t cleans;
	uint32_t entered;    /* the EPT of the last VM entry; 0: none */
	uint64_t violation; /* the guest-physical page at which L2 has exited to L1; GUEST_NO_GFN: none */
};

/* Return L1's mapping of a guest-physical page of L2. */
struct guest_mapping ept12_mapping(const struct ept12 *ept, uint64_t page);
/* Return whether L1's EPT permits a mapping to the nested guest that runs.  The time of the fill does not matter,
 * because KVM may derive a mapping from entries that it read long before. */
enum guest_agreement ept12_agreement(const struct vcpu *vcpu, const struct tlb_entry *entry, uint64_t page, uint32_t type);

#endif
