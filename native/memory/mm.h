/* User memory behind a VM's memslots: one entry per page of the VMM's address space (hva in 4 KiB pages; as many
 * as the VM has gfns, rounded up to 2 MiB).
 *
 * This is the host's side of the mmu_notifier protocol; callers bracket every change with KVM's
 * invalidate_range_start and _end.  Contents are real: a page that is swapped out, migrated or collapsed
 * keeps its bytes.  A page never touched, or given up with MADV_DONTNEED, reads as zeros.
 */
#ifndef FLUSHLAB_MM_H
#define FLUSHLAB_MM_H

#include "core/machine_types.h"

struct mm;

/* api */
struct mm_page {
	uint32_t hfn;       /* of this 4 KiB page, in a block too */
	uint32_t tag;       /* host tag of the frame: the custody that a fault takes */
	uint32_t writable;
	uint32_t level;     /* how the host maps it: PG_LEVEL_4K or PG_LEVEL_2M */
	uint32_t cow;       /* with MACHINE_AGAIN: mm_break_cow() first */
};

/* Anonymous memory that is read before it is written: the zero page is mapped, read-only, and the first write
 * makes a copy.  (Every page has a zero page of its own here, so that a frame has one user.)  Initially off. */
/* call: anything */
void mm_set_zero_page(struct machine *m, uint32_t vm, int on);
/* wp_page_copy(), between invalidate_range_start and _end: copy the page to a new frame; the old one is freed.
 * 0, also if another thread has done it, or MACHINE_NOMEM. */
/* call: anything */
int mm_break_cow(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t hva);

/* hva_to_pfn(): the frame behind a page, allocated or swapped in on demand.  0, MACHINE_NOMEM, or
 * MACHINE_AGAIN: a write to a page that is read-only for now (mprotect, or page->cow). */
/* call: modelled; fence */
int mm_fault(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t hva, int write, struct mm_page *page);
/* mm_fault() for n pages from hva on, into hfns[], tags[], writable[] (hfn 0xffffffff: none; does not allocate
 * unless `populate`).  Returns pages present. */
/* call: step mm; reads custody; writes mm(vm), guest_frames */
int mm_fault_range(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t hva, uint32_t n, int populate,
		   uint32_t *hfns, uint32_t *tags, uint32_t *writable);
/* Return the number of pages of the range that are present. */
/* call: part; reads mm(vm) */
uint64_t mm_present(struct machine *m, uint32_t vm, uint64_t start, uint64_t end);
/* Free the frames of a range: contents kept (reclaim) or lost (MADV_DONTNEED).  Returns frames freed.  A huge
 * page that is unmapped in part is split first. */
/* call: step mm; writes mm(vm), guest_frames, custody, memory(vm) */
uint64_t mm_unmap(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t start, uint64_t end, int keep);
/* mprotect: set the host's own right to write, present or not.  Returns pages changed.  A huge page that is
 * changed in part is split. */
/* call: step mm; writes mm(vm), guest_frames, custody, memory(vm) */
uint64_t mm_protect(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t start, uint64_t end, int writable);
/* Return the number of pages that are stored outside of frames (swapped out, or in an image).  With `ever`, return the
 * greatest number so far, which the memory for them never exceeds.  0 on a machine with snapshots, because its heap stores
 * them. */
/* call: aside */
uint64_t mm_stored(struct machine *m, uint32_t vm, int ever);
/* end api */

/* Under the region's lock: move the contents behind an entry into a frame, which then is the page's; swapped
 * bytes are freed. */
void mm_fill_from(struct machine *m, struct mm *mm, uint64_t entry, uint32_t hfn);
/* MACHINE_MISUSE with a message. */
int mm_misuse(struct machine *m, uint32_t cpu, const char *what, uint64_t hva);

int mm_create(struct machine *m, struct vm *vm);
void mm_destroy(struct machine *m, struct vm *vm);

#endif
