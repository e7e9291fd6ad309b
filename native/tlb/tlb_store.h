/* The storage of cached mappings: cells found by id, set-associative or, if unbounded, in a growing hash table.
 *
 * Key of a cached mapping: size(2) | page(36) | context(11) | generation(15).  The key without the generation
 * is an *id*: an id has at most one slot, which holds its live mapping or its ghost.  Context 0 is never used
 * and no generation is 0, so key 0 is an empty cell and generation 0 a mapping that was dropped singly.
 *
 * A cell is a number; fields that are read together lie together.  Inline, because every miss of the first
 * level comes here.
 */
#ifndef FLUSHLAB_TLB_STORE_H
#define FLUSHLAB_TLB_STORE_H

#include <stddef.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "core/machine_types.h"

enum {
	GENERATION_BITS = 15,
	GENERATION_MAX = (1 << GENERATION_BITS) - 1,
	CONTEXT_BITS = 11,
	CONTEXTS = 1 << CONTEXT_BITS,
	PAGE_BITS = 36,
	NO_CONTEXT = 0,
	FEW_WAYS = 4,     /* sets compared key by key, */
	TAGGED_WAY_BITS = 4,
	TAGGED_WAYS = 1 << TAGGED_WAY_BITS, /* or by tags, sixteen at a time */
};

#define PAGE_NUMBER_MASK ((UINT64_C(1) << PAGE_BITS) - 1)
#define NO_CELL UINT32_MAX

struct set {
	uint64_t recent; /* a bit for each used way; once all are set, only the last one stays; plus `beyond` */
	uint32_t clean;  /* `deaths` when all of its cells were last found live */
};

