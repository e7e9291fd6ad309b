/* The TLB and the paging-structure caches of one pCPU, owned by that pCPU's thread.
 *
 * The SDM's three kinds of cached mapping (vol. 3C, 29.4.1 "Information that may be cached"):
 *   linear           input: linear page,          tag: VPID, PCID           (EPT off)
 *   guest-physical   input: guest-physical page,  tag: EP4TA
 *   combined         input: linear page,          tag: VPID, PCID, EP4TA
 * each as translations (4K, 2M, 1G) and as paging-structure-cache entries.  Global translations belong
 * to no PCID.  EP4TA is the frame number of the EPT root page.
 *
 * A tag is a *context*: a slot in a table with a generation.  An entry's key holds page, size, context
 * and generation, so one increment drops a context in one step.  A dropped entry stays in its slot as a
 * *ghost* until overwritten: same page and context, older generation.
 *
 * Invalidation drops exactly what the SDM's table requires and nothing more, as far as the second level
 * is concerned; with l2_entries = 0 nothing is ever evicted, so contents equal the architectural maximum.
 */
#ifndef FLUSHLAB_TLB_H
#define FLUSHLAB_TLB_H

#include <stddef.h>

#include "machine.h"

/* api */
enum mapping_kind { KIND_LINEAR, KIND_GUEST_PHYSICAL, KIND_COMBINED };
enum page_size { PAGE_4K, PAGE_2M, PAGE_1G };
enum access_type { ACCESS_READ, ACCESS_WRITE, ACCESS_EXECUTE, ACCESS_TYPES };

/* A right never equals this: the translation does not permit the access (or needs a walk first, as a
 * write through an entry whose dirty flag is clear does). */
enum { RIGHT_NONE = 0x8000 };

/* One translation.  right[t] is what the custody check compares: the custody tag (15 bits) of the frame
 * for accesses of type t in bits 14:0, RIGHT_NONE otherwise, and the life of the root page in 31:16. */
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
	uint32_t vm;       /* who filled it */
	uint32_t vcpu;
	uint64_t clock;    /* that vCPU's clock when it did */
	uint64_t gfn;      /* guest-physical page behind it (4 KiB units, aligned as hfn) */
	uint16_t custody;  /* as the SPTE carried it (frame.h), a huge one's with CUSTODY_OF_BLOCK */
};

/* A paging-structure-cache entry: where the table that the next level of the walk reads is. */
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

/* What the CPU translates for from now on.  ept: EP4TA valid, else linear mappings.  Costs three hash
 * look-ups, invalidates nothing. */
void tlb_switch(struct tlb *t, uint32_t vpid, uint32_t pcid, uint32_t ep4ta, int ept);
/* The same for a guest with CR0.PG = 0 under EPT: its accesses use guest-physical mappings, so the first
 * level serves those; there are no linear or combined look-ups until the next tlb_switch.  PCID is 0. */
void tlb_switch_physical(struct tlb *t, uint32_t vpid, uint32_t ep4ta);

/* Second-level look-up and fill for the current context.  Look-up promotes nothing.  kind LINEAR or
 * COMBINED must agree with `ept` of tlb_switch.  Returns 1 and copies the entry on a hit; on a miss
 * returns 0, or 2 if a ghost of the same page and context was found (copied too). */
int tlb_lookup(struct tlb *t, uint32_t kind, uint64_t page, struct tlb_entry *entry);
/* vpid, pcid and ep4ta of *entry are ignored: the current context is used.  Also fills the first level,
 * for the 4K page `page` of the access, if it serves that kind (GUEST_PHYSICAL: only when paging is off). */
void tlb_insert(struct tlb *t, const struct tlb_entry *entry, uint64_t page);
/* Deepest paging-structure-cache entry for a page in the current context: its level, 0 if none. */
int psc_lookup(struct tlb *t, uint32_t kind, uint64_t page, struct psc_entry *entry);
void psc_insert(struct tlb *t, const struct psc_entry *entry);

/* First level missed: try the second, promote on a hit.  As tlb_lookup, for the kind in use. */
int tlb_refill_l1(struct tlb *t, uint64_t page, struct tlb_entry *entry);
/* Refresh the right of one access type to `page`, after a check of the entry that tlb_lookup returns: in
 * that entry and in the first level's copy.  Nowhere else: a right is one frame's custody, so the copy of a
 * large translation in the second level, which serves other frames too, keeps the one it was filled with. */
void tlb_update_right(struct tlb *t, uint32_t kind, uint64_t page, uint32_t type, uint32_t right);
/* Drop the translations of `page` in the current context, both levels (hardware: the ghost has flush 0). */
void tlb_drop(struct tlb *t, uint32_t kind, uint64_t page);

/* The flush that the following INVEPT and INVVPID belong to, for ghosts: a number that tlb_ghost_flush()
 * gives back.  What the guest's own instructions and the hardware drop always counts as flush 0. */
