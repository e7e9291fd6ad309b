/* Accounting behind the second level: dropped entries by the VM that filled them, and pieces of large pages. */
#include "tlb/tlb_account.h"

#include "core/cpu_types.h"
#include "core/machine_types.h"
#include "tlb/tlb_store.h"
#include "tlb/tlb_types.h"

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

void account_piece_gone(struct tlb *t, const struct slot *slot, uint64_t key)
{
	t->contexts[key_context(key)].pieces--;
	--*piece_count(t, key, &slot->entry);
}

void account_replace(struct tlb *t, uint32_t cell, uint64_t key, const struct tlb_entry *entry)
{
	struct context *c = &t->contexts[key_context(key)];

	account_evict(t, slot_of(t, cell), t->l2.key[cell]);
	account_fill(c, entry->vm, key_size(key));
	if (!entry->fractured)
		return;
	c->pieces++;
	++*piece_bucket(t, key_context(key), key_page(key), entry->size, entry->fractured - 1u);
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

void cell_kill(struct tlb *t, uint32_t cell)
{
	struct slot *slot = slot_of(t, cell);

	account_unlive(&t->contexts[key_context(t->l2.key[cell])], slot);
	account_dropped(t, slot->entry.vm, 1);
	slot->flush = t->flush;
	cell_mark_dead(&t->l2, cell);
}
