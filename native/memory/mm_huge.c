/* Moving pages: migration, khugepaged's collapse, and the way back.  See mm_huge.h. */
#include "memory/mm_huge.h"

#include "core/machine_types.h"
#include "memory/custody.h"
#include "memory/frame.h"
#include "memory/mm.h"
#include "memory/mm_internal.h"
#include "vm/vm.h"

/* Under the region's lock.  The notifier has promised that no vCPU uses the page.  Under a mutant, a vCPU that
 * does may store into the old frame after the copy, and that store is lost, as on real hardware. */
static int move_page(struct machine *m, uint32_t cpu, struct mm *mm, uint64_t hva)
{
	uint64_t entry = mm_get(mm, hva);
	int64_t hfn;

	if (!(entry & MM_PRESENT))
		return 0;
	hfn = frame_alloc(m, cpu, FRAME_GUEST);
	if (hfn < 0)
		return MACHINE_NOMEM;
	mm_fill_from(m, mm, entry, (uint32_t)hfn);
	mm_set(m->frames, mm, hva, (uint64_t)hfn << MM_HFN_SHIFT | (entry & (MM_PRESENT | MM_READONLY)));
	frame_free(m, cpu, mm_hfn(entry));
	return 1;
}

uint64_t mm_migrate(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t start, uint64_t end)
{
	struct mm *mm = m->vms[vm].mm;
	uint64_t moved = 0;

	if (end > mm->pages)
		end = mm->pages;
	for (uint64_t hva = start; hva < end; hva++) {
		struct mm_region *r = mm_region_lock(mm, hva);
		int n = mm_is_huge(r) ? 0 : move_page(m, cpu, mm, hva);

		mm_region_unlock(r);
		if (n < 0)
			break;
		moved += (uint64_t)n;
	}
	return moved;
}

/* Return whether a page is present, and all pages have one protection. */
static bool collapsible(const struct mm *mm, uint64_t hva)
{
	uint64_t any = 0, differ = 0, first = mm_get(mm, hva);

	for (uint32_t i = 0; i < REGION_PAGES; i++) {
		any |= mm_get(mm, hva + i) & (MM_PRESENT | MM_SWAPPED);
		differ |= (mm_get(mm, hva + i) ^ first) & MM_READONLY;
	}
	return any && !differ;
}

/* Under the region's lock. */
static int collapse(struct machine *m, uint32_t cpu, struct mm *mm, uint64_t hva)
{
	int64_t block;

	if (!collapsible(mm, hva))
		return MACHINE_AGAIN;
	block = frame_alloc(m, cpu, FRAME_BLOCK);
	if (block < 0)
		return MACHINE_NOMEM;
	for (uint32_t i = 0; i < REGION_PAGES; i++) {
		uint64_t entry = mm_get(mm, hva + i);

		mm_fill_from(m, mm, entry, (uint32_t)block + i);
		mm_set(m->frames, mm, hva + i, (uint64_t)(block + i) << MM_HFN_SHIFT | MM_PRESENT | (entry & MM_READONLY));
		if (entry & MM_PRESENT)
			frame_free(m, cpu, mm_hfn(entry));
	}
	return 0;
}

int mm_collapse(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t hva)
{
	struct mm *mm = m->vms[vm].mm;
	struct mm_region *r;
	int error = 0;

	if (hva >= mm->pages || hva % REGION_PAGES)
		return mm_misuse(m, cpu, "collapse of what is no 2M range", hva);
	r = mm_region_lock(mm, hva);
	if (!mm_is_huge(r)) {
		error = collapse(m, cpu, mm, hva);
		if (!error)
			mm_set_huge(r, true);
	}
	mm_region_unlock(r);
	return error;
}

int mm_split(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t hva)
{
	struct mm *mm = m->vms[vm].mm;
	struct mm_region *r;

	if (hva >= mm->pages)
		return mm_misuse(m, cpu, "split beyond it", hva);
	r = mm_region_lock(mm, hva);
	mm_set_huge(r, false);
	mm_region_unlock(r);
	return 0;
}

int mm_huge(struct machine *m, uint32_t vm, uint64_t hva)
{
	const struct mm *mm = m->vms[vm].mm;

	return hva < mm->pages && mm_is_huge(&mm->region[hva / REGION_PAGES]);
}

int32_t mm_huge_custody(struct machine *m, uint32_t vm, uint64_t hva, uint32_t hfn, uint32_t tag)
{
	struct mm *mm = m->vms[vm].mm;
	struct mm_region *r;
	int32_t custody = -1;

	if (hva >= mm->pages)
		return -1;
	r = mm_region_lock(mm, hva);
	if (mm_is_huge(r) && mm_hfn(mm_get(mm, hva)) == hfn)
		custody = (int32_t)frame_custody_of_block(m->frames, hfn, tag);
	mm_region_unlock(r);
	return custody;
}