void tlb_flush_begin(struct tlb *t, uint64_t flush);
/* Which flush made the ghost that the last tlb_lookup returned 2 for; 0: none of KVM's, or forgotten. */
uint64_t tlb_ghost_flush(struct tlb *t);
/* That ghost was counted: report it no more (a retried access would find it again). */
void tlb_ghost_forget(struct tlb *t);
/* Live second-level translations dropped since tlb_flush_begin that another VM than `vm` filled, or all
 * with vm -1.  Exact unless two VMs filled one context at a time (same VPID or same EPT root page): if such
 * a context is dropped whole, entries of the VM that came second count as another VM's for everybody. */
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
/* MOV CR4 toggling PGE or clearing PCIDE; MOV CR0 clearing PG: everything of the VPID, globals too. */
void mov_to_cr_all(struct tlb *t);
/* MOV CR4 toggling PAE or setting SMEP: current PCID.  Globals go too (they are used with it). */
void mov_to_cr_pcid(struct tlb *t);
/* #PF on a page: the entries that would translate it, current PCID and globals. */
void page_fault_invalidate(struct tlb *t, uint64_t page);
/* EPT violation: guest-physical entries for gpa_page under the current EP4TA, and, if linear_valid, the
 * combined entries for linear_page under the current VPID, PCID and EP4TA. */
void ept_violation_invalidate(struct tlb *t, uint64_t gpa_page, uint64_t linear_page, int linear_valid);
/* VM entry or exit with "enable VPID" = 0: linear and combined mappings of VPID 0. */
void vm_transition_no_vpid(struct tlb *t);

/* Everything valid, for tests and reports: fills up to max, returns how many there are. */
uint32_t tlb_dump(struct tlb *t, struct tlb_entry *entries, uint32_t max);
uint32_t psc_dump(struct tlb *t, struct psc_entry *entries, uint32_t max);
/* Contexts that may hold something valid. */
uint32_t tlb_contexts(struct tlb *t);
/* Is `page` in the first level, and as what?  1: yes, with frame of the piece and right[3]. */
int tlb_l1_probe(struct tlb *t, uint64_t page, uint32_t *hfn, uint32_t *right);
/* end api */

struct heap;
/* tlb_create() with memory from a machine's heap (heap.h). */
struct tlb *tlb_create_in(struct heap *heap, const struct machine_config *config);

/* First level: 64 entries, 16 sets of 4 ways, always in 4 KiB pieces, keyed by the current context.
 * Inline because every guest access goes through it.  A key is context(11) << 51 | generation(15) <<
 * 36 | page(36); 0 is empty, since no generation is 0.
 *
 * Comparing the ways of a set in turn costs a mispredicted branch for most accesses, and comparing them all
 * at once half of the time that an access may take (bench/native/tlb_loop.c).  So each of 4096 classes of
 * pages remembers where in the TLB it hit last.  That is only where the look-up begins: the key decides, and
 * if it differs the set is searched. */
enum { L1_SETS = 16, L1_WAYS = 4, L1_CONTEXT_SHIFT = 36, L1_HINTS = 4096 };

struct tlb_hot {
	_Alignas(32) uint64_t key;
	uint32_t right[3]; /* a tlb_entry's ^ tlb_l1.life: one that holds equals a tag alone */
	uint32_t hfn;   /* of the 4 KiB piece */
	uint32_t stamp; /* clock at the last use */
	uint8_t span;   /* log2 of the 4 KiB pages of the page that it is a piece of */
};

struct tlb_l1 {
	_Alignas(64) struct tlb_hot hot[L1_SETS][L1_WAYS];
	struct tlb_hot *hint[L1_HINTS]; /* by page: into hot, at anything if out of date */
	uint64_t context_bits;   /* high bits of a key in the current context */
	uint32_t clock;          /* counts fills: uses between two fills are one instant to LRU */
	uint32_t life;           /* of the root page in use, << 16 */
	uint8_t has_pieces;      /* a span is not 0 somewhere */
	uint8_t has_globals;     /* a copy of a global translation may be here, under some PCID */
};

/* Out of line: the hint was wrong.  Searches the set. */
struct tlb_hot *tlb_l1_search(struct tlb_l1 *l1, uint64_t page);

/* What changes in the first level only when something is filled or invalidated, for a loop to keep in registers. */
struct tlb_view {
	uint64_t context_bits;
	uint32_t clock;
};

static inline struct tlb_view tlb_l1_view(const struct tlb_l1 *l1)
{
	return (struct tlb_view){ l1->context_bits, l1->clock };
}

/* Where the hint for `page` (below 2^36) points, if the page is there in the current context; else NULL. */
static inline struct tlb_hot *tlb_l1_hinted(struct tlb_l1 *l1, struct tlb_view view, uint64_t page)
{
	struct tlb_hot *hot = l1->hint[page & (L1_HINTS - 1)];

	return __builtin_expect(hot->key == (view.context_bits | page), 1) ? hot : NULL;
}

/* One use: keeps the replacement state. */
static inline void tlb_l1_touch(struct tlb_hot *hot, struct tlb_view view)
{
	hot->stamp = view.clock;
}

/* The translation of `page` in the current context, or NULL.  One use: looks, and keeps the replacement state, each
 * time. */
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
