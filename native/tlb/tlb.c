/* The TLB's two levels: look-up, fill, and the helpers of both.  See tlb.h for the model. */
#include "tlb/tlb.h"

#include <string.h>

#include "core/heap.h"
#include "core/machine_types.h"
#include "tlb/psc.h"
#include "tlb/tlb_account.h"
#include "tlb/tlb_address.h"
#include "tlb/tlb_context.h"
#include "tlb/tlb_l1.h"
#include "tlb/tlb_store.h"
#include "tlb/tlb_types.h"

struct tlb *tlb_create_in(struct heap *heap, const struct machine_config *config)
{
	struct tlb *t = heap_zalloc_lines(heap, 1, sizeof(*t));

	if (!t)
		return NULL;
	t->heap = heap;
	t->vms = config->vms;
	t->dropped_by_vm = heap_zalloc(heap, t->vms + 1, sizeof(uint64_t));
	t->dropped_epoch = heap_zalloc(heap, t->vms + 1, sizeof(uint64_t));
	if (!t->dropped_by_vm || !t->dropped_epoch ||
	    store_create(&t->l2, heap, config->l2_entries, config->l2_ways, false, sizeof(struct slot), t->generation) ||
	    psc_create(t, config)) {
		tlb_destroy(t);
		return NULL;
	}
	t->epoch = 1;
	contexts_init(t);
	l1_create(&t->l1);
	l1_retag(t);
	return t;
}

struct tlb *tlb_create(const struct machine_config *config)
{
	return tlb_create_in(NULL, config);
}

void tlb_destroy(struct tlb *t)
{
	if (!t)
		return;
	store_destroy(&t->l2);
	psc_destroy(t);
	heap_free(t->heap, t->dropped_by_vm);
	heap_free(t->heap, t->dropped_epoch);
	heap_free(t->heap, t);
}

static uint64_t l1_key(const struct tlb *t, uint32_t index, uint64_t page)
{
	uint64_t bits = (uint64_t)index << GENERATION_BITS | t->generation[index];

	return bits << L1_CONTEXT_SHIFT | page;
}

void l1_retag(struct tlb *t)
{
	t->l1.context_bits = l1_key(t, t->serves, 0);
}

static void serve(struct tlb *t, uint32_t kind, uint32_t index)
{
	t->kind = kind;
	t->serves = index;
	l1_retag(t);
}

void tlb_switch(struct tlb *t, uint32_t vpid, uint32_t pcid, uint32_t ep4ta, int ept)
{
	uint32_t kind = ept ? KIND_COMBINED : KIND_LINEAR;

	ep4ta = ept ? ep4ta : 0;
	t->vpid = vpid;
	t->pcid = pcid;
	/* The existing context first: making the others must not recycle it. */
	t->global = context_find(t, kind, vpid, PCID_GLOBAL, ep4ta);
	t->physical = ept ? context_get(t, KIND_GUEST_PHYSICAL, 0, 0, ep4ta) : NO_CONTEXT;
	t->paged = context_get(t, kind, vpid, pcid, ep4ta);
	serve(t, kind, t->paged);
}

void tlb_switch_physical(struct tlb *t, uint32_t vpid, uint32_t ep4ta)
{
	t->vpid = vpid;
	t->pcid = 0;
	t->global = t->paged = NO_CONTEXT;
	t->physical = context_get(t, KIND_GUEST_PHYSICAL, 0, 0, ep4ta);
	serve(t, KIND_GUEST_PHYSICAL, t->physical);
}

/* Of two ghosts, the one filled last would have been hit. */
static __attribute__((noinline)) void consider_ghost(struct tlb *t, uint32_t cell)
{
	struct slot *slot = slot_of(t, cell);
	uint64_t key = t->l2.key[cell];
	uint32_t index = key_context(key);
	uint32_t lived = t->generation[index] - slot->born;

	if (!slot->born || slot->born < t->contexts[index].birth)
		return;
	if (t->ghost && t->ghost->filled > slot->filled)
		return;
	t->ghost = slot;
	if (!(key & GENERATION_MAX))
		t->ghost_flush = slot->flush;
	else if (lived <= FLUSH_HISTORY)
		t->ghost_flush = t->contexts[index].flush[slot->born % FLUSH_HISTORY];
	else
		t->ghost_flush = 0;
}

