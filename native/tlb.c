/* The TLB's two levels: look-up, fill, and what both share.  See tlb.h for the model. */
#include <stdlib.h>
#include <string.h>

#include "tlb_internal.h"

struct tlb *tlb_create(const struct machine_config *config)
{
	size_t size = (sizeof(struct tlb) + CACHELINE - 1) / CACHELINE * CACHELINE;
	struct tlb *t = aligned_alloc(CACHELINE, size);

	if (!t)
		return NULL;
	memset(t, 0, size);
	t->vms = config->vms;
	t->dropped_by_vm = calloc(t->vms + 1, sizeof(uint64_t));
	t->dropped_epoch = calloc(t->vms + 1, sizeof(uint64_t));
	if (!t->dropped_by_vm || !t->dropped_epoch ||
	    store_create(&t->l2, config->l2_entries, config->l2_ways, sizeof(struct slot), t->generation) ||
	    psc_create(t, config)) {
		tlb_destroy(t);
		return NULL;
	}
	for (uint32_t i = 0; i < 4; i++)
		t->l2.shift[i] = 9 * i;
	t->epoch = 1;
	contexts_init(t);
	l1_retag(t);
	return t;
}

void tlb_destroy(struct tlb *t)
{
	if (!t)
		return;
	store_destroy(&t->l2);
	psc_destroy(t);
	free(t->dropped_by_vm);
	free(t->dropped_epoch);
	free(t);
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
	/* The one that exists already first: making the others must not recycle it. */
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

/* Contexts that translate for accesses of a kind. */
static uint32_t contexts_of(const struct tlb *t, uint32_t kind, uint32_t index[2])
{
	if (kind == KIND_GUEST_PHYSICAL) {
		index[0] = t->physical;
		return 1;
	}
	index[0] = t->paged;
	index[1] = t->global;
	return 2;
}

static struct cell *find_size(struct tlb *t, uint32_t index, uint32_t size, uint64_t page)
{
	uint32_t shift = 9 * size;

	if (!t->contexts[index].slots[size])
		return NULL;
	return store_find(&t->l2, mapping_id(size, page >> shift << shift, index));
}

/* Of two ghosts the one used last is the one that would be hit. */
static void consider_ghost(struct tlb *t, const struct cell *cell, uint32_t *age)
{
	struct slot *slot = cell_payload(&t->l2, cell);
	uint32_t index = key_context(cell->key);
	uint32_t lived = t->generation[index] - slot->born;

	if (!slot->born || slot->born < t->contexts[index].birth)
		return;
	if (t->ghost && t->l2.clock - cell->stamp >= *age)
		return;
	*age = t->l2.clock - cell->stamp;
	t->ghost = slot;
	if (!(cell->key & GENERATION_MAX))
		t->ghost_flush = slot->flush;
	else if (lived <= FLUSH_HISTORY)
		t->ghost_flush = t->contexts[index].flush[slot->born % FLUSH_HISTORY];
	else
		t->ghost_flush = 0;
}

int tlb_lookup(struct tlb *t, uint32_t kind, uint64_t page, struct tlb_entry *entry)
{
	uint32_t index[2], n = contexts_of(t, kind, index), age = 0;

	page &= PAGE_NUMBER_MASK;
	t->ghost = NULL;
	t->ghost_flush = 0;
	for (uint32_t i = 0; i < n; i++)
		for (uint32_t size = PAGE_4K; size <= PAGE_1G; size++) {
			struct cell *cell = find_size(t, index[i], size, page);

			if (!cell)
				continue;
			if (!cell_live(&t->l2, cell)) {
				consider_ghost(t, cell, &age);
				continue;
			}
			cell->stamp = ++t->l2.clock;
			*entry = ((const struct slot *)cell_payload(&t->l2, cell))->entry;
			t->ghost = NULL;
			return 1;
		}
	if (!t->ghost)
		return 0;
	*entry = t->ghost->entry;
	return 2;
}

int tlb_refill_l1(struct tlb *t, uint64_t page, struct tlb_entry *entry)
{
	int result = tlb_lookup(t, t->kind, page, entry);

	if (result == 1)
		l1_fill(&t->l1, entry, page & PAGE_NUMBER_MASK);
	return result;
}

/* Context that an entry being filled belongs to. */
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

static void l2_fill(struct tlb *t, uint32_t index, const struct tlb_entry *entry)
{
	uint64_t id = mapping_id(entry->size, entry->page, index);
	struct cell *cell = store_claim(&t->l2, id);
	struct slot *slot;

	if (!cell) /* out of memory: as if evicted at once */
		return;
	account_evict(t, cell);
	cell->key = id << GENERATION_BITS | t->generation[index];
	cell->stamp = ++t->l2.clock;
	slot = cell_payload(&t->l2, cell);
	slot->entry = *entry;
	slot->born = t->generation[index];
	account_fill(t, cell->key, slot);
	t->contexts[index].filled = true;
	context_list(t, index);
}

void tlb_insert(struct tlb *t, const struct tlb_entry *entry, uint64_t page)
{
	uint32_t index = context_for(t, entry);
	uint32_t shift = 9 * entry->size;
	struct tlb_entry e = *entry;

	t->ghost = NULL;
	if (index == NO_CONTEXT)
		return;
	page &= PAGE_NUMBER_MASK;
	e.page = page >> shift << shift;
	e.vpid = e.kind == KIND_GUEST_PHYSICAL ? 0 : t->vpid;
	e.pcid = e.kind == KIND_GUEST_PHYSICAL ? 0 : t->pcid;
	e.ep4ta = t->contexts[index].ep4ta;
	l2_fill(t, index, &e);
	if (e.kind == t->kind)
		l1_fill(&t->l1, &e, page);
}

/* What tlb_lookup would return. */
static struct slot *first_live(struct tlb *t, uint32_t kind, uint64_t page)
{
	uint32_t index[2], n = contexts_of(t, kind, index);

	for (uint32_t i = 0; i < n; i++)
		for (uint32_t size = PAGE_4K; size <= PAGE_1G; size++) {
			struct cell *cell = find_size(t, index[i], size, page);

			if (cell && cell_live(&t->l2, cell))
				return cell_payload(&t->l2, cell);
		}
	return NULL;
}

void tlb_update_right(struct tlb *t, uint32_t kind, uint64_t page, uint32_t type, uint32_t right)
{
	uint32_t index = kind == KIND_GUEST_PHYSICAL ? t->physical : t->paged;
	struct tlb_entry *entry;
	struct slot *slot;

	page &= PAGE_NUMBER_MASK;
	slot = first_live(t, kind, page);
	if (!slot)
		return;
	entry = &slot->entry;
	if (entry->size == PAGE_4K)
		entry->right[type] = right;
	/* guest-physical ones may be there from when paging was off */
	l1_update_right(&t->l1, l1_key(t, index, page), entry->hfn + (uint32_t)(page - entry->page), type,
			right);
}

void tlb_drop(struct tlb *t, uint32_t kind, uint64_t page)
{
	uint32_t index[2], n = contexts_of(t, kind, index);
	uint64_t flush = t->flush;

	t->flush = 0;
	page &= PAGE_NUMBER_MASK;
	for (uint32_t i = 0; i < n; i++)
		context_drop_page(t, index[i], page);
	l1_drop(&t->l1, page);
	t->flush = flush;
}
