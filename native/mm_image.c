/* Images: user space's copies of guest memory, as live migration makes them.  See mm.h. */
#include "heap.h"
#include "mm_internal.h"

int mm_image_create(struct machine *m, uint32_t vm, uint64_t start, uint64_t n)
{
	struct mm *mm = m->vms[vm].mm;

	if (start > mm->pages || n > mm->pages - start)
		return MACHINE_NOMEM;
	mm_image_destroy(m, vm);
	mm->image.words = heap_zalloc(m->heap, n + 1, FRAME_WORDS * sizeof(*mm->image.words));
	if (!mm->image.words)
		return MACHINE_NOMEM;
	mm->image.start = start;
	mm->image.n = n;
	return 0;
}

void mm_image_destroy(struct machine *m, uint32_t vm)
{
	struct mm_image *image = &m->vms[vm].mm->image;

	heap_free(m->heap, image->words);
	*image = (struct mm_image){ 0 };
}

static bool in_image(const struct mm_image *image, uint64_t hva)
{
	return hva >= image->start && hva - image->start < image->n;
}

static uint64_t *image_page(const struct mm_image *image, uint64_t hva)
{
	return image->words + (hva - image->start) * FRAME_WORDS;
}

/* One word behind an entry, under the region's lock.  Relaxed: vCPUs store meanwhile, and a copy of a page being
 * written is whatever it is; the dirty log must say that the page has to be copied again. */
static uint64_t page_word(const struct machine *m, uint64_t entry, uint32_t word)
{
	if (entry & MM_PRESENT)
		return atomic_load_explicit(&frame_words(m->frames, mm_hfn(entry))[word], memory_order_relaxed);
	return entry & MM_SWAPPED ? mm_swap(entry)[word] : 0;
}

uint64_t mm_read(struct machine *m, uint32_t vm, uint64_t hva, uint32_t word)
{
	struct mm *mm = m->vms[vm].mm;
	struct mm_region *r;
	uint64_t value;

	if (hva >= mm->pages)
		return 0;
	r = mm_region_lock(mm, hva);
	value = page_word(m, mm_get(mm, hva), word % FRAME_WORDS);
	mm_region_unlock(r);
	return value;
}

static void copy_page(struct machine *m, struct mm *mm, uint64_t hva)
{
	uint64_t *to = image_page(&mm->image, hva);
	struct mm_region *r = mm_region_lock(mm, hva);
	uint64_t entry = mm_get(mm, hva);

	for (uint32_t i = 0; i < FRAME_WORDS; i++)
		to[i] = page_word(m, entry, i);
	mm_region_unlock(r);
}

uint64_t mm_image_copy(struct machine *m, uint32_t vm, uint64_t base, uint64_t mask)
{
	struct mm *mm = m->vms[vm].mm;
	uint64_t copied = 0;

	for (; mask; mask &= mask - 1) {
		uint64_t hva = base + (uint32_t)__builtin_ctzll(mask);

		if (!in_image(&mm->image, hva))
			continue;
		copy_page(m, mm, hva);
		copied++;
	}
	return copied;
}

static bool page_differs(struct machine *m, struct mm *mm, uint64_t hva)
{
	const uint64_t *image = image_page(&mm->image, hva);
	struct mm_region *r = mm_region_lock(mm, hva);
	uint64_t entry = mm_get(mm, hva), differ = 0;

	for (uint32_t i = 0; i < FRAME_WORDS; i++)
		differ |= image[i] ^ page_word(m, entry, i);
	mm_region_unlock(r);
	return differ;
}

int64_t mm_image_differs(struct machine *m, uint32_t vm, uint64_t from)
{
	struct mm *mm = m->vms[vm].mm;
	uint64_t hva = from > mm->image.start ? from : mm->image.start;

	for (; in_image(&mm->image, hva); hva++)
		if (page_differs(m, mm, hva))
			return (int64_t)hva;
	return -1;
}
