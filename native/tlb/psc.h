/* Paging-structure caches (SDM vol. 3C, 29.4.1): where a walk may begin. */
#ifndef FLUSHLAB_PSC_H
#define FLUSHLAB_PSC_H

#include "core/machine_types.h"
#include "tlb/tlb_store.h"
#include "tlb/tlb_types.h"

/* api */
/* calls: anything */
/* A paging-structure-cache entry: the location of the table that the next level of the walk reads. */
struct psc_entry {
	uint64_t page;   /* input page in 4 KiB units, aligned to the region that the entry covers */
	uint64_t gfn;    /* combined, linear: guest frame of the guest table; guest-physical: 0 */
	uint32_t hfn;    /* frame of the table */
	uint32_t right;  /* custody of that frame, as tlb_entry.right[ACCESS_READ] */
	uint32_t ep4ta;
	uint16_t vpid;
	uint16_t pcid;
	uint8_t kind;
	uint8_t level;   /* level of the table it points to: 1 (4K entries), 2, 3, 4 */
	uint16_t nested; /* as tlb_entry's */
	uint32_t vm;
	uint32_t vcpu;
	int32_t ept12_delta; /* as tlb_entry's */
	uint64_t clock;
};

/* Find the deepest paging-structure-cache entry for a page in the current context; return its level, 0 if none. */
int psc_lookup(struct tlb *t, uint32_t kind, uint64_t page, struct psc_entry *entry);
void psc_insert(struct tlb *t, const struct psc_entry *entry);
/* tlb_dump() of paging-structure-cache entries. */
uint32_t psc_dump(struct tlb *t, struct psc_entry *entries, uint32_t max);
/* end api */

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
/* Drop the entries of one context that a walk for one of the pages could use. */
void psc_drop_range(struct tlb *t, uint32_t index, uint64_t page, uint64_t pages);

#endif
