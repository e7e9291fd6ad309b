/* Dropping one page of one context.
 *
 * A guest page may be cached in several pieces (SDM vol. 3A 4.10.2.3: the processor may use smaller pages than
 * the paging structures do; it must if EPT maps the page in smaller ones).  INVLPG and page faults drop all of
 * them (4.10.4.1).  The pieces are found by probing for each possible one, at most 512 in most cases, and only
 * if the counting filter tells that there may be any: the cost does not grow with the TLB.
 */
#include "tlb/tlb_address.h"

#include "core/machine_types.h"
#include "tlb/tlb.h"
#include "tlb/tlb_account.h"
#include "tlb/tlb_store.h"
#include "tlb/tlb_types.h"

static uint64_t align_page(uint64_t page, uint32_t size)
{
	return page >> 9 * size << 9 * size;
}

void context_drop_page(struct tlb *t, uint32_t index, uint64_t page)
{
	for (uint32_t size = PAGE_4K; size <= PAGE_1G; size++) {
		uint32_t cell;

		if (!t->contexts[index].slots[size])
			continue;
		cell = store_find(&t->l2, mapping_id(size, align_page(page, size), index), 9 * size, false);
		if (cell != NO_CELL && cell_live(&t->l2, cell))
			cell_kill(t, cell);
	}
}

/* By a scan, because a range may have more pages than the TLB has cells. */
void context_drop_range(struct tlb *t, uint32_t index, uint64_t page, uint64_t pages)
{
	for (uint32_t cell = 0; cell < t->l2.cell_count; cell++) {
		uint64_t key = t->l2.key[cell], first;

		if (!key || key_context(key) != index || !cell_live(&t->l2, cell))
			continue;
		first = key_page(key);
		if (first < page + pages && page < first + (UINT64_C(1) << 9 * key_size(key)))
			cell_kill(t, cell);
	}
}

static void kill_if_piece(struct tlb *t, uint32_t cell, uint32_t guest)
{
	const struct slot *slot;

	if (cell == NO_CELL || !cell_live(&t->l2, cell))
		return;
	slot = slot_of(t, cell);
	if (slot->entry.fractured == guest + 1)
		cell_kill(t, cell);
}

static void probe_pieces(struct tlb *t, uint32_t index, uint64_t first, uint32_t piece, uint32_t guest)
{
	uint64_t step = UINT64_C(1) << 9 * piece;
	uint64_t end = first + (UINT64_C(1) << 9 * guest);

	for (uint64_t page = first; page < end; page += step)
		kill_if_piece(t, store_find(&t->l2, mapping_id(piece, page, index), 9 * piece, false), guest);
}

static void scan_pieces(struct tlb *t, uint32_t index, uint64_t first, uint32_t piece, uint32_t guest)
{
	for (uint32_t cell = 0; cell < t->l2.cell_count; cell++) {
		uint64_t key = t->l2.key[cell];

		if (key && key_context(key) == index && key_size(key) == piece &&
		    align_page(key_page(key), guest) == first)
			kill_if_piece(t, cell, guest);
	}
}

static void drop_pieces(struct tlb *t, uint32_t index, uint64_t page, uint32_t piece, uint32_t guest)
{
	uint64_t first = align_page(page, guest);

	if (!*piece_bucket(t, index, page, piece, guest))
		return;
	/* A 1G page in 4K pieces has 262144 possible ones: there a smaller TLB is scanned instead. */
	if (t->l2.cell_count < 1u << 9 * (guest - piece))
		scan_pieces(t, index, first, piece, guest);
	else
		probe_pieces(t, index, first, piece, guest);
}

void context_drop_pieces(struct tlb *t, uint32_t index, uint64_t page)
{
	context_drop_page(t, index, page);
	drop_pieces(t, index, page, PAGE_4K, PAGE_2M);
	drop_pieces(t, index, page, PAGE_2M, PAGE_1G);
	drop_pieces(t, index, page, PAGE_4K, PAGE_1G);
}
