/* Dropping the mappings of one page. */
#ifndef FLUSHLAB_TLB_ADDRESS_H
#define FLUSHLAB_TLB_ADDRESS_H

#include "core/machine_types.h"

struct tlb;

/* Drop one page of one context. */
void context_drop_page(struct tlb *t, uint32_t index, uint64_t page);
/* Drop all translations of one context that cover one of the pages. */
void context_drop_range(struct tlb *t, uint32_t index, uint64_t page, uint64_t pages);
/* Drop also every piece of a larger guest page that the page is part of. */
void context_drop_pieces(struct tlb *t, uint32_t index, uint64_t page);

#endif
