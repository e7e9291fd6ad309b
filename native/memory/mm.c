/* Faults, reclaim and protection of user memory.  See mm.h. */
#include "memory/mm.h"

#include "core/heap.h"
#include "core/machine_types.h"
#include "memory/frame.h"
#include "memory/mm_image.h"
#include "memory/mm_internal.h"
#include "sync/cpu.h"
#include "vm/vm.h"

enum { NO_FRAME = 0xffffffff };

int mm_misuse(struct machine *m, uint32_t cpu, const char *what, uint64_t hva)
{
	return cpu_misuse(m, cpu, "user memory: %s (page 0x%llx)", what, (unsigned long long)hva);
}

void mm_fill_from(struct machine *m, struct mm *mm, uint64_t entry, uint32_t hfn)
{
	_Atomic uint64_t *words = frame_words(m->frames, hfn);
	uint64_t *swap = mm_swap(entry);

	if (entry & MM_PRESENT) {
		frame_copy(m->frames, hfn, mm_hfn(entry));
	} else if (entry & MM_SWAPPED) {
		/* Relaxed, as in frame_fill(). */
		for (uint32_t i = 0; i < FRAME_WORDS; i++)
			atomic_store_explicit(&words[i], swap[i], memory_order_relaxed);
		page_store_give(&mm->store, m->heap, swap);
	} else {
		frame_fill(m->frames, hfn, 0);
	}
}

void mm_set_zero_page(struct machine *m, uint32_t vm, int on)
{
	m->vms[vm].mm->zero_page = on != 0;
}

/* Under the region's lock: make the page present.  Returns its entry, or 0 if there is no frame. */
static uint64_t populate_page(struct machine *m, uint32_t cpu, struct mm *mm, uint64_t hva, uint64_t entry,
			      bool write)
{
	uint64_t cow = mm->zero_page && !write && !(entry & MM_SWAPPED) ? MM_COW : 0;
	int64_t hfn;

	if (entry & MM_PRESENT)
		return entry;
	hfn = frame_alloc(m, cpu, FRAME_GUEST);
	if (hfn < 0)
		return 0;
	mm_fill_from(m, mm, entry, (uint32_t)hfn);
	entry = (uint64_t)hfn << MM_HFN_SHIFT | MM_PRESENT | cow | (entry & MM_READONLY);
	mm_set(m->frames, mm, hva, entry);
	return entry;
}

int mm_break_cow(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t hva)
{
	struct mm *mm = m->vms[vm].mm;
	struct mm_region *r;
	uint64_t entry;
	int64_t hfn;

	if (hva >= mm->pages)
		return mm_misuse(m, cpu, "copy beyond it", hva);
	hfn = frame_alloc(m, cpu, FRAME_GUEST);
	if (hfn < 0)
		return MACHINE_NOMEM;
	r = mm_region_lock(mm, hva);
	entry = mm_get(mm, hva);
	if (entry & MM_COW) {
		mm_fill_from(m, mm, entry, (uint32_t)hfn);
		mm_set(m->frames, mm, hva, (uint64_t)hfn << MM_HFN_SHIFT | MM_PRESENT | (entry & MM_READONLY));
		hfn = mm_hfn(entry);
	}
	mm_region_unlock(r);
	frame_free(m, cpu, (uint32_t)hfn);
	return 0;
}

/* Under the region's lock, so that frame and custody belong together: the page cannot be unmapped, its frame
 * freed and its host tag advanced between the two reads.  A custody read later would vouch for a frame that has
 * another user by then. */
static uint32_t custody_of(struct machine *m, uint64_t entry)
{
	return frame_host_tag(m->frames, mm_hfn(entry));
}

int mm_fault(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t hva, int write, struct mm_page *page)
{
	struct mm *mm = m->vms[vm].mm;
	struct mm_region *r;
	uint64_t entry;
	int error = 0;

	if (hva >= mm->pages)
		return mm_misuse(m, cpu, "fault beyond it", hva);
	r = mm_region_lock(mm, hva);
	entry = mm_get(mm, hva);
	page->cow = write && (entry & (MM_COW | MM_READONLY)) == MM_COW;
	if (write && (entry & (MM_READONLY | MM_COW))) {
		error = MACHINE_AGAIN;
	} else {
		entry = populate_page(m, cpu, mm, hva, entry, write);
		if (!entry)
			error = MACHINE_NOMEM;
	}
	if (!error) {
		page->hfn = mm_hfn(entry);
		page->tag = custody_of(m, entry);
		page->writable = mm_is_writable(entry);
		page->level = mm_is_huge(r) ? PG_LEVEL_2M : PG_LEVEL_4K;
	}
	mm_region_unlock(r);
	return error;
}

/* Fault in pages [hva, end) of one region, into the arrays from 0 on. */
static uint32_t fault_region(struct machine *m, uint32_t cpu, struct mm *mm, uint64_t hva, uint64_t end,
			     bool populate, uint32_t *hfns, uint32_t *tags, uint32_t *writable)
{
	struct mm_region *r = mm_region_lock(mm, hva);
	uint32_t present = 0;

	for (uint32_t i = 0; hva < end; hva++, i++) {
		uint64_t entry = mm_get(mm, hva);

		if (populate)
			entry = populate_page(m, cpu, mm, hva, entry, false);
		hfns[i] = NO_FRAME;
		if (!(entry & MM_PRESENT))
			continue;
		hfns[i] = mm_hfn(entry);
		tags[i] = custody_of(m, entry);
		writable[i] = mm_is_writable(entry);
		present++;
	}
	mm_region_unlock(r);
	return present;
}

static uint64_t region_end(uint64_t hva, uint64_t end)
{
	uint64_t next = (hva | (REGION_PAGES - 1)) + 1;

	return next < end ? next : end;
}