static inline __attribute__((always_inline)) struct slot *find_size(struct tlb *t, uint32_t index, uint32_t size,
								     uint64_t page)
{
	uint32_t shift = 9 * size;
	uint64_t id = mapping_id(size, page >> shift << shift, index);
	uint32_t cell = store_find(&t->l2, id, shift, false);

	if (cell == NO_CELL) {
		if (size == PAGE_4K)
			*absent_of(t, index) = id;
		return NULL;
	}
	if (__builtin_expect((t->l2.key[cell] & GENERATION_MAX) == t->generation[index], 1)) {
		store_touch(&t->l2, cell);
		return slot_of(t, cell);
	}
	consider_ghost(t, cell);
	return NULL;
}

static __attribute__((noinline)) struct slot *find_large(struct tlb *t, uint32_t index, uint64_t page)
{
	struct slot *slot = NULL;

	for (uint32_t size = PAGE_2M; !slot && size <= PAGE_1G; size++)
		if (t->contexts[index].slots[size])
			slot = find_size(t, index, size, page);
	return slot;
}

/* Return the live translation of a page in a context, or NULL; ghosts on the way are considered. */
static inline __attribute__((always_inline)) struct slot *find_in_context(struct tlb *t, uint32_t index, uint64_t page)
{
	const uint32_t *slots = t->contexts[index].slots;
	struct slot *slot = NULL;

	if (slots[PAGE_4K])
		slot = find_size(t, index, PAGE_4K, page);
	if (!slot && (slots[PAGE_2M] | slots[PAGE_1G]))
		slot = find_large(t, index, page);
	return slot;
}

static __attribute__((noinline)) struct slot *find_global(struct tlb *t, uint64_t page)
{
	return find_in_context(t, t->global, page);
}

/* Return the live translation for accesses of a kind, or NULL; then t->ghost is the best ghost, if any. */
static inline struct slot *find(struct tlb *t, uint32_t kind, uint64_t page)
{
	struct slot *slot;

	t->ghost = NULL;
	t->ghost_flush = 0;
	slot = find_in_context(t, kind == KIND_GUEST_PHYSICAL ? t->physical : t->paged, page);
	if (!slot && kind != KIND_GUEST_PHYSICAL && t->global != NO_CONTEXT)
		slot = find_global(t, page);
	if (slot)
		t->ghost = NULL;
	return slot;
}

int tlb_lookup(struct tlb *t, uint32_t kind, uint64_t page, struct tlb_entry *entry)
{
	const struct slot *slot = find(t, kind, page & PAGE_NUMBER_MASK);

	if (!slot && !t->ghost)
		return 0;
	*entry = slot ? slot->entry : t->ghost->entry;
	return slot ? 1 : 2;
}

int tlb_refill_l1(struct tlb *t, uint64_t page, struct tlb_entry *entry)
{
	int result = tlb_lookup(t, t->kind, page, entry);

	if (result == 1)
		l1_fill(&t->l1, entry, page & PAGE_NUMBER_MASK);
	return result;
}

/* find() for the most frequent result of a first-level miss: a live 4 KiB translation of the context in use, in a
 * second level of up to sixteen ways.  It omits the steps for other cases.  *absent: no cell has the page, not
 * even a dead one. */
static inline const struct tlb_entry *find_fast(struct tlb *t, uint64_t page, bool *absent)
{
	uint64_t key = page << (CONTEXT_BITS + GENERATION_BITS) | t->l1.context_bits >> L1_CONTEXT_SHIFT;
	const struct store *s = &t->l2;
	struct position at;
	uint32_t equal;

	*absent = false;
	if (__builtin_expect(s->way_bits != TAGGED_WAY_BITS, 0))
		return NULL;
	at = position_of(s, key_id(key), 0);
	for (equal = bytes_equal(&s->tags[at.set * TAGGED_WAYS], at.tag); equal; equal &= equal - 1) {
		uint32_t way = (uint32_t)__builtin_ctz(equal), cell = at.set * TAGGED_WAYS + way;

		if (s->key[cell] == key) {
			set_touch(s, &s->set[at.set], way);
			return &((const struct slot *)s->payload)[cell].entry;
		}
		if (key_id(s->key[cell]) == key_id(key))
			return NULL;
	}
	*absent = true;
	return NULL;
}

/* Find and promote in all other cases. */
static __attribute__((noinline)) struct tlb_hot *promote(struct tlb *t, uint64_t page, bool absent)
{
	const uint32_t *slots = t->contexts[t->serves].slots;
	const struct slot *slot;
	struct tlb_hot *hot;

	if (absent && !(slots[PAGE_2M] | slots[PAGE_1G]) && t->global == NO_CONTEXT) {
		t->ghost = NULL;
		*absent_of(t, t->serves) = mapping_id(PAGE_4K, page, t->serves);
		return NULL;
	}
	slot = find(t, t->kind, page);
	if (!slot)
		return NULL;
	hot = l1_victim(&t->l1, page);
	l1_put(&t->l1, hot, &slot->entry, slot->entry.size, page);
	return hot;
}

