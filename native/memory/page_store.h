/* Places for the bytes of pages that have no frame: pages that are swapped out, and images.
 *
 * The host swaps thousands of pages a second out, from many threads.  malloc() would take each page from the
 * calling thread's own arena, and other threads do not use the free pages of that arena: a process that runs
 * for long would grow though it stores no more.  A store has as many places as were ever in use at once, and the place that was
 * given back last is the next to be taken.
 *
 * The pages of a machine with a heap are blocks of that heap, so that a snapshot holds them.
 */
#ifndef FLUSHLAB_PAGE_STORE_H
#define FLUSHLAB_PAGE_STORE_H

#include <stdint.h>

#include "core/heap.h"

struct stored_page;
struct store_chunk;

/* Initially all zeros. */
struct page_store {
	_Atomic uint32_t lock;
	struct stored_page *free; /* places that were given back */
	struct store_chunk *chunks;
	uint32_t carved; /* places of the newest chunk that were taken before */
	uint64_t places; /* taken or given back */
	uint64_t taken;
};

/* Return a place of FRAME_WORDS words with arbitrary contents, or NULL if memory is short.  Any thread may call
 * it. */
uint64_t *page_store_take(struct page_store *s, struct heap *heap);
/* Give a place back that page_store_take() has returned, or NULL. */
void page_store_give(struct page_store *s, struct heap *heap, uint64_t *page);
/* Unmap all places; no other thread may use the store. */
void page_store_destroy(struct page_store *s);

#endif