struct store {
	uint64_t *key;   /* by cell; 0: empty */
	uint8_t *tags;   /* by cell: a byte of its id (unused if FEW_WAYS) */
	struct set *set; /* bounded */
	uint32_t *slot;  /* unbounded: the slot of a cell's payload; bounded: NULL, the slot is the cell's number */
	void *payload;
	uint32_t payload_size;
	uint32_t deaths;   /* counts the events that made live cells dead */
	uint32_t sets;
	uint32_t set_mask; /* sets - 1 if sets is a power of two, else 0 */
	uint8_t set_bits;
	uint8_t ways;      /* 0: unbounded */
	uint8_t way_bits;  /* log2 of the cells from one set to the next: FEW_WAYS, or from TAGGED_WAYS on */
	uint64_t beyond;   /* the bits from `ways` on */
	uint32_t cell_count;
	uint32_t used;   /* unbounded: cells in use, and next free slot */
	uint32_t slots;  /* payloads allocated */
	const uint16_t *generation; /* by context: the generation of live keys */
	struct heap *heap;
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

static inline bool cell_live(const struct store *s, uint32_t cell)
{
	uint64_t key = s->key[cell];

	return key && (key & GENERATION_MAX) == s->generation[key_context(key)];
}

/* Return the slot of the cell's payload. */
static inline size_t cell_slot(const struct store *s, uint32_t cell)
{
	return s->slot ? s->slot[cell] : cell;
}

/* Make a single cell's mapping dead. */
static inline void cell_mark_dead(struct store *s, uint32_t cell)
{
	s->key[cell] &= ~(uint64_t)GENERATION_MAX;
	s->deaths++;
}

/* few: compiled for stores of FEW_WAYS at most. */
int store_create(struct store *s, struct heap *heap, uint32_t entries, uint32_t ways, bool few, size_t payload_size,
		 const uint16_t *generation);
void store_destroy(struct store *s);
/* Make every mapping of a context dead, by a scan. */
void store_purge(struct store *s, uint32_t context);
/* Unbounded stores: find and claim. */
uint32_t store_probe(const struct store *s, uint64_t id);
uint32_t store_extend(struct store *s, uint64_t id);
/* In a bounded store's set that has dead or empty cells: return the cell to replace. */
uint32_t store_least_valuable(struct store *s, uint32_t set);

/* The position of an id in a bounded store: a set, and a byte that distinguishes it from most other ids there.
 * Computed from the page bits that matter to a mapping of 2^shift pages, displaced by a hash of its context, so
 * that equal pages of many contexts spread. */
struct position {
	uint32_t set;
	uint8_t tag;
};

static inline struct position position_of(const struct store *s, uint64_t id, uint32_t shift)
{
	uint32_t at = (uint32_t)(id >> (CONTEXT_BITS + shift)) +
		      (((uint32_t)id & (CONTEXTS - 1)) * 0x9e3779b1u >> 16);

	if (__builtin_expect(!s->set_mask, 0))
		return (struct position){ at % s->sets, (uint8_t)(at / s->sets) };
	return (struct position){ at & s->set_mask, (uint8_t)(at >> s->set_bits) };
}

static inline uint32_t find_among_few(const struct store *s, uint32_t set, uint64_t id)
{
	const uint64_t *key = &s->key[set * FEW_WAYS];
	/* A branch for each way would be hard to predict. */
	uint32_t way = (uint32_t)(key_id(key[1]) == id) + 2u * (key_id(key[2]) == id) + 3u * (key_id(key[3]) == id);

	return key_id(key[way]) == id ? set * FEW_WAYS + way : NO_CELL;
}

/* Compare sixteen bytes with the tag: a bit for each equal one. */
static inline uint32_t bytes_equal(const uint8_t *tags, uint8_t tag)
{
#ifdef __SSE2__
	__m128i wanted = _mm_set1_epi64x((int64_t)(tag * UINT64_C(0x0101010101010101)));

	return (uint32_t)_mm_movemask_epi8(_mm_cmpeq_epi8(*(const __m128i *)(const void *)tags, wanted));
#else
	uint32_t equal = 0;

	for (uint32_t i = 0; i < TAGGED_WAYS; i++)
		equal |= (uint32_t)(tags[i] == tag) << i;
	return equal;
#endif
}

/* Search the sixteen cells from `first` on.  The tags rule out nearly all others at once, without a branch that
 * would be hard to predict. */
static inline uint32_t find_by_tag(const struct store *s, uint32_t first, uint8_t tag, uint64_t id)
{
	uint32_t equal = bytes_equal(&s->tags[first], tag);

	for (; equal; equal &= equal - 1) {
		uint32_t cell = first + (uint32_t)__builtin_ctz(equal);

		if (key_id(s->key[cell]) == id)
			return cell;
	}
	return NO_CELL;
}

static inline uint32_t find_in_set(const struct store *s, struct position at, uint64_t id)
{
	uint32_t cell = at.set << s->way_bits, end = cell + (1u << s->way_bits), found;

	do {
		found = find_by_tag(s, cell, at.tag, id);
		cell += TAGGED_WAYS;
	} while (__builtin_expect(found == NO_CELL && cell < end, 0));
	return found;
}

/* Return the cell of an id, live or not; NO_CELL: none.  shift: log2 of the pages that the mapping covers.
 * few: the store has FEW_WAYS.  Valid until the next store_claim. */
static inline __attribute__((always_inline)) uint32_t store_find(const struct store *s, uint64_t id, uint32_t shift,
								 bool few)
{
	struct position at;

	if (__builtin_expect(!s->ways, 0))
		return store_probe(s, id);
	at = position_of(s, id, shift);
	return few ? find_among_few(s, at.set, id) : find_in_set(s, at, id);
}

static inline void set_touch(const struct store *s, struct set *set, uint32_t way)
{
	uint64_t bit = UINT64_C(1) << way, recent = set->recent | bit;

	/* The bits beyond the last way are set from the start.  When no bit is left clear, only those and this
	 * one stay: a conditional move, because a branch would be hard to predict. */
	set->recent = recent == UINT64_MAX ? s->beyond | bit : recent;
}

/* Record a use of a cell. */
static inline void store_touch(struct store *s, uint32_t cell)
{
	if (__builtin_expect(s->ways != 0, 1))
		set_touch(s, &s->set[cell >> s->way_bits], cell & ((1u << s->way_bits) - 1));
}

/* Return the cell of a bounded store's set to be replaced. */
static inline uint32_t store_victim(struct store *s, uint32_t set, uint32_t way_bits)
{
	const struct set *in = &s->set[set];

	/* If nothing has died since all cells of the set were found live, none of them is dead. */
	if (__builtin_expect(in->clean == s->deaths, 1))
		return (set << way_bits) + (uint32_t)__builtin_ctzll(~in->recent | UINT64_C(1) << (s->ways - 1));
	return store_least_valuable(s, set);
}

/* Return a cell to put an id in: its own, an empty one, a dead one, or one not used recently.  The cell still
 * holds its old key and payload, for the caller to account for and overwrite.  absent: the caller knows that
 * the id has no cell.  NO_CELL: out of memory. */
static inline __attribute__((always_inline)) uint32_t store_claim(struct store *s, uint64_t id, uint32_t shift, bool few,
								  bool absent)
{
	struct position at;
	uint32_t cell;

	if (__builtin_expect(!s->ways, 0))
		return store_extend(s, id);
	at = position_of(s, id, shift);
	if (!absent) {
		cell = few ? find_among_few(s, at.set, id) : find_in_set(s, at, id);
		if (cell != NO_CELL)
			return cell;
	}
	cell = store_victim(s, at.set, s->way_bits);
	if (!few)
		s->tags[cell] = at.tag;
	return cell;
}

#endif
