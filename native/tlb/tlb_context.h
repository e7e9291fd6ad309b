/* Contexts: the tags of cached mappings, and their generations. */
#ifndef FLUSHLAB_TLB_CONTEXT_H
#define FLUSHLAB_TLB_CONTEXT_H

#include "core/machine_types.h"
#include "tlb/tlb_types.h"

enum { DROP_TRANSLATIONS = 1, DROP_PSC = 2, DROP_BOTH = 3 };

void contexts_init(struct tlb *t);
/* Return the context of a tag; 0 if there is none.  context_get makes one, recycling if it must. */
uint32_t context_find(struct tlb *t, uint32_t kind, uint32_t vpid, uint32_t pcid, uint32_t ep4ta);
uint32_t context_get(struct tlb *t, uint32_t kind, uint32_t vpid, uint32_t pcid, uint32_t ep4ta);
void context_list_new(struct tlb *t, uint32_t index);

/* List a context before an entry is cached in it. */
static inline void context_list(struct tlb *t, uint32_t index)
{
	if (!t->contexts[index].listed)
		context_list_new(t, index);
}

/* Drop all translations and/or paging-structure-cache entries of a context in one step. */
void context_drop(struct tlb *t, uint32_t index, uint32_t what);

#endif
