/* The fast path of the second level: 4 KiB translations that are in no cell yet, in sets of up to sixteen
 * ways.  Inline, for the fast path of walks (walk_fast.c): the work of tlb.c, which
 * covers every size and geometry, reduced to this case. */
#ifndef FLUSHLAB_TLB_FAST_H
#define FLUSHLAB_TLB_FAST_H

#include "core/machine_types.h"
#include "tlb/tlb.h"
#include "tlb/tlb_account.h"
#include "tlb/tlb_context.h"
#include "tlb/tlb_store.h"

/* The position and the key of a 4 KiB translation of a context. */
struct place {
	uint64_t key;
	struct position at;
	struct context *context;
};

static inline struct place place_of_4k(struct tlb *t, uint32_t index, uint64_t page)
{
	uint64_t id = mapping_id(PAGE_4K, page, index);

	return (struct place){ id << GENERATION_BITS | t->generation[index], position_of(&t->l2, id, 0),
			       &t->contexts[index] };
}

/* Return whether no cell, live or dead, belongs to this id. */
static inline bool place_vacant(const struct tlb *t, const struct place *p)
{
	uint32_t first = p->at.set * TAGGED_WAYS;

	for (uint32_t equal = bytes_equal(&t->l2.tags[first], p->at.tag); equal; equal &= equal - 1)
		if (key_id(t->l2.key[first + (uint32_t)__builtin_ctz(equal)]) == key_id(p->key))
			return false;
	return true;
}

/* Claim a cell for a vacant place and return its entry, for the caller to write: a translation that `vm` fills,
 * of no larger guest page.  used: by the access that it is filled for.  As l2_fill(). */
static inline __attribute__((always_inline)) struct tlb_entry *place_fill(struct tlb *t, const struct place *p, uint32_t vm,
									  bool used)
{
	struct store *s = &t->l2;
	struct set *set = &s->set[p->at.set];
	uint32_t cell = store_victim(s, p->at.set, TAGGED_WAY_BITS);
	struct slot *slot = &((struct slot *)s->payload)[cell];

	account_evict(t, slot, s->key[cell]);
	account_fill(p->context, vm, PAGE_4K);
	s->tags[cell] = p->at.tag;
	s->key[cell] = p->key;
	if (used)
		set_touch(s, set, cell % TAGGED_WAYS);
	slot->filled = ++t->fills;
	slot->born = p->key & GENERATION_MAX;
	p->context->filled = true;
	if (__builtin_expect(!p->context->listed, 0))
		context_list_new(t, key_context(p->key));
	return &slot->entry;
}

#endif