int mm_fault_range(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t hva, uint32_t n, int populate,
		   uint32_t *hfns, uint32_t *tags, uint32_t *writable)
{
	struct mm *mm = m->vms[vm].mm;
	uint64_t start = hva, end = hva + n, stop;
	uint32_t present = 0;

	if (end > mm->pages || end < hva)
		return mm_misuse(m, cpu, "fault beyond it", end);
	for (; hva < end; hva = stop) {
		uint64_t i = hva - start;

		stop = region_end(hva, end);
		present += fault_region(m, cpu, mm, hva, stop, populate, hfns + i, tags + i, writable + i);
	}
	return (int)present;
}

uint64_t mm_present(struct machine *m, uint32_t vm, uint64_t start, uint64_t end)
{
	const struct mm *mm = m->vms[vm].mm;
	uint64_t present = 0;

	if (end > mm->pages)
		end = mm->pages;
	for (uint64_t hva = start; hva < end; hva++)
		present += mm_get(mm, hva) & MM_PRESENT;
	return present;
}

/* Return the entry of a page that is about to lose its frame, with its contents kept.  Unchanged if there is no
 * memory for them. */
static uint64_t swap_out(struct machine *m, struct mm *mm, uint64_t entry)
{
	const _Atomic uint64_t *words = frame_words(m->frames, mm_hfn(entry));
	uint64_t *swap = page_store_take(&mm->store, m->heap);

	if (!swap)
		return entry;
	for (uint32_t i = 0; i < FRAME_WORDS; i++)
		swap[i] = atomic_load_explicit(&words[i], memory_order_relaxed);
	return (uint64_t)(uintptr_t)swap | MM_SWAPPED | (entry & MM_READONLY);
}

/* Under the region's lock.  Returns frames freed. */
static uint32_t unmap_page(struct machine *m, uint32_t cpu, struct mm *mm, uint64_t hva, bool keep)
{
	uint64_t entry = mm_get(mm, hva), next = entry & MM_READONLY;

	if (!(entry & MM_PRESENT)) {
		if ((entry & MM_SWAPPED) && !keep) {
			page_store_give(&mm->store, m->heap, mm_swap(entry));
			mm_set(m->frames, mm, hva, next);
		}
		return 0;
	}
	if (keep) {
		next = swap_out(m, mm, entry);
		if (next == entry)
			return 0;
	}
	mm_set(m->frames, mm, hva, next);
	frame_free(m, cpu, mm_hfn(entry));
	return 1;
}

uint64_t mm_unmap(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t start, uint64_t end, int keep)
{
	struct mm *mm = m->vms[vm].mm;
	uint64_t freed = 0, stop;

	if (end > mm->pages)
		end = mm->pages;
	for (uint64_t hva = start; hva < end; hva = stop) {
		struct mm_region *r = mm_region_lock(mm, hva);

		stop = region_end(hva, end);
		mm_set_huge(r, false);
		for (uint64_t i = hva; i < stop; i++)
			freed += unmap_page(m, cpu, mm, i, keep);
		mm_region_unlock(r);
	}
	return freed;
}

uint64_t mm_protect(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t start, uint64_t end, int writable)
{
	struct mm *mm = m->vms[vm].mm;
	uint64_t want = writable ? 0 : MM_READONLY, changed = 0, stop;

	(void)cpu;
	if (end > mm->pages)
		end = mm->pages;
	for (uint64_t hva = start; hva < end; hva = stop) {
		struct mm_region *r = mm_region_lock(mm, hva);

		stop = region_end(hva, end);
		if (stop - hva < REGION_PAGES)
			mm_set_huge(r, false);
		for (uint64_t i = hva; i < stop; i++) {
			uint64_t entry = mm_get(mm, i);

			if ((entry & MM_READONLY) == want)
				continue;
			mm_set(m->frames, mm, i, entry ^ MM_READONLY);
			changed++;
		}
		mm_region_unlock(r);
	}
	return changed;
}

uint64_t mm_stored(struct machine *m, uint32_t vm, int ever)
{
	struct page_store *s = &m->vms[vm].mm->store;
	uint64_t pages;

	spin_lock(&s->lock);
	pages = ever ? s->places : s->taken;
	spin_unlock(&s->lock);
	return pages;
}

int mm_create(struct machine *m, struct vm *vm)
{
	struct mm *mm = heap_zalloc(m->heap, 1, sizeof(*mm));

	if (!mm)
		return MACHINE_NOMEM;
	vm->mm = mm;
	mm->pages = (vm->gfns + REGION_PAGES - 1) & ~(REGION_PAGES - 1ul);
	mm->entry = heap_zalloc(m->heap, mm->pages + 1, sizeof(*mm->entry));
	mm->region = heap_zalloc(m->heap, mm->pages / REGION_PAGES + 1, sizeof(*mm->region));
	if (mm->entry && mm->region)
		return 0;
	mm_destroy(m, vm);
	return MACHINE_NOMEM;
}

/* The VM is not in use any more: no locks. */
void mm_destroy(struct machine *m, struct vm *vm)
{
	struct mm *mm = vm->mm;

	if (!mm)
		return;
	for (uint64_t hva = 0; mm->entry && hva < mm->pages; hva++) {
		uint64_t entry = mm_get(mm, hva);

		if (entry & MM_PRESENT)
			frame_release(m->frames, mm_hfn(entry));
		else if (entry & MM_SWAPPED)
			page_store_give(&mm->store, m->heap, mm_swap(entry));
	}
	heap_free(m->heap, mm->entry);
	heap_free(m->heap, mm->region);
	mm_image_destroy(m, (uint32_t)(vm - m->vms));
	page_store_destroy(&mm->store);
	heap_free(m->heap, mm);
	vm->mm = NULL;
}
