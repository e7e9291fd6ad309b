/* Where cached mappings lie: cells found by id.
 *
 * Bounded: sets of `ways` cells, least recently used goes first, dead cells before live ones.  The set
 * comes from the page bits of the mapping's size, displaced by a hash of its context, so that equal pages
 * of many contexts spread.  Unbounded: open addressing that doubles; a cell is never emptied, since an id
 * keeps its one slot for its next mapping.
 */
#include <stdlib.h>
#include <string.h>

#include "tlb_internal.h"

enum { FIRST_CELLS = 1024 };

static uint64_t mix(uint64_t x)
{
	x ^= x >> 33;
	x *= UINT64_C(0xff51afd7ed558ccd);
	x ^= x >> 33;
	x *= UINT64_C(0xc4ceb9fe1a85ec53);
	return x ^ x >> 33;
}

static uint32_t set_of(const struct store *s, uint64_t id)
{
	uint64_t page = id >> CONTEXT_BITS & PAGE_NUMBER_MASK;
	uint32_t size = id >> (PAGE_BITS + CONTEXT_BITS);
	uint64_t position = (page >> s->shift[size]) + mix(id & (CONTEXTS - 1)) + size;

	if (!(s->sets & (s->sets - 1)))
		return position & (s->sets - 1);
	return position % s->sets;
}

int store_create(struct store *s, uint32_t entries, uint32_t ways, size_t payload_size,
		 const uint16_t *generation)
{
	s->generation = generation;
	s->payload_size = payload_size;
	if (entries) {
		s->ways = ways && ways <= entries ? ways : entries;
		s->sets = entries / s->ways;
		s->slots = s->cell_count = s->sets * s->ways;
	} else {
		s->cell_count = FIRST_CELLS;
		s->slots = FIRST_CELLS;
	}
	s->cells = calloc(s->cell_count, sizeof(*s->cells));
	s->payload = calloc(s->slots, payload_size);
	if (!s->cells || !s->payload)
		return MACHINE_NOMEM;
	if (entries)
		for (uint32_t i = 0; i < s->cell_count; i++)
			s->cells[i].slot = i;
	return 0;
}

void store_destroy(struct store *s)
{
	free(s->cells);
	free(s->payload);
}

static struct cell *find_in_set(const struct store *s, uint64_t id)
{
	struct cell *cell = &s->cells[set_of(s, id) * s->ways];

	for (uint32_t way = 0; way < s->ways; way++, cell++)
		if (cell->key && key_id(cell->key) == id)
			return cell;
	return NULL;
}

/* The cell that holds the id, or the empty one where it belongs. */
static struct cell *probe(const struct store *s, uint64_t id)
{
	uint32_t mask = s->cell_count - 1;
	uint32_t i = mix(id) & mask;

	while (s->cells[i].key && key_id(s->cells[i].key) != id)
		i = (i + 1) & mask;
	return &s->cells[i];
}

struct cell *store_find(const struct store *s, uint64_t id)
{
	struct cell *cell;

	if (s->ways)
		return find_in_set(s, id);
	cell = probe(s, id);
	return cell->key ? cell : NULL;
}

static struct cell *claim_in_set(struct store *s, uint64_t id)
{
	struct cell *cell = &s->cells[set_of(s, id) * s->ways];
	struct cell *victim = NULL;
	uint64_t victim_rank = 0;

	for (uint32_t way = 0; way < s->ways; way++, cell++) {
		/* empty before dead before live; the longer unused the sooner */
		uint64_t rank = (uint32_t)(s->clock - cell->stamp);

		if (cell->key && key_id(cell->key) == id)
			return cell;
		if (!cell->key)
			rank |= UINT64_C(2) << 32;
		else if (!cell_live(s, cell))
			rank |= UINT64_C(1) << 32;
		if (!victim || rank > victim_rank) {
			victim = cell;
			victim_rank = rank;
		}
	}
	return victim;
}

static int grow_cells(struct store *s)
{
	struct cell *old = s->cells;
	uint32_t count = s->cell_count;

	if (count > UINT32_MAX / 2)
		return MACHINE_NOMEM;
	s->cells = calloc((size_t)count * 2, sizeof(*s->cells));
	if (!s->cells) {
		s->cells = old;
		return MACHINE_NOMEM;
	}
	s->cell_count = count * 2;
	for (uint32_t i = 0; i < count; i++)
		if (old[i].key)
			*probe(s, key_id(old[i].key)) = old[i];
	free(old);
	return 0;
}

static int grow_payload(struct store *s)
{
	uint8_t *payload = realloc(s->payload, (size_t)s->slots * 2 * s->payload_size);

	if (!payload)
		return MACHINE_NOMEM;
	memset(payload + (size_t)s->slots * s->payload_size, 0, (size_t)s->slots * s->payload_size);
	s->payload = payload;
	s->slots *= 2;
	return 0;
}

struct cell *store_claim(struct store *s, uint64_t id)
{
	struct cell *cell;

	if (s->ways)
		return claim_in_set(s, id);
	cell = probe(s, id);
	if (cell->key)
		return cell;
	if (s->used == s->slots && grow_payload(s))
		return NULL;
	if (s->used >= s->cell_count / 4 * 3) {
		if (grow_cells(s))
			return NULL;
		cell = probe(s, id);
	}
	cell->slot = s->used++;
	return cell;
}

void store_purge(struct store *s, uint32_t context)
{
	for (uint32_t i = 0; i < s->cell_count; i++)
		if (s->cells[i].key && key_context(s->cells[i].key) == context)
			s->cells[i].key &= ~(uint64_t)GENERATION_MAX;
}
