/* Internals of the TLB, shared by tlb*.c and psc.c, and by the run loop and the walks, which access it
 * directly. */
#ifndef FLUSHLAB_TLB_INTERNAL_H
#define FLUSHLAB_TLB_INTERNAL_H

#include "tlb/tlb_store.h"

enum {
	PCID_GLOBAL = 0xffff,  /* in place of a PCID: the context of the global translations of a VPID (and EP4TA) */
	FLUSH_HISTORY = 16,    /* past generations of which a context remembers the ending flush */
	VPID_BUCKETS = 256,
	CONTEXT_BUCKETS = 4096,
	PIECE_BUCKETS = 1024,
	PSC_LEVELS = 4,
};

/* tlb_context.c */
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

enum { DROP_TRANSLATIONS = 1, DROP_PSC = 2, DROP_BOTH = 3 };

void contexts_init(struct tlb *t);
/* Return the context of a tag; 0 if there is none.  context_get makes one, recycling if it must. */
uint32_t context_find(struct tlb *t, uint32_t kind, uint32_t vpid, uint32_t pcid, uint32_t ep4ta);
uint32_t context_get(struct tlb *t, uint32_t kind, uint32_t vpid, uint32_t pcid, uint32_t ep4ta);
void context_list_new(struct tlb *t, uint32_t index);

/* List a context before an entry is cached in it. */
static inline void context_list(struct tlb *t, uint32_t index)
{
	if (!t->contexts[index].listed)
		context_list_new(t, index);
}

/* Drop all translations and/or paging-structure-cache entries of a context in one step. */
void context_drop(struct tlb *t, uint32_t index, uint32_t what);

/* tlb_account.c: dropped entries by the VM that filled them, ghosts, pieces.  Account for a piece of a larger
 * guest page that is about to be overwritten. */
void account_piece_gone(struct tlb *t, const struct slot *slot, uint64_t key);

/* Count a live translation out.  The slot is read only if the context does not suffice: an eviction needs
 * nothing else of it, and the slot is seldom in the host's own caches. */
static inline void account_unlive(struct context *c, const struct slot *slot)
{
	if (__builtin_expect(c->live_other != 0, 0) && slot->entry.vm != c->vm)
		c->live_other--;
	else
		c->live--;
}

/* Account for the mapping that `slot` holds under a key, which is about to be overwritten. */
static inline void account_evict(struct tlb *t, const struct slot *slot, uint64_t key)
{
	uint32_t index = key_context(key);
	struct context *c = &t->contexts[index];

	if (__builtin_expect(!key, 0))
		return;
	if (__builtin_expect((key & GENERATION_MAX) == t->generation[index], 1))
		account_unlive(c, slot);
	c->slots[key_size(key)]--;
	if (__builtin_expect(c->pieces != 0, 0) && slot->entry.fractured)
		account_piece_gone(t, slot, key);
}

/* Account for a translation that `vm` fills. */
static inline void account_fill(struct context *c, uint32_t vm, uint32_t size)
{
	if (!c->live && !c->live_other)
		c->vm = vm;
	if (__builtin_expect(vm == c->vm, 1))
		c->live++;
	else
		c->live_other++;
	c->slots[size]++;
}

/* Account for a cell that is about to be overwritten by a mapping with this key and entry. */
void account_replace(struct tlb *t, uint32_t cell, uint64_t key, const struct tlb_entry *entry);
/* Account for `count` dropped live translations that `vm` filled. */
void account_dropped(struct tlb *t, uint32_t vm, uint64_t count);
/* Drop one live cell. */
void cell_kill(struct tlb *t, uint32_t cell);
uint32_t *piece_bucket(struct tlb *t, uint32_t context, uint64_t page, uint32_t piece, uint32_t guest);

/* tlb_l1.c */
static inline struct tlb_hot *l1_search(struct tlb_l1 *l1, uint64_t page)
{
	uint64_t key = l1->context_bits | page;
	struct tlb_hot *hot = l1->hot[page % L1_SETS];

#pragma GCC unroll 4
	for (uint32_t way = 0; way < L1_WAYS; way++, hot++)
		if (hot->key == key) {
			l1->hint[page % L1_HINTS] = hot;
			return hot;
		}
	return NULL;
}

void l1_create(struct tlb_l1 *l1);
void l1_clear(struct tlb_l1 *l1);
/* Set the life of the root page in use from now on, << 16. */
void l1_change_life(struct tlb_l1 *l1, uint32_t life);

static inline void l1_set_life(struct tlb_l1 *l1, uint32_t life)
{
	if (l1->life != life)
		l1_change_life(l1, life);
}

/* Drop the page from the first level in any context, with all pieces of the page it is part of. */
void l1_drop(struct tlb_l1 *l1, uint64_t page);
/* Put the piece `page` of a translation in, under the current context. */
void l1_fill(struct tlb_l1 *l1, const struct tlb_entry *entry, uint64_t page);

