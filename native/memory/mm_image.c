/* Images: user space's copies of guest memory, as live migration makes them.  See mm_image.h. */
#include "memory/mm_image.h"

#include "core/heap.h"
#include "core/machine_types.h"
#include "memory/frame.h"
#include "memory/mm_internal.h"
#include "vm/vm.h"

int mm_image_create(struct machine *m, uint32_t vm, uint64_t start, uint64_t n)
{
	struct mm *mm = m->vms[vm].mm;

	if (start > mm->pages || n > mm->pages - start)
		return MACHINE_NOMEM;
	mm_image_destroy(m, vm);
	mm->image.page = heap_zalloc(m->heap, n + 1, sizeof(*mm->image.page));
	if (!mm->image.page)
		return MACHINE_NOMEM;
	mm->image.start = start;
	mm->image.n = n;
	return 0;
}

void mm_image_destroy(struct machine *m, uint32_t vm)
{
	struct mm_image *image = &m->vms[vm].mm->image;

	for (uint64_t i = 0; i < image->n; i++)
		page_store_give(&m->vms[vm].mm->store, m->heap, image->page[i]);
	heap_free(m->heap, image->page);
	*image = (struct mm_image){ 0 };
}

static bool in_image(const struct mm_image *image, uint64_t hva)
{
	return hva >= image->start && hva - image->start < image->n;
}

static uint64_t **image_page(const struct mm_image *image, uint64_t hva)
{
	return &image->page[hva - image->start];
}

/* One word behind an entry, under the region's lock.  Relaxed: vCPUs store meanwhile, so the copy of a page
 * being written has arbitrary contents; the dirty log must tell that the page has to be copied again. */
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

static uint64_t image_word(const uint64_t *page, uint32_t word)
{
	return page ? page[word] : 0;
}

/* Under the region's lock: return the first word of a page that differs from its image, or FRAME_WORDS. */
static uint32_t first_difference(const struct machine *m, uint64_t entry, const uint64_t *page)
{
	uint32_t word = 0;

	if (!page && !(entry & (MM_PRESENT | MM_SWAPPED)))
		return FRAME_WORDS; /* never touched, never copied: a page of zeros */
	while (word < FRAME_WORDS && image_word(page, word) == page_word(m, entry, word))
		word++;
	return word;
}

/* Most pages are unchanged since their last copy; those that hold only zeros take no memory. */
static int copy_page(struct machine *m, struct mm *mm, uint64_t hva)
{
	uint64_t **page = image_page(&mm->image, hva);
	uint32_t first;
	struct mm_region *r = mm_region_lock(mm, hva);

	first = first_difference(m, mm_get(mm, hva), *page);
	mm_region_unlock(r);
	if (first == FRAME_WORDS)
		return 0;
	if (!*page)
		*page = page_store_take(&mm->store, m->heap);
	if (!*page)
		return MACHINE_NOMEM;
	mm->image.changed++;
	r = mm_region_lock(mm, hva);
	for (uint32_t i = 0; i < FRAME_WORDS; i++)
		(*page)[i] = page_word(m, mm_get(mm, hva), i);
	mm_region_unlock(r);
	return 0;
}

int64_t mm_image_copy(struct machine *m, uint32_t vm, uint64_t base, uint64_t mask)
{
	struct mm *mm = m->vms[vm].mm;
	int64_t copied = 0;

	for (; mask; mask &= mask - 1) {
		uint64_t hva = base + (uint32_t)__builtin_ctzll(mask);

		if (!in_image(&mm->image, hva))
			continue;
		if (copy_page(m, mm, hva))
			return MACHINE_NOMEM;
		copied++;
	}
	return copied;
}

int64_t mm_image_copy_all(struct machine *m, uint32_t vm)
{
	const struct mm_image *image = &m->vms[vm].mm->image;

	for (uint64_t i = 0; i < image->n; i++)
		if (copy_page(m, m->vms[vm].mm, image->start + i))
			return MACHINE_NOMEM;
	return (int64_t)image->n;
}

uint64_t mm_image_changed(struct machine *m, uint32_t vm)
{
	return m->vms[vm].mm->image.changed;
}

int64_t mm_image_differs(struct machine *m, uint32_t vm, uint64_t from)
{
	struct mm *mm = m->vms[vm].mm;
	uint64_t hva = from > mm->image.start ? from : mm->image.start, unused;

	for (; in_image(&mm->image, hva); hva++)
		if (mm_image_lost(m, vm, hva, &unused))
			return (int64_t)hva;
	return -1;
}

int mm_image_lost(struct machine *m, uint32_t vm, uint64_t hva, uint64_t *value)
{
	struct mm *mm = m->vms[vm].mm;
	uint32_t first;
	struct mm_region *r = mm_region_lock(mm, hva);

	first = first_difference(m, mm_get(mm, hva), *image_page(&mm->image, hva));
	*value = first < FRAME_WORDS ? page_word(m, mm_get(mm, hva), first) : 0;
	mm_region_unlock(r);
	return first < FRAME_WORDS;
}
