/* The first level: 4 KiB pieces of the translations in use, in front of the second.  See tlb_l1.h for its look-up.
 * Its contents are copies: dropping too many only costs look-ups in the second level. */
#include "tlb/tlb_l1.h"

#include "core/machine_types.h"
#include "tlb/tlb.h"
#include "tlb/tlb_store.h"

struct tlb_hot *tlb_l1_search(struct tlb_l1 *l1, uint64_t page)
{
	return l1_search(l1, page);
}

/* Make a slot empty, and the first to be replaced. */
static void empty(struct tlb_l1 *l1, struct tlb_hot *hot)
{
	hot->key = 0;
	hot->stamp = l1->clock - UINT32_MAX / 8;
}

void l1_clear(struct tlb_l1 *l1)
{
	for (uint32_t set = 0; set < L1_SETS; set++)
		for (uint32_t way = 0; way < L1_WAYS; way++)
			empty(l1, &l1->hot[set][way]);
	l1->has_pieces = l1->has_globals = 0;
}

void l1_create(struct tlb_l1 *l1)
{
	for (uint32_t i = 0; i < L1_HINTS; i++)
		l1->hint[i] = l1->hot[0];
}

/* Change the life of the root page, when a pCPU switches to another root; seldom called. */
void l1_change_life(struct tlb_l1 *l1, uint32_t life)
{
	uint32_t change = l1->life ^ life;

	for (uint32_t set = 0; set < L1_SETS; set++)
		for (uint32_t way = 0; way < L1_WAYS; way++)
			for (uint32_t type = 0; type < ACCESS_TYPES; type++)
				l1->hot[set][way].right[type] ^= change;
	l1->life = life;
}

static void drop_pieces(struct tlb_l1 *l1, uint64_t page)
{
	l1->has_pieces = 0;
	for (uint32_t set = 0; set < L1_SETS; set++)
		for (uint32_t way = 0; way < L1_WAYS; way++) {
			struct tlb_hot *hot = &l1->hot[set][way];

			if (!hot->key || !hot->span)
				continue;
			if (((hot->key & PAGE_NUMBER_MASK) ^ page) >> hot->span)
				l1->has_pieces = 1;
			else
				empty(l1, hot);
		}
}

void l1_drop(struct tlb_l1 *l1, uint64_t page)
{
	struct tlb_hot *hot = l1->hot[page % L1_SETS];

	for (uint32_t way = 0; way < L1_WAYS; way++)
		if ((hot[way].key & PAGE_NUMBER_MASK) == page)
			empty(l1, &hot[way]);
	if (l1->has_pieces)
		drop_pieces(l1, page);
}

void l1_put_special(const struct tlb_l1 *l1, struct tlb_hot *hot, const struct tlb_entry *entry)
{
	if (entry->fractured)
		hot->span = 9 * (entry->fractured - 1u);
	for (uint32_t type = 0; entry->supervisor && type < ACCESS_TYPES; type++)
		hot->right[type] = RIGHT_NONE ^ l1->life;
}

void l1_fill(struct tlb_l1 *l1, const struct tlb_entry *entry, uint64_t page)
{
	uint64_t key = l1->context_bits | page;
	struct tlb_hot *hot = l1->hot[page % L1_SETS], *place = l1_victim(l1, page);

#pragma GCC unroll 4
	for (uint32_t way = 0; way < L1_WAYS; way++)
		if (hot[way].key == key)
			place = &hot[way];
	l1_put(l1, place, entry, entry->size, page);
}

void l1_update_right(struct tlb_l1 *l1, uint64_t key, uint32_t hfn, uint32_t type, uint32_t right)
{
	struct tlb_hot *hot = l1->hot[key % L1_SETS];

	for (uint32_t way = 0; way < L1_WAYS; way++)
		if (hot[way].key == key && hot[way].hfn == hfn)
			hot[way].right[type] = right ^ l1->life;
}
