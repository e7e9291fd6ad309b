/* Dropped entries by the VM that filled them, ghosts, pieces of larger guest pages. */
#ifndef FLUSHLAB_TLB_ACCOUNT_H
#define FLUSHLAB_TLB_ACCOUNT_H

#include "core/machine_types.h"
#include "tlb/tlb_store.h"
#include "tlb/tlb_types.h"

/* Account for a piece of a larger guest page that is about to be overwritten. */
void account_piece_gone(struct tlb *t, const struct slot *slot, uint64_t key);

/* Count a live translation out.  The slot is read only if the context does not suffice: an eviction needs
 * nothing else of it, and the slot is seldom in the host's own caches. */
static inline void account_unlive(struct context *c, const struct slot *slot)
{
	if (__builtin_expect(c->live_other != 0, 0) && slot->entry.vm != c->vm)
		c->live_other--;
	else
		c->live--;
}

/* Account for the mapping that `slot` holds under a key, which is about to be overwritten. */
static inline void account_evict(struct tlb *t, const struct slot *slot, uint64_t key)
{
	uint32_t index = key_context(key);
	struct context *c = &t->contexts[index];

	if (__builtin_expect(!key, 0))
		return;
	if (__builtin_expect((key & GENERATION_MAX) == t->generation[index], 1))
		account_unlive(c, slot);
	c->slots[key_size(key)]--;
	if (__builtin_expect(c->pieces != 0, 0) && slot->entry.fractured)
		account_piece_gone(t, slot, key);
}

/* Account for a translation that `vm` fills. */
static inline void account_fill(struct context *c, uint32_t vm, uint32_t size)
{
	if (!c->live && !c->live_other)
		c->vm = vm;
	if (__builtin_expect(vm == c->vm, 1))
		c->live++;
	else
		c->live_other++;
	c->slots[size]++;
}

/* Account for a cell that is about to be overwritten by a mapping with this key and entry. */
void account_replace(struct tlb *t, uint32_t cell, uint64_t key, const struct tlb_entry *entry);
/* Account for `count` dropped live translations that `vm` filled. */
void account_dropped(struct tlb *t, uint32_t vm, uint64_t count);
/* Drop one live cell. */
void cell_kill(struct tlb *t, uint32_t cell);
uint32_t *piece_bucket(struct tlb *t, uint32_t context, uint64_t page, uint32_t piece, uint32_t guest);

#endif
