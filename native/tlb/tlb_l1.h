/* The first level: 64 entries, 16 sets of 4 ways, always in 4 KiB pieces, keyed by the current context.  Inline
 * because every guest access goes through it.  A key is context(11) << 51 | generation(15) << 36 | page(36); 0
 * is empty, since no generation is 0.
 *
 * Comparing the ways of a set in turn costs a mispredicted branch for most accesses, and comparing them all at
 * once takes half of the time budget of an access (bench/native/tlb_loop.c).  So each of 4096 classes of pages
 * remembers the position of its last hit.  That is only where the look-up begins: the key decides, and if it
 * differs the set is searched.
 */
#ifndef FLUSHLAB_TLB_L1_H
#define FLUSHLAB_TLB_L1_H

#include "core/machine_types.h"
#include "tlb/tlb.h"

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

/* The rest of l1_put() for a piece of a larger guest page, and for a page that user mode may not use. */
void l1_put_special(const struct tlb_l1 *l1, struct tlb_hot *hot, const struct tlb_entry *entry);

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
	if (__builtin_expect(entry->fractured | entry->supervisor, 0))
		l1_put_special(l1, hot, entry);
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

#endif