struct tlb_hot *tlb_l1_miss(struct tlb *t, uint64_t page)
{
	struct tlb_hot *hot = l1_search(&t->l1, page);
	const struct tlb_entry *entry;
	bool absent;

	if (__builtin_expect(hot != NULL, 0))
		return hot;
	t->l1_misses++;
	entry = find_fast(t, page, &absent);
	if (__builtin_expect(!entry, 0))
		return promote(t, page, absent);
	hot = l1_victim(&t->l1, page);
	l1_put(&t->l1, hot, entry, PAGE_4K, page);
	return hot;
}

/* Return the context that an entry being filled belongs to. */
static uint32_t context_for(struct tlb *t, const struct tlb_entry *entry)
{
	if (entry->kind == KIND_GUEST_PHYSICAL)
		return t->physical;
	if (!entry->global || t->paged == NO_CONTEXT)
		return t->paged;
	if (t->global == NO_CONTEXT)
		t->global = context_get(t, t->kind, t->vpid, PCID_GLOBAL, t->contexts[t->paged].ep4ta);
	return t->global;
}

static void l2_fill(struct tlb *t, uint32_t index, const struct tlb_entry *entry, uint64_t page)
{
	uint64_t id = mapping_id(entry->size, page, index), key = id << GENERATION_BITS | t->generation[index];
	bool physical = entry->kind == KIND_GUEST_PHYSICAL;
	uint32_t cell = store_claim(&t->l2, id, 9 * entry->size, false, *absent_of(t, index) == id);
	struct slot *slot;

	if (cell == NO_CELL) /* out of memory: as if evicted at once */
		return;
	*absent_of(t, index) = 0;
	slot = slot_of(t, cell);
	account_replace(t, cell, key, entry);
	t->l2.key[cell] = key;
	/* A guest-physical mapping is not looked up while a combined one exists, so it counts as unused. */
	if (entry->kind == t->kind)
		store_touch(&t->l2, cell);
	slot->entry = *entry;
	if (entry->size != PAGE_4K)
		entry_leave_all_unjudged(&slot->entry);
	slot->entry.page = page;
	slot->entry.vpid = physical ? 0 : (uint16_t)t->vpid;
	slot->entry.pcid = physical ? 0 : (uint16_t)t->pcid;
	slot->entry.ep4ta = t->contexts[index].ep4ta;
	slot->filled = ++t->fills;
	slot->born = t->generation[index];
	t->contexts[index].filled = true;
	context_list(t, index);
}

void tlb_insert(struct tlb *t, const struct tlb_entry *entry, uint64_t page)
{
	uint32_t index = context_for(t, entry), shift = 9 * entry->size;

	t->ghost = NULL;
	if (index == NO_CONTEXT)
		return;
	page &= PAGE_NUMBER_MASK;
	l2_fill(t, index, entry, page >> shift << shift);
	if (entry->kind == t->kind)
		l1_fill(&t->l1, entry, page);
}

void tlb_update_right(struct tlb *t, uint32_t kind, uint64_t page, uint32_t type, uint32_t right)
{
	uint32_t index = kind == KIND_GUEST_PHYSICAL ? t->physical : t->paged;
	struct tlb_entry *entry;
	struct slot *slot;

	page &= PAGE_NUMBER_MASK;
	slot = find(t, kind, page);
	if (!slot)
		return;
	entry = &slot->entry;
	if (entry->size == PAGE_4K)
		entry->right[type] = right;
	if (entry->supervisor)
		return;
	/* guest-physical translations may be left from when paging was off */
	l1_update_right(&t->l1, l1_key(t, index, page), entry->hfn + (uint32_t)(page - entry->page), type,
			right);
}

void tlb_drop(struct tlb *t, uint32_t kind, uint64_t page)
{
	uint64_t flush = t->flush;

	t->flush = 0;
	page &= PAGE_NUMBER_MASK;
	if (kind == KIND_GUEST_PHYSICAL) {
		context_drop_page(t, t->physical, page);
	} else {
		context_drop_page(t, t->paged, page);
		context_drop_page(t, t->global, page);
	}
	l1_drop(&t->l1, page);
	t->flush = flush;
}
