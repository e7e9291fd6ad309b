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

#include "core/machine.h"

/* api */
enum mapping_kind { KIND_LINEAR, KIND_GUEST_PHYSICAL, KIND_COMBINED };
enum page_size { PAGE_4K, PAGE_2M, PAGE_1G };
enum access_type { ACCESS_READ, ACCESS_WRITE, ACCESS_EXECUTE, ACCESS_TYPES };

/* No right has this value: the translation does not permit the access (or needs a walk first, as a write does
 * while the entry's dirty flag is clear). */
enum { RIGHT_NONE = 0x8000 };

/* One translation.  right[t] is the value that the custody check compares: the custody tag (15 bits) of the
 * frame for accesses of type t in bits 14:0, RIGHT_NONE otherwise, and the life of the root page in 31:16. */
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
	uint64_t clock;    /* that vCPU's clock at the fill */
	uint64_t gfn;      /* guest-physical page behind it (4 KiB units, aligned as hfn) */
	uint16_t custody;  /* as in the SPTE (frame.h); that of a huge SPTE with CUSTODY_OF_BLOCK */
};

/* A paging-structure-cache entry: the location of the table that the next level of the walk reads. */
struct psc_entry {
	uint64_t page;   /* input page in 4 KiB units, aligned to the region that the entry covers */
	uint64_t gfn;    /* combined, linear: guest frame of the guest table; guest-physical: 0 */
	uint32_t hfn;    /* frame of the table */
	uint32_t right;  /* custody of that frame, as right[ACCESS_READ] above */
	uint32_t ep4ta;
	uint16_t vpid;
	uint16_t pcid;
	uint8_t kind;
	uint8_t level;   /* level of the table it points to: 1 (4K entries), 2, 3, 4 */
	uint8_t access;  /* accumulated R=1 W=2 X=4 U=8 of the levels above */
	uint8_t reserved;
	uint32_t vm;
	uint32_t vcpu;
	uint64_t clock;
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
/* Find the deepest paging-structure-cache entry for a page in the current context; return its level, 0 if none. */
int psc_lookup(struct tlb *t, uint32_t kind, uint64_t page, struct psc_entry *entry);
void psc_insert(struct tlb *t, const struct psc_entry *entry);

/* After a miss in the first level: try the second, promote on a hit.  Returns as tlb_lookup, for the kind in
 * use. */
int tlb_refill_l1(struct tlb *t, uint64_t page, struct tlb_entry *entry);
/* Refresh the right of one access type to `page`, after a check of the entry that tlb_lookup returns: in that
 * entry and in the first level's copy, and nowhere else.  A right is one frame's custody, so the second level's
 * copy of a large translation, which serves other frames too, keeps the right that it was filled with. */
void tlb_update_right(struct tlb *t, uint32_t kind, uint64_t page, uint32_t type, uint32_t right);
/* Drop the translations of `page` in the current context, both levels (hardware: the ghost has flush 0). */
void tlb_drop(struct tlb *t, uint32_t kind, uint64_t page);

/* Name the flush that the following INVEPT and INVVPID belong to, for ghosts: a number that tlb_ghost_flush()
 * returns.  Drops by the guest's own instructions and by hardware always count as flush 0. */
void tlb_flush_begin(struct tlb *t, uint64_t flush);
/* Return the flush that made the ghost that the last tlb_lookup returned 2 for; 0: none of KVM's, or forgotten. */
uint64_t tlb_ghost_flush(struct tlb *t);
/* Report that ghost no more: it has been counted, and a retried access would find it again. */
void tlb_ghost_forget(struct tlb *t);
/* Return how many live second-level translations were dropped since tlb_flush_begin that a VM other than `vm`
 * filled, or all of them with vm -1.  Exact unless two VMs filled one context at a time (equal VPIDs or a
 * shared EPT root page): if such a context is dropped whole, entries of the VM that came second count as
 * another VM's, whichever VM asks. */
uint64_t tlb_dropped(struct tlb *t, int64_t vm);

/* Invalidation, scopes of SDM vol. 3C 29.4.3; each acts on translations and paging-structure caches. */
/* (INVVPID of VPID 0 fails, except type 2, and invalidates nothing.) */
void invept_single(struct tlb *t, uint32_t ep4ta);
void invept_global(struct tlb *t);
void invvpid_address(struct tlb *t, uint32_t vpid, uint64_t page);
void invvpid_single(struct tlb *t, uint32_t vpid);
void invvpid_all(struct tlb *t);
void invvpid_retain_globals(struct tlb *t, uint32_t vpid);
/* The following act for the current VPID and PCID of tlb_switch, on linear and combined mappings. */
void invlpg(struct tlb *t, uint64_t page);
void invpcid_address(struct tlb *t, uint32_t pcid, uint64_t page);
void invpcid_single(struct tlb *t, uint32_t pcid);
void invpcid_all(struct tlb *t);
void invpcid_retain_globals(struct tlb *t);
/* MOV CR3 that invalidates (PCIDE=0, or bit 63 clear): non-global entries of `pcid`. */
void mov_to_cr3(struct tlb *t, uint32_t pcid);
/* MOV CR4 toggling PGE or clearing PCIDE; MOV CR0 clearing PG: all entries of the VPID, globals too. */
void mov_to_cr_all(struct tlb *t);
/* MOV CR4 toggling PAE or setting SMEP: current PCID.  Globals go too (they are used with it). */
void mov_to_cr_pcid(struct tlb *t);
/* #PF on a page: the entries that would translate it, current PCID and globals. */
void page_fault_invalidate(struct tlb *t, uint64_t page);
/* EPT violation: guest-physical entries for gpa_page under the current EP4TA and, if linear_valid, the combined
 * entries for linear_page under the current VPID, PCID and EP4TA. */
void ept_violation_invalidate(struct tlb *t, uint64_t gpa_page, uint64_t linear_page, int linear_valid);
/* VM entry or exit with "enable VPID" = 0: linear and combined mappings of VPID 0. */
void vm_transition_no_vpid(struct tlb *t);

/* Copy all valid entries, for tests and reports: fills up to max, returns how many there are. */
uint32_t tlb_dump(struct tlb *t, struct tlb_entry *entries, uint32_t max);
uint32_t psc_dump(struct tlb *t, struct psc_entry *entries, uint32_t max);
/* Return the number of contexts that may hold a valid entry. */
uint32_t tlb_contexts(struct tlb *t);
/* Look `page` up in the first level.  1: found, with the frame of the piece and right[3]. */
int tlb_l1_probe(struct tlb *t, uint64_t page, uint32_t *hfn, uint32_t *right);
/* end api */

struct heap;
/* tlb_create() with memory from a machine's heap (heap.h). */
struct tlb *tlb_create_in(struct heap *heap, const struct machine_config *config);

/* First level: 64 entries, 16 sets of 4 ways, always in 4 KiB pieces, keyed by the current context.  Inline
 * because every guest access goes through it.  A key is context(11) << 51 | generation(15) << 36 | page(36); 0
 * is empty, since no generation is 0.
 *
 * Comparing the ways of a set in turn costs a mispredicted branch for most accesses, and comparing them all at
 * once takes half of the time budget of an access (bench/native/tlb_loop.c).  So each of 4096 classes of pages
 * remembers the position of its last hit.  That is only where the look-up begins: the key decides, and if it
 * differs the set is searched.
 */
enum { L1_SETS = 16, L1_WAYS = 4, L1_CONTEXT_SHIFT = 36, L1_HINTS = 4096 };

struct tlb_hot {
	_Alignas(32) uint64_t key;
	uint32_t right[3]; /* tlb_entry's ^ tlb_l1.life: a right that holds equals the bare tag */
	uint32_t hfn;   /* of the 4 KiB piece */
	uint32_t stamp; /* clock at the last use */
	uint8_t span;   /* log2 of the size, in 4 KiB pages, of the page that it is a piece of */
};

struct tlb_l1 {
	_Alignas(64) struct tlb_hot hot[L1_SETS][L1_WAYS];
	struct tlb_hot *hint[L1_HINTS]; /* by page: points into hot, at any entry if out of date */
	uint64_t context_bits;   /* high bits of a key in the current context */
	uint32_t clock;          /* counts fills: for LRU, all uses between two fills are simultaneous */
	uint32_t life;           /* of the root page in use, << 16 */
	uint8_t has_pieces;      /* a span is not 0 somewhere */
	uint8_t has_globals;     /* a copy of a global translation may be here, under some PCID */
};

/* Out of line: the hint was wrong.  Searches the set. */
struct tlb_hot *tlb_l1_search(struct tlb_l1 *l1, uint64_t page);

/* The fields that only a fill or an invalidation changes, for a loop to keep in registers. */
struct tlb_view {
	uint64_t context_bits;
	uint32_t clock;
};

static inline struct tlb_view tlb_l1_view(const struct tlb_l1 *l1)
{
	return (struct tlb_view){ l1->context_bits, l1->clock };
}

/* Return the entry that the hint for `page` (below 2^36) points to if it is that page in the current context,
 * else NULL. */
static inline struct tlb_hot *tlb_l1_hinted(struct tlb_l1 *l1, struct tlb_view view, uint64_t page)
{
	struct tlb_hot *hot = l1->hint[page & (L1_HINTS - 1)];

	return __builtin_expect(hot->key == (view.context_bits | page), 1) ? hot : NULL;
}

/* Record one use in the replacement state. */
static inline void tlb_l1_touch(struct tlb_hot *hot, struct tlb_view view)
{
	hot->stamp = view.clock;
}

/* Return the translation of `page` in the current context, or NULL.  Counts as one use: each call searches, and
 * updates the replacement state. */
static inline struct tlb_hot *tlb_l1_lookup(struct tlb_l1 *l1, uint64_t page)
{
	struct tlb_view view = tlb_l1_view(l1);
	struct tlb_hot *hot = tlb_l1_hinted(l1, view, page);

	if (!hot)
		hot = tlb_l1_search(l1, page);
	if (hot)
		tlb_l1_touch(hot, view);
	return hot;
}

#endif
