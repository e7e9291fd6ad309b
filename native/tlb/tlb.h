/* The TLB and the paging-structure caches of one pCPU, owned by that pCPU's thread.
 *
 * The SDM's three kinds of cached mapping (vol. 3C, 29.4.1 "Information that may be cached"):
 *   linear           input: linear page,          tag: VPID, PCID           (EPT off)
 *   guest-physical   input: guest-physical page,  tag: EP4TA
 *   combined         input: linear page,          tag: VPID, PCID, EP4TA
 * each as translations (4K, 2M, 1G) and as paging-structure-cache entries.  Global translations belong to no
 * PCID.  EP4TA is the frame number of the EPT root page.
 *
 * A tag is a *context*: a slot in a table with a generation.  An entry's key holds page, size, context and
 * generation, so incrementing the generation drops a context in one step.  A dropped entry stays in its slot as
 * a *ghost* until it is overwritten: page and context are unchanged, its generation is older.
 *
 * In the second level, an invalidation drops exactly the entries that the SDM's table requires and no others;
 * with l2_entries = 0 nothing is ever evicted, so the contents equal the architectural maximum.
 */
#ifndef FLUSHLAB_TLB_H
#define FLUSHLAB_TLB_H

#include <stddef.h>

#include "core/machine_types.h"

struct tlb_hot;

/* api */
/* calls: anything */
enum mapping_kind { KIND_LINEAR, KIND_GUEST_PHYSICAL, KIND_COMBINED };
enum page_size { PAGE_4K, PAGE_2M, PAGE_1G };
enum access_type { ACCESS_READ, ACCESS_WRITE, ACCESS_EXECUTE, ACCESS_TYPES };

/* No right has this value: the translation does not permit the access (or needs a walk first, as a write does
 * while the entry's dirty flag is clear). */
enum { RIGHT_NONE = 0x8000 };

/* A right that no tag can stand for: the oracle judges each use of it.  Below the life of the root page.
 *
 * A tag stands for one frame.  A large translation serves many, and frames may have equal tags by accident.  So the
 * second level keeps its rights unjudged, whatever the page for which it was filled; the first level has pieces of
 * 4 KiB, which have tags. */
enum { RIGHT_UNJUDGED = 0x8001 };

/* One translation.  right[t] is the value that the custody check compares: the custody tag (15 bits) of the
 * frame for accesses of type t in bits 14:0, or RIGHT_UNJUDGED, with the life of the root page in 31:16; RIGHT_NONE if
 * the access is not permitted. */
struct tlb_entry {
	uint64_t page;     /* input page in 4 KiB units, aligned to size */
	uint32_t hfn;      /* first 4 KiB frame of the output page */
	uint32_t right[3]; /* by access_type */
	uint32_t ep4ta;
	uint16_t vpid;
	uint16_t pcid;
	uint8_t kind;
	uint8_t size;
	uint8_t global;
	uint8_t fractured; /* a 4K (2M) piece of a larger guest page: INVLPG of any address of that
			    * page drops all pieces; holds the guest's page_size + 1, 0: not fractured */
	uint32_t vm;       /* VM and vCPU that filled it */
	uint32_t vcpu;
	int32_t ept12_delta; /* L2's guest-physical page is gfn + ept12_delta; 0 unless L1 has an EPT for L2 */
	uint64_t clock;    /* that vCPU's clock at the fill */
	uint64_t gfn;      /* guest-physical page behind it, in L1's terms (4 KiB units, aligned as hfn) */
	uint16_t custody;  /* as in the SPTE (frame.h); that of a huge SPTE with CUSTODY_OF_BLOCK */
	uint8_t supervisor; /* linear: not for user-mode accesses, which the first level serves */
	uint16_t nested;   /* the guest that filled it (guest_nested.h): 0: the vCPU's own guest, L1 */
	uint32_t apic_page; /* the frame of the APIC-access page at the fill (vmcs.h); 0: none */
};

struct tlb;

struct tlb *tlb_create(const struct machine_config *config);
void tlb_destroy(struct tlb *t);

/* Set the context that the CPU translates for from now on.  ept: EP4TA valid, else linear mappings.  Costs
 * three hash look-ups, invalidates nothing. */
void tlb_switch(struct tlb *t, uint32_t vpid, uint32_t pcid, uint32_t ep4ta, int ept);
/* tlb_switch() for a guest with CR0.PG = 0 under EPT: its accesses use guest-physical mappings, so the first
 * level serves those; there are no linear or combined look-ups until the next tlb_switch.  PCID is 0. */
void tlb_switch_physical(struct tlb *t, uint32_t vpid, uint32_t ep4ta);

/* Second-level look-up and fill for the current context.  A look-up promotes nothing.  kind LINEAR or COMBINED
 * must agree with `ept` of tlb_switch.  Returns 1 and copies the entry on a hit; on a miss returns 0, or 2 if a
 * ghost of that page and context was found (copied too). */
int tlb_lookup(struct tlb *t, uint32_t kind, uint64_t page, struct tlb_entry *entry);
/* Insert a translation into the current context; vpid, pcid and ep4ta of *entry are ignored.  Also fills the
 * first level, for the 4K page `page` of the access, if it serves that kind (GUEST_PHYSICAL: only when paging
 * is off). */
void tlb_insert(struct tlb *t, const struct tlb_entry *entry, uint64_t page);

/* After a miss in the first level: try the second, promote on a hit.  Returns as tlb_lookup, for the kind in
 * use. */
int tlb_refill_l1(struct tlb *t, uint64_t page, struct tlb_entry *entry);
/* Refresh the right of one access type to `page`, after a check of the entry that tlb_lookup returns: in that
 * entry and in the first level's copy, and nowhere else.  The second level's copy of a large translation, which serves
 * other frames too, stays unjudged. */
void tlb_update_right(struct tlb *t, uint32_t kind, uint64_t page, uint32_t type, uint32_t right);
/* Drop the translations of `page` in the current context, both levels (hardware: the ghost has flush 0). */
void tlb_drop(struct tlb *t, uint32_t kind, uint64_t page);
/* end api */

/* Let the oracle judge each use of a right that the translation has. */
static inline void entry_leave_unjudged(struct tlb_entry *e, uint32_t type)
{
	if (e->right[type] != RIGHT_NONE)
		e->right[type] = (e->right[type] & ~(uint32_t)UINT16_MAX) | RIGHT_UNJUDGED;
}

static inline void entry_leave_all_unjudged(struct tlb_entry *e)
{
	for (uint32_t type = 0; type < ACCESS_TYPES; type++)
		entry_leave_unjudged(e, type);
}

/* tlb_create() with memory from a machine's heap (heap.h). */
struct tlb *tlb_create_in(struct heap *heap, const struct machine_config *config);

/* Take over the context bits of the current context, which have changed. */
void l1_retag(struct tlb *t);
/* After a wrong hint for `page` (below 2^36): search the first level, then the second, and promote.  NULL: it
 * is in neither, and tlb_ghost() returns the candidate for its ghost.  Valid until the next fill. */
struct tlb_hot *tlb_l1_miss(struct tlb *t, uint64_t page);

#endif
