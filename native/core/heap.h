/* The source of a machine's memory.
 *
 * An ordinary machine allocates with calloc: its heap is NULL.  A machine that is put back to an earlier state
 * again and again (machine_config.snapshots) has a region of its own for all allocations, bookkeeping included,
 * so that restoring the region's bytes restores the machine, at unchanged addresses.
 *
 * The bytes of a snapshot lie in a memfd, which the region then maps privately: the kernel copies each page
 * that is stored to, and reports which pages have a copy (proc/pid/pagemap,
 * Documentation/admin-guide/mm/pagemap.rst).  A restore copies those pages back and keeps them, so that the
 * next execution's stores to them do not fault.  Where the kernel does not report them, MADV_DONTNEED drops all
 * pages, and each is faulted in again.
 */
#ifndef FLUSHLAB_HEAP_H
#define FLUSHLAB_HEAP_H

#include <stddef.h>
#include <stdint.h>

struct heap;

/* Create a region from which about `bytes` can be allocated; it takes address space, not memory.  NULL if there
 * is none. */
struct heap *heap_create(size_t bytes);
void heap_destroy(struct heap *h);

/* Return zeroed memory of n * size bytes; without a heap, calloc.  NULL if memory is short.  Any thread may
 * call it. */
void *heap_zalloc(struct heap *h, size_t n, size_t size);
/* As heap_zalloc(), but on cache lines of its own. */
void *heap_zalloc_lines(struct heap *h, size_t n, size_t size);
/* Free memory that heap_zalloc*() returned from this heap, or NULL. */
void heap_free(struct heap *h, void *memory);

/* Take a snapshot; no other thread may use the region meanwhile.  0, or MACHINE_NOMEM: then there is no
 * snapshot. */
int heap_snapshot(struct heap *h);
/* Restore every byte to the last snapshot.  0, or MACHINE_MISUSE if there was none. */
int heap_restore(struct heap *h);
/* Return a hash of every byte in use, bookkeeping included. */
uint64_t heap_fingerprint(const struct heap *h);
/* Leave this memory, in whole words, out of heap_digest() from now on.  Return 0, or MACHINE_NOMEM. */
int heap_leave_out(struct heap *h, const void *memory, size_t bytes);
/* Compute two hashes over the words that differ from the last snapshot, and their places: equal for equal bytes.
 * Return 0, or MACHINE_MISUSE if there was no snapshot, or if the kernel does not report which pages were stored to. */
int heap_digest(struct heap *h, uint64_t digest[2]);
/* Return the number of pages that the last heap_restore() put back; 0 if it left that to the kernel. */
uint32_t heap_dirty_pages(const struct heap *h);

#endif
