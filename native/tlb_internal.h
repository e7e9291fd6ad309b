/* Inside of the TLB: shared by tlb*.c and psc.c, and by the run loop, which reaches into struct tlb for l1.
 *
 * Key of a cached mapping: size(2) | page(36) | context(11) | generation(15).  Without the generation it is
 * an *id*: an id has one slot at most, which holds its live mapping or its ghost.  Context 0 is never used
 * and no generation is 0, so key 0 is an empty cell and generation 0 a mapping that was dropped singly.
 */
#ifndef FLUSHLAB_TLB_INTERNAL_H
#define FLUSHLAB_TLB_INTERNAL_H

#include <stddef.h>

#include "tlb.h"

enum {
	GENERATION_BITS = 15,
	GENERATION_MAX = (1 << GENERATION_BITS) - 1,
	CONTEXT_BITS = 11,
	CONTEXTS = 1 << CONTEXT_BITS,
	PAGE_BITS = 36,
	NO_CONTEXT = 0,
	PCID_GLOBAL = 0xffff,  /* the context of the global translations of a VPID (and EP4TA) */
	FLUSH_HISTORY = 16,    /* generations back that a context remembers what ended them */
	VPID_BUCKETS = 256,
	CONTEXT_BUCKETS = 4096,
	PIECE_BUCKETS = 1024,
	PSC_LEVELS = 4,
};

#define PAGE_NUMBER_MASK ((UINT64_C(1) << PAGE_BITS) - 1)

/* tlb_store.c: cells found by id, set-associative with LRU or, if unbounded, a growing hash table. */
struct cell {
	uint64_t key;
	uint32_t slot; /* of the payload */
	uint32_t stamp;
};

struct store {
	struct cell *cells;
	uint8_t *payload;
	size_t payload_size;
	const uint16_t *generation; /* by context: what a live key holds */
	uint32_t cell_count;
	uint32_t sets;
	uint32_t ways;  /* 0: unbounded */
	uint32_t used;  /* unbounded: cells in use, and next free slot */
	uint32_t slots; /* unbounded: payloads allocated */
	uint32_t clock;
	uint8_t shift[4]; /* by size: log2 of the pages that a mapping covers */
};

static inline uint64_t mapping_id(uint32_t size, uint64_t page, uint32_t context)
{
	return (uint64_t)size << (PAGE_BITS + CONTEXT_BITS) | page << CONTEXT_BITS | context;
}

static inline uint64_t key_id(uint64_t key)
{
	return key >> GENERATION_BITS;
}

static inline uint32_t key_context(uint64_t key)
{
	return key >> GENERATION_BITS & (CONTEXTS - 1);
}

static inline uint32_t key_size(uint64_t key)
{
	return key >> (PAGE_BITS + CONTEXT_BITS + GENERATION_BITS);
}

static inline uint64_t key_page(uint64_t key)
{
	return key >> (CONTEXT_BITS + GENERATION_BITS) & PAGE_NUMBER_MASK;
}

static inline bool cell_live(const struct store *s, const struct cell *cell)
{
	return cell->key && (cell->key & GENERATION_MAX) == s->generation[key_context(cell->key)];
}

static inline void *cell_payload(const struct store *s, const struct cell *cell)
{
	return s->payload + (size_t)cell->slot * s->payload_size;
}

int store_create(struct store *s, uint32_t entries, uint32_t ways, size_t payload_size,
		 const uint16_t *generation);
void store_destroy(struct store *s);
/* The cell of an id, live or not; NULL: none.  Valid until the next store_claim. */
struct cell *store_find(const struct store *s, uint64_t id);
/* A cell to put an id in: its own, an empty one, a dead one, or the least recently used.  The cell still
 * holds its old key and payload, for the caller to account for and overwrite.  NULL: out of memory. */
struct cell *store_claim(struct store *s, uint64_t id);
/* Make every mapping of a context dead, by a scan. */
void store_purge(struct store *s, uint32_t context);

/* tlb_context.c */
struct context {
	uint64_t flush[FLUSH_HISTORY]; /* what ended generation g, at g % FLUSH_HISTORY */
	uint32_t ep4ta;
	uint16_t vpid;
	uint16_t pcid; /* PCID_GLOBAL: of global translations */
	uint8_t kind;
	bool filled;     /* a translation was cached in this generation, in either level */
	bool psc_filled; /* likewise in the paging-structure caches */
	bool listed;     /* in tlb.live and, unless guest-physical, in its VPID's chain */
	uint16_t birth;  /* first generation of this identity: older ghosts are somebody else's */
	uint16_t hash_next;
	uint16_t lru_next, lru_prev;
	uint16_t vpid_next, vpid_prev;
	uint16_t live_position;
	uint32_t vm;         /* who filled the first of the live translations */
	uint32_t live;       /* live translations, second level, of that VM */
	uint32_t live_other; /* ... of any other */
	uint32_t slots[3];   /* second-level cells of this context by size, ghosts included */
	uint32_t psc_slots[PSC_LEVELS];
};

