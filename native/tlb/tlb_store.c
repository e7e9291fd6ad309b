/* The storage of cached mappings: cells found by id.
 *
 * Bounded: sets of `ways` cells.  Dead cells are replaced before live ones; within each group, cells without a
 * recent use go first.  One bit per cell records recent use, as in hardware, because a full order would cost
 * too much.  Unbounded: open addressing that doubles; a cell is never emptied, since an id keeps its one slot
 * for its next mapping.
 */
#include "tlb/tlb_store.h"

#include <string.h>

#include "core/heap.h"
#include "core/machine_types.h"

enum { FIRST_CELLS = 64, WAYS_MAX = 64 };

static uint64_t mix(uint64_t x)
{
	x ^= x >> 33;
	x *= UINT64_C(0xff51afd7ed558ccd);
	x ^= x >> 33;
	x *= UINT64_C(0xc4ceb9fe1a85ec53);
	return x ^ x >> 33;
}

/* On a cache line of its own, so that a set's cells span no more lines than necessary. */
static void *array(const struct store *s, size_t n, size_t size)
{
	return heap_zalloc_lines(s->heap, n, size);
}

static bool create_sets(struct store *s, uint32_t entries, uint32_t ways, bool few)
{
	ways = ways && ways <= entries ? ways : entries;
	s->ways = ways < WAYS_MAX ? (uint8_t)ways : WAYS_MAX;
	s->way_bits = (uint8_t)__builtin_ctz(few ? FEW_WAYS : TAGGED_WAYS);
	while (1u << s->way_bits < s->ways)
		s->way_bits++;
	s->sets = entries / s->ways;
	s->set_mask = s->sets & (s->sets - 1) ? 0 : s->sets - 1;
	s->set_bits = (uint8_t)__builtin_ctz(s->sets);
	s->cell_count = s->slots = s->sets << s->way_bits;
	s->tags = array(s, s->cell_count, sizeof(*s->tags));
	s->set = array(s, s->sets, sizeof(*s->set));
	s->deaths = 1; /* no set is clean */
	s->beyond = UINT64_MAX << (s->ways - 1) << 1;
	for (uint32_t i = 0; s->set && i < s->sets; i++)
		s->set[i].recent = s->beyond;
	return s->tags && s->set;
}

static bool create_table(struct store *s)
{
	s->cell_count = s->slots = FIRST_CELLS;
	s->slot = array(s, s->cell_count, sizeof(*s->slot));
	return s->slot;
}

int store_create(struct store *s, struct heap *heap, uint32_t entries, uint32_t ways, bool few, size_t payload_size,
		 const uint16_t *generation)
{
	s->heap = heap;
	s->generation = generation;
	s->payload_size = (uint32_t)payload_size;
	if (!(entries ? create_sets(s, entries, ways, few) : create_table(s)))
		return MACHINE_NOMEM;
	s->key = array(s, s->cell_count, sizeof(*s->key));
	s->payload = array(s, s->slots, payload_size);
	return s->key && s->payload ? 0 : MACHINE_NOMEM;
}

void store_destroy(struct store *s)
{
	heap_free(s->heap, s->key);
	heap_free(s->heap, s->tags);
	heap_free(s->heap, s->set);
	heap_free(s->heap, s->slot);
	heap_free(s->heap, s->payload);
}

/* Return the cell that holds the id, or the empty one where it belongs. */
static uint32_t place_of(const struct store *s, uint64_t id)
{
	uint32_t mask = s->cell_count - 1;
	uint32_t i = mix(id) & mask;

	while (s->key[i] && key_id(s->key[i]) != id)
		i = (i + 1) & mask;
	return i;
}

uint32_t store_probe(const struct store *s, uint64_t id)
{
	uint32_t cell = place_of(s, id);

	return s->key[cell] ? cell : NO_CELL;
}

/* Choose empty before dead before live, unused before used.  Records if all cells are live. */
uint32_t store_least_valuable(struct store *s, uint32_t set)
{
	uint32_t first = set << s->way_bits, victim = first, victim_rank = 0;

	for (uint32_t way = 0; way < s->ways; way++) {
		uint32_t rank = 1 + !(s->set[set].recent >> way & 1);

		if (!s->key[first + way])
			rank |= 8;
		else if (!cell_live(s, first + way))
			rank |= 4;
		if (rank > victim_rank) {
			victim = first + way;
			victim_rank = rank;
		}
	}
	if (victim_rank < 4)
		s->set[set].clean = s->deaths;
	return victim;
}

static int grow_cells(struct store *s)
{
	struct store old = *s;

	if (old.cell_count > UINT32_MAX / 4)
		return MACHINE_NOMEM;
	s->cell_count *= 2;
	s->key = array(s, s->cell_count, sizeof(*s->key));
	s->slot = array(s, s->cell_count, sizeof(*s->slot));
	if (!s->key || !s->slot) {
		heap_free(s->heap, s->key);
		heap_free(s->heap, s->slot);
		*s = old;
		return MACHINE_NOMEM;
	}
	for (uint32_t i = 0; i < old.cell_count; i++) {
		uint32_t cell;

		if (!old.key[i])
			continue;
		cell = place_of(s, key_id(old.key[i]));
		s->key[cell] = old.key[i];
		s->slot[cell] = old.slot[i];
	}
	heap_free(s->heap, old.key);
	heap_free(s->heap, old.slot);
	return 0;
}

static int grow_payload(struct store *s)
{
	void *payload = array(s, (size_t)s->slots * 2, s->payload_size);

	if (!payload)
		return MACHINE_NOMEM;
	memcpy(payload, s->payload, (size_t)s->slots * s->payload_size);
	heap_free(s->heap, s->payload);
	s->payload = payload;
	s->slots *= 2;
	return 0;
}

uint32_t store_extend(struct store *s, uint64_t id)
{
	uint32_t cell = place_of(s, id);

	if (s->key[cell])
		return cell;
	if (s->used == s->slots && grow_payload(s))
		return NO_CELL;
	if (s->used >= s->cell_count / 4 * 3) {
		if (grow_cells(s))
			return NO_CELL;
		cell = place_of(s, id);
	}
	s->slot[cell] = s->used++;
	return cell;
}

void store_purge(struct store *s, uint32_t context)
{
	s->deaths++;
	for (uint32_t i = 0; i < s->cell_count; i++)
		if (s->key[i] && key_context(s->key[i]) == context)
			s->key[i] &= ~(uint64_t)GENERATION_MAX;
}
