/* Where a machine's memory comes from.
 *
 * An ordinary machine's is calloc's: its heap is NULL.  One that is put back to an earlier state again and again
 * (machine_config.snapshots) has a region of its own for all that it allocates, books included, so that bringing
 * back the region's bytes brings back the machine, at the same addresses.
 *
 * The bytes of a snapshot lie in a memfd, of which the region is then a private mapping: the kernel gives it a copy
 * of each page that is stored to, and tells which pages have one (proc/pid/pagemap, Documentation/admin-guide/mm/
 * pagemap.rst).  Those are copied back; they stay, so that nothing faults when the next execution stores to the same
 * ones.  Where the kernel does not tell, MADV_DONTNEED drops them all, and each is faulted in again.
 */
#ifndef FLUSHLAB_HEAP_H
#define FLUSHLAB_HEAP_H

#include <stddef.h>
#include <stdint.h>

struct heap;

/* A region from which `bytes` can be allocated, more or less; address space, not memory.  NULL if there is none. */
struct heap *heap_create(size_t bytes);
void heap_destroy(struct heap *h);

/* Zeroed, n * size bytes; without a heap, calloc.  NULL if memory is short.  Any thread may call it. */
void *heap_zalloc(struct heap *h, size_t n, size_t size);
/* The same, on cache lines of its own. */
void *heap_zalloc_lines(struct heap *h, size_t n, size_t size);
/* What one of them has returned, from the same heap, or NULL. */
void heap_free(struct heap *h, void *memory);

/* Nobody else uses the region meanwhile.  0, or MACHINE_NOMEM: then there is no snapshot. */
int heap_snapshot(struct heap *h);
/* Every byte as it was at the last snapshot.  0, or MACHINE_MISUSE if there was none. */
int heap_restore(struct heap *h);
/* Of every byte in use, books included. */
uint64_t heap_fingerprint(const struct heap *h);
/* How many pages the last heap_restore() put back; 0 where it let the kernel do it. */
uint32_t heap_dirty_pages(const struct heap *h);

#endif