/* Put the piece `page` into this slot, replacing its entry.  size: the translation's. */
static inline __attribute__((always_inline)) void l1_put(struct tlb_l1 *l1, struct tlb_hot *hot,
							 const struct tlb_entry *entry, uint32_t size, uint64_t page)
{
	uint64_t span = (UINT64_C(1) << 9 * size) - 1;

	hot->key = l1->context_bits | page;
	hot->right[ACCESS_READ] = entry->right[ACCESS_READ] ^ l1->life;
	hot->right[ACCESS_WRITE] = entry->right[ACCESS_WRITE] ^ l1->life;
	hot->right[ACCESS_EXECUTE] = entry->right[ACCESS_EXECUTE] ^ l1->life;
	hot->hfn = entry->hfn + (uint32_t)(page & span);
	hot->stamp = ++l1->clock;
	hot->span = 9 * size;
	if (__builtin_expect(entry->fractured, 0))
		hot->span = 9 * (entry->fractured - 1u);
	l1->has_pieces |= hot->span != 0;
	l1->has_globals |= entry->global;
	l1->hint[page % L1_HINTS] = hot;
}

/* Return the slot to replace: the least recently used one; empty slots count as older than any. */
static inline struct tlb_hot *l1_victim(struct tlb_l1 *l1, uint64_t page)
{
	struct tlb_hot *hot = l1->hot[page % L1_SETS];
	uint32_t age[L1_WAYS], a, b;

#pragma GCC unroll 4
	for (uint32_t way = 0; way < L1_WAYS; way++)
		age[way] = (l1->clock - hot[way].stamp) << 2 | way;
	a = age[0] > age[1] ? age[0] : age[1];
	b = age[2] > age[3] ? age[2] : age[3];
	return &hot[(a > b ? a : b) % L1_WAYS];
}

/* Update the right of a key if it maps that frame. */
void l1_update_right(struct tlb_l1 *l1, uint64_t key, uint32_t hfn, uint32_t type, uint32_t right);

/* tlb.c: context bits of the current context changed. */
void l1_retag(struct tlb *t);
/* After a wrong hint for `page` (below 2^36): search the first level, then the second, and promote.  NULL: it
 * is in neither, and tlb_ghost() returns the candidate for its ghost.  Valid until the next fill. */
struct tlb_hot *tlb_l1_miss(struct tlb *t, uint64_t page);

static inline const struct tlb_entry *tlb_ghost(const struct tlb *t)
{
	return t->ghost ? &t->ghost->entry : NULL;
}

/* tlb_address.c: drop one page of one context. */
void context_drop_page(struct tlb *t, uint32_t index, uint64_t page);
/* Drop also every piece of a larger guest page that the page is part of. */
void context_drop_pieces(struct tlb *t, uint32_t index, uint64_t page);

/* psc.c */
static inline struct psc_entry *psc_payload(const struct store *s, uint32_t cell)
{
	return (struct psc_entry *)s->payload + cell_slot(s, cell);
}

static inline uint64_t region_id(uint32_t index, uint32_t level, uint64_t page)
{
	/* An entry for a table of level 1 covers 512 pages, for level 2 512 times that, and so on; `size` is
	 * the level - 1. */
	uint32_t shift = 9 * level;

	return mapping_id(level - 1, (page & PAGE_NUMBER_MASK) >> shift << shift, index);
}

/* Find the live entry of that level that covers the page. */
static inline __attribute__((always_inline)) uint32_t psc_find(const struct tlb *t, uint32_t index, uint32_t level,
							       uint64_t page)
{
	const struct store *s = &t->psc[level - 1];
	uint64_t id, key;
	const uint64_t *keys;
	uint32_t cell, way;

	if (!t->contexts[index].psc_slots[level - 1])
		return NO_CELL;
	id = region_id(index, level, page);
	key = id << GENERATION_BITS | t->psc_generation[index];
	if (__builtin_expect(!s->ways, 0)) {
		cell = store_probe(s, id);
		return cell != NO_CELL && s->key[cell] == key ? cell : NO_CELL;
	}
	cell = position_of(s, id, 9 * level).set * FEW_WAYS;
	keys = &s->key[cell];
	/* A branch for each way would be hard to predict. */
	way = (uint32_t)(keys[1] == key) + 2u * (keys[2] == key) + 3u * (keys[3] == key);
	return keys[way] == key ? cell + way : NO_CELL;
}

/* psc_lookup() of the deepest tables alone, without a copy, where they are kept in sets. */
static inline const struct psc_entry *psc_search_deepest(struct tlb *t, uint32_t index, uint64_t page)
{
	struct store *s = &t->psc[0];
	uint32_t cell;

	if (__builtin_expect(!s->ways, 0))
		return NULL;
	cell = psc_find(t, index, 1, page);
	if (cell == NO_CELL)
		return NULL;
	set_touch(s, &s->set[cell / FEW_WAYS], cell % FEW_WAYS);
	return psc_payload(s, cell);
}

/* psc_lookup() without a copy; NULL: none.  Valid until the next psc_insert. */
const struct psc_entry *psc_search(struct tlb *t, uint32_t kind, uint64_t page);
int psc_create(struct tlb *t, const struct machine_config *config);
void psc_destroy(struct tlb *t);
/* Drop the entries of one context that a walk for the page could use. */
void psc_drop_page(struct tlb *t, uint32_t index, uint64_t page);

#endif
