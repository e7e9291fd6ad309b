/* User memory behind a VM's memslots: one entry per page of the VMM's address space (hva in 4 KiB pages; as many
 * as the VM has gfns, rounded up to 2 MiB).
 *
 * This is the host's side of the mmu_notifier protocol; callers bracket every change with KVM's
 * invalidate_range_start and _end.  Contents are real: a page that is swapped out, migrated or collapsed
 * keeps its bytes.  A page never touched, or given up with MADV_DONTNEED, reads as zeros.
 */
#ifndef FLUSHLAB_MM_H
#define FLUSHLAB_MM_H

#include "core/machine.h"

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
void mm_set_zero_page(struct machine *m, uint32_t vm, int on);
/* wp_page_copy(), between invalidate_range_start and _end: copy the page to a new frame; the old one is freed.
 * 0, also if another thread has done it, or MACHINE_NOMEM. */
int mm_break_cow(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t hva);

/* hva_to_pfn(): the frame behind a page, allocated or swapped in on demand.  0, MACHINE_NOMEM, or
 * MACHINE_AGAIN: a write to a page that is read-only for now (mprotect, or page->cow). */
int mm_fault(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t hva, int write, struct mm_page *page);
/* mm_fault() for n pages from hva on, into hfns[], tags[], writable[] (hfn 0xffffffff: none; does not allocate
 * unless `populate`).  Returns pages present. */
int mm_fault_range(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t hva, uint32_t n, int populate,
		   uint32_t *hfns, uint32_t *tags, uint32_t *writable);
/* Return the number of pages of the range that are present. */
uint64_t mm_present(struct machine *m, uint32_t vm, uint64_t start, uint64_t end);
/* Free the frames of a range: contents kept (reclaim) or lost (MADV_DONTNEED).  Returns frames freed.  A huge
 * page that is unmapped in part is split first. */
uint64_t mm_unmap(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t start, uint64_t end, int keep);
/* mprotect: set the host's own right to write, present or not.  Returns pages changed.  A huge page that is
 * changed in part is split. */
uint64_t mm_protect(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t start, uint64_t end, int writable);
/* Migrate each present 4K page of the range to a new frame (huge pages stay).  Returns pages moved; fewer when
 * frames run out. */
uint64_t mm_migrate(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t start, uint64_t end);
/* khugepaged: move the aligned 512 pages at hva into one 2M block, contents copied.  Absent pages are filled
 * in, but at least one must be present.  0, MACHINE_NOMEM (no block is free), or MACHINE_AGAIN (no page is
 * present, or pages differ in their protection). */
int mm_collapse(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t hva);
/* Map the block by 4K pages again, with its frames unchanged. */
int mm_split(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t hva);
/* Return 1 if the 2M range at hva is mapped huge. */
int mm_huge(struct machine *m, uint32_t vm, uint64_t hva);
/* host_pfn_mapping_level() for a fault that has the frame `hfn` for hva by custody `tag`: the custody of a huge
 * leaf, if hva is mapped huge and by that frame, else -1.  This is the moment at which the fault reads the
 * frame's neighbours; if its own custody is void, so is that of the leaf for this frame. */
int32_t mm_huge_custody(struct machine *m, uint32_t vm, uint64_t hva, uint32_t hfn, uint32_t tag);

/* Images: the copies that live migration makes.  Pages from hva `start` on, n of them; initially all zeros.
 * One image per VM, used by one thread. */
int mm_image_create(struct machine *m, uint32_t vm, uint64_t start, uint64_t n);
void mm_image_destroy(struct machine *m, uint32_t vm);
/* Copy the pages set in a bitmap word (bit i: hva base + i), as user space reads them while vCPUs run.  Returns
 * pages copied, or MACHINE_NOMEM. */
int64_t mm_image_copy(struct machine *m, uint32_t vm, uint64_t base, uint64_t mask);
/* Copy every page of the image. */
int64_t mm_image_copy_all(struct machine *m, uint32_t vm);
/* Return how many copies so far have found their page changed. */
uint64_t mm_image_changed(struct machine *m, uint32_t vm);
/* Return the first page (hva) from `from` on that differs from the image, or -1.  Only while no vCPU runs. */
int64_t mm_image_differs(struct machine *m, uint32_t vm, uint64_t from);
/* Return 1 if this page differs; *value: its first differing word, which, if a guest stored it, is the clock of
 * its vCPU then (guest.h). */
int mm_image_lost(struct machine *m, uint32_t vm, uint64_t hva, uint64_t *value);
/* Read one 64-bit word as user space does, without faulting the page in. */
uint64_t mm_read(struct machine *m, uint32_t vm, uint64_t hva, uint32_t word);
/* end api */

struct vm;
int mm_create(struct machine *m, struct vm *vm);
void mm_destroy(struct machine *m, struct vm *vm);

#endif
