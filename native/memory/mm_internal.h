/* Shared by mm.c, mm_huge.c and mm_image.c.
 *
 * An entry is one word: flags, and the frame of a present page or the address of a swapped one's bytes.  It is
 * written under the lock of its 2 MiB region, as the kernel's page tables are under their split lock, and so is
 * the region's size of mapping.
 */
#ifndef FLUSHLAB_MM_INTERNAL_H
#define FLUSHLAB_MM_INTERNAL_H

#include "core/machine_types.h"
#include "core/spin.h"
#include "memory/frame.h"
#include "memory/page_store.h"

/* MM_COW: present, and its first write gets a copy. */
enum { MM_PRESENT = 1, MM_READONLY = 2, MM_SWAPPED = 4, MM_COW = 8, MM_FLAGS = 15, MM_HFN_SHIFT = 12 };
enum { REGION_PAGES = BLOCK_FRAMES };

struct mm_region {
	_Atomic uint32_t lock;
	_Atomic uint32_t huge;
};

struct mm_image {
	uint64_t **page; /* NULL: all zeros */
	uint64_t start;
	uint64_t n;
	uint64_t changed;
};

struct mm {
	uint64_t pages; /* a multiple of REGION_PAGES */
	bool zero_page;
	_Atomic uint64_t *entry;
	struct mm_region *region;
	struct mm_image image;
	struct page_store store;
};

static inline struct mm_region *mm_region_lock(struct mm *mm, uint64_t hva)
{
	struct mm_region *r = &mm->region[hva / REGION_PAGES];

	spin_lock(&r->lock);
	return r;
}

static inline void mm_region_unlock(struct mm_region *r)
{
	spin_unlock(&r->lock);
}

/* Relaxed here and in mm_set: the region's lock orders them. */
static inline uint64_t mm_get(const struct mm *mm, uint64_t hva)
{
	return atomic_load_explicit(&mm->entry[hva], memory_order_relaxed);
}

static inline uint32_t mm_hfn(uint64_t entry)
{
	return (uint32_t)(entry >> MM_HFN_SHIFT);
}

static inline bool mm_is_writable(uint64_t entry)
{
	return !(entry & (MM_READONLY | MM_COW));
}

/* A page has a frame of its own, so that the frame's permission is the page's. */
static inline void mm_set(struct frames *f, struct mm *mm, uint64_t hva, uint64_t entry)
{
	if (entry & MM_PRESENT)
		frame_host_permit(f, mm_hfn(entry), mm_is_writable(entry));
	atomic_store_explicit(&mm->entry[hva], entry, memory_order_relaxed);
}

static inline uint64_t *mm_swap(uint64_t entry)
{
	return (uint64_t *)(uintptr_t)(entry & ~(uint64_t)MM_FLAGS);
}

static inline bool mm_is_huge(const struct mm_region *r)
{
	return atomic_load_explicit(&r->huge, memory_order_relaxed);
}

static inline void mm_set_huge(struct mm_region *r, bool huge)
{
	atomic_store_explicit(&r->huge, huge, memory_order_relaxed);
}

#endif