/* Payload of a second-level cell. */
struct slot {
	struct tlb_entry entry;
	uint64_t flush; /* dropped singly: by which flush */
	uint16_t born;  /* generation when filled; 0: not to be reported as a ghost */
};

struct tlb {
	struct tlb_l1 l1; /* first: the run loop's */
	/* what is translated for */
	uint32_t vpid, pcid;
	uint32_t kind;     /* of the accesses: what the first level serves */
	uint32_t serves;   /* context whose bits are in l1.context_bits */
	uint32_t paged;    /* context of vpid, pcid (, ep4ta); 0 if paging is off */
	uint32_t global;   /* that of its global translations, 0 if there is none yet */
	uint32_t physical; /* that of guest-physical mappings, 0 if EPT is off */
	struct store l2;
	struct store psc[PSC_LEVELS];
	/* contexts */
	uint16_t generation[CONTEXTS];
	uint16_t psc_generation[CONTEXTS];
	struct context contexts[CONTEXTS];
	uint16_t hash[CONTEXT_BUCKETS];
	uint16_t vpid_chain[VPID_BUCKETS];
	uint16_t live[CONTEXTS]; /* those that may hold something live */
	uint32_t live_count;
	uint32_t used; /* contexts taken so far; from then on they are recycled */
	/* Cells (live or not) holding pieces of larger guest pages, by hash of context and guest page: tells
	 * whether INVLPG must search for pieces. */
	uint32_t pieces[PIECE_BUCKETS];
	/* flushes and ghosts */
	uint64_t flush;
	uint64_t ghost_flush;
	struct slot *ghost;
	uint64_t dropped;         /* since tlb_flush_begin */
	uint64_t *dropped_by_vm;
	uint64_t *dropped_epoch;  /* flush epoch that dropped_by_vm[vm] is of */
	uint64_t epoch;
	uint32_t vms;
};

enum { DROP_TRANSLATIONS = 1, DROP_PSC = 2, DROP_BOTH = 3 };

void contexts_init(struct tlb *t);
/* The context of a tag; 0 if there is none.  context_get makes one, recycling if it must. */
uint32_t context_find(struct tlb *t, uint32_t kind, uint32_t vpid, uint32_t pcid, uint32_t ep4ta);
uint32_t context_get(struct tlb *t, uint32_t kind, uint32_t vpid, uint32_t pcid, uint32_t ep4ta);
/* Something is being cached in it. */
void context_list(struct tlb *t, uint32_t index);
/* Drop all its translations and/or paging-structure-cache entries in one step. */
void context_drop(struct tlb *t, uint32_t index, uint32_t what);

/* tlb_account.c: who filled what was dropped, ghosts, pieces. */
void account_fill(struct tlb *t, uint64_t key, struct slot *slot);
/* A cell is about to be overwritten. */
void account_evict(struct tlb *t, const struct cell *cell);
/* `count` live translations that `vm` filled were dropped. */
void account_dropped(struct tlb *t, uint32_t vm, uint64_t count);
/* Drop one live cell. */
void cell_kill(struct tlb *t, struct cell *cell);
uint32_t *piece_bucket(struct tlb *t, uint32_t context, uint64_t page, uint32_t piece, uint32_t guest);

/* tlb_l1.c */
void l1_clear(struct tlb_l1 *l1);
/* Drop the page from the first level whatever its context, with all pieces of the page it is part of. */
void l1_drop(struct tlb_l1 *l1, uint64_t page);
/* Put the piece `page` of a translation in, under the current context. */
void l1_fill(struct tlb_l1 *l1, const struct tlb_entry *entry, uint64_t page);
/* ... if it is of that frame. */
void l1_update_right(struct tlb_l1 *l1, uint64_t key, uint32_t hfn, uint32_t type, uint32_t right);

/* tlb.c: context bits of the current context changed. */
void l1_retag(struct tlb *t);

/* tlb_address.c: drop one page of one context. */
void context_drop_page(struct tlb *t, uint32_t index, uint64_t page);
/* ... and every piece of a larger guest page that the page is part of. */
void context_drop_pieces(struct tlb *t, uint32_t index, uint64_t page);

/* psc.c */
int psc_create(struct tlb *t, const struct machine_config *config);
void psc_destroy(struct tlb *t);
/* Entries of one context that a walk for the page could use. */
void psc_drop_page(struct tlb *t, uint32_t index, uint64_t page);

#endif
