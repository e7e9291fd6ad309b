/* Book-keeping behind the second level: who filled what was dropped, and where pieces of large pages are. */
#include "tlb_internal.h"

uint32_t *piece_bucket(struct tlb *t, uint32_t context, uint64_t page, uint32_t piece, uint32_t guest)
{
	uint64_t region = page >> 9 * guest;
	uint64_t x = (region * CONTEXTS + context) * 16 + piece * 4 + guest;

	return &t->pieces[x * UINT64_C(0x9e3779b97f4a7c15) >> 54];
}

static uint32_t *piece_count(struct tlb *t, uint64_t key, const struct tlb_entry *entry)
{
	return piece_bucket(t, key_context(key), entry->page, entry->size, entry->fractured - 1u);
}

void account_fill(struct tlb *t, uint64_t key, struct slot *slot)
{
	struct context *c = &t->contexts[key_context(key)];

	if (!c->live && !c->live_other)
		c->vm = slot->entry.vm;
	if (slot->entry.vm == c->vm)
		c->live++;
	else
		c->live_other++;
	c->slots[key_size(key)]++;
	if (slot->entry.fractured)
		++*piece_count(t, key, &slot->entry);
}

static void account_unlive(struct tlb *t, const struct cell *cell)
{
	const struct slot *slot = cell_payload(&t->l2, cell);
	struct context *c = &t->contexts[key_context(cell->key)];

	if (slot->entry.vm == c->vm)
		c->live--;
	else
		c->live_other--;
}

void account_evict(struct tlb *t, const struct cell *cell)
{
	const struct slot *slot = cell_payload(&t->l2, cell);

	if (!cell->key)
		return;
	if (cell_live(&t->l2, cell))
		account_unlive(t, cell);
	t->contexts[key_context(cell->key)].slots[key_size(cell->key)]--;
	if (slot->entry.fractured)
		--*piece_count(t, cell->key, &slot->entry);
}

void account_dropped(struct tlb *t, uint32_t vm, uint64_t count)
{
	t->dropped += count;
	if (vm >= t->vms)
		return;
	if (t->dropped_epoch[vm] != t->epoch) {
		t->dropped_epoch[vm] = t->epoch;
		t->dropped_by_vm[vm] = 0;
	}
	t->dropped_by_vm[vm] += count;
}

void cell_kill(struct tlb *t, struct cell *cell)
{
	struct slot *slot = cell_payload(&t->l2, cell);

	account_unlive(t, cell);
	account_dropped(t, slot->entry.vm, 1);
	slot->flush = t->flush;
	cell->key &= ~(uint64_t)GENERATION_MAX;
}
