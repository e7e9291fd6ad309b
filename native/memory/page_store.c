/* See page_store.h. */
#define _GNU_SOURCE
#include "memory/page_store.h"

#include <stddef.h>
#include <sys/mman.h>

#include "core/spin.h"
#include "memory/frame.h"

enum { CHUNK_PAGES = 256 };

struct stored_page {
	struct stored_page *next; /* while it is free */
	uint64_t rest[FRAME_WORDS - 1];
};

/* The first page of a chunk links it; the others are places. */
struct store_chunk {
	struct store_chunk *older;
	uint64_t rest[FRAME_WORDS - 1];
	struct stored_page page[CHUNK_PAGES - 1];
};

_Static_assert(sizeof(struct store_chunk) == CHUNK_PAGES * sizeof(struct stored_page), "a chunk is whole pages");

/* Under the lock. */
static struct stored_page *carve(struct page_store *s)
{
	if (!s->chunks || s->carved == CHUNK_PAGES - 1) {
		struct store_chunk *chunk = mmap(NULL, sizeof(*chunk), PROT_READ | PROT_WRITE,
						 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		if (chunk == MAP_FAILED)
			return NULL;
		chunk->older = s->chunks;
		s->chunks = chunk;
		s->carved = 0;
	}
	s->places++;
	return &s->chunks->page[s->carved++];
}

uint64_t *page_store_take(struct page_store *s, struct heap *heap)
{
	struct stored_page *page;

	if (heap)
		return heap_zalloc(heap, FRAME_WORDS, sizeof(uint64_t));
	spin_lock(&s->lock);
	page = s->free;
	if (page)
		s->free = page->next;
	else
		page = carve(s);
	s->taken += page != NULL;
	spin_unlock(&s->lock);
	return (uint64_t *)page;
}

void page_store_give(struct page_store *s, struct heap *heap, uint64_t *page)
{
	struct stored_page *free = (struct stored_page *)page;

	if (heap) {
		heap_free(heap, page);
		return;
	}
	if (!page)
		return;
	spin_lock(&s->lock);
	free->next = s->free;
	s->free = free;
	s->taken--;
	spin_unlock(&s->lock);
}

void page_store_destroy(struct page_store *s)
{
	while (s->chunks) {
		struct store_chunk *chunk = s->chunks;

		s->chunks = chunk->older;
		munmap(chunk, sizeof(*chunk));
	}
}
