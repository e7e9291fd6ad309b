/* The TLB's fields, for its own sources and for the run loop and the walks, which access it directly. */
#ifndef FLUSHLAB_TLB_TYPES_H
#define FLUSHLAB_TLB_TYPES_H

#include "core/machine_types.h"
#include "tlb/tlb.h"
#include "tlb/tlb_l1.h"
#include "tlb/tlb_store.h"

enum {
	PCID_GLOBAL = 0xffff,  /* in place of a PCID: the context of the global translations of a VPID (and EP4TA) */
	FLUSH_HISTORY = 16,    /* past generations of which a context remembers the ending flush */
	VPID_BUCKETS = 256,
	CONTEXT_BUCKETS = 4096,
	PIECE_BUCKETS = 1024,
	PSC_LEVELS = 4,
};

struct context {
	uint64_t flush[FLUSH_HISTORY]; /* flush that ended generation g, at g % FLUSH_HISTORY */
	uint32_t ep4ta;
	uint16_t vpid;
	uint16_t pcid; /* PCID_GLOBAL: of global translations */
	uint8_t kind;
	bool filled;     /* a translation was cached in this generation, in either level */
	bool psc_filled; /* likewise in the paging-structure caches */
	bool listed;     /* in tlb.live and, unless guest-physical, in its VPID's chain */
	uint16_t birth;  /* first generation of this identity: older ghosts belong to a former one */
	uint16_t hash_next;
	uint16_t lru_next, lru_prev;
	uint16_t vpid_next, vpid_prev;
	uint16_t live_position;
	uint32_t vm;         /* VM that filled the first of the live translations */
	uint32_t live;       /* live translations, second level, of that VM */
	uint32_t live_other; /* live translations of other VMs */
	uint32_t slots[3];   /* second-level cells of this context by size, ghosts included */
	uint32_t pieces;     /* of slots, those that hold pieces of larger guest pages */
	uint32_t psc_slots[PSC_LEVELS];
};

/* Payload of a second-level cell; of two cache lines. */
struct slot {
	_Alignas(CACHELINE) struct tlb_entry entry;
	uint64_t flush; /* if dropped singly: the flush that did it */
	uint64_t filled; /* when, in fills of this TLB */
	uint16_t born;  /* generation when filled; 0: not to be reported as a ghost */
};

enum { ABSENT_PAGED, ABSENT_GLOBAL, ABSENT_PHYSICAL, ABSENTS };

struct tlb {
	struct tlb_l1 l1; /* first: the run loop's */
	uint64_t l1_misses; /* in tlb_l1_miss() */
	/* the current context */
	uint32_t vpid, pcid;
	uint32_t kind;     /* kind of the accesses, served by the first level */
	uint32_t serves;   /* context that l1.context_bits stand for */
	uint32_t paged;    /* context of vpid, pcid (, ep4ta); 0 if paging is off */
	uint32_t global;   /* context of its global translations, 0 if there is none yet */
	uint32_t physical; /* context of guest-physical mappings, 0 if EPT is off */
	struct store l2;
	struct store psc[PSC_LEVELS];
	/* contexts */
	uint16_t generation[CONTEXTS];
	uint16_t psc_generation[CONTEXTS];
	struct context contexts[CONTEXTS];
	uint16_t hash[CONTEXT_BUCKETS];
	uint16_t vpid_chain[VPID_BUCKETS];
	uint16_t live[CONTEXTS]; /* contexts that may hold live entries */
	uint32_t live_count;
	uint32_t used; /* contexts taken so far; from then on they are recycled */
	/* Cells (live or not) holding pieces of larger guest pages, by hash of context and guest page: tells
	 * whether INVLPG must search for pieces. */
	uint32_t pieces[PIECE_BUCKETS];
	/* flushes and ghosts */
	/* The last 4 KiB ids that were looked up and are in no cell, by kind of context: the fill that follows
	 * such a miss need not search again. */
	uint64_t absent[ABSENTS];
	uint64_t fills;
	uint64_t flush;
	uint64_t ghost_flush;
	struct slot *ghost;
	uint64_t dropped;         /* since tlb_flush_begin */
	uint64_t *dropped_by_vm;
	uint64_t *dropped_epoch;  /* flush epoch in which dropped_by_vm[vm] was counted */
	uint64_t epoch;
	uint32_t vms;
	struct heap *heap;
};

static inline struct slot *slot_of(const struct tlb *t, uint32_t cell)
{
	return (struct slot *)t->l2.payload + cell_slot(&t->l2, cell);
}

static inline uint64_t *absent_of(struct tlb *t, uint32_t index)
{
	return &t->absent[index == t->physical ? ABSENT_PHYSICAL : index == t->global ? ABSENT_GLOBAL : ABSENT_PAGED];
}

static inline const struct tlb_entry *tlb_ghost(const struct tlb *t)
{
	return t->ghost ? &t->ghost->entry : NULL;
}

#endif
