/* The guest OS's own page tables: finding and writing entries, all through guest-physical accesses. */
#include "guest/guest_tables.h"

#include "core/machine_types.h"
#include "guest/guest_pages.h"
#include "tlb/tlb.h"
#include "vm/guest_state.h"
#include "walk/walk.h"

static enum walk_result zero_page(struct walk *w, uint64_t gfn)
{
	struct tlb_entry e;
	enum walk_result r = walk_physical(w, gfn, ACCESS_WRITE, &e);

	if (r != WALK_DONE)
		return r;
	/* Relaxed: guest memory.  Other threads read it when they copy pages for the host. */
	for (uint32_t i = 0; i < 512; i++)
		atomic_store_explicit(guest_word(w->m, e.hfn + (uint32_t)(gfn - e.page), i), 0,
				      memory_order_relaxed);
	return WALK_DONE;
}

enum walk_result os_alloc_zeroed(struct walk *w, bool mmio, uint64_t *gfn)
{
	uint64_t fresh = guest_gfn_alloc(w->guest, mmio);
	enum walk_result r;

	if (fresh == GUEST_NO_GFN)
		return WALK_GUEST_FAULT;
	r = zero_page(w, fresh);
	if (r != WALK_DONE && r != WALK_SKIPPED) {
		guest_gfn_put(w->guest, fresh);
		return r;
	}
	*gfn = fresh;
	return WALK_DONE;
}

enum walk_result os_write_entry(struct walk *w, uint64_t table_gfn, uint32_t index, uint64_t value)
{
	struct tlb_entry e;
	enum walk_result r = walk_physical(w, table_gfn, ACCESS_WRITE, &e);

	if (r != WALK_DONE)
		return r;
	atomic_store_explicit(guest_word(w->m, e.hfn + (uint32_t)(table_gfn - e.page), index), value,
			      memory_order_relaxed);
	return WALK_DONE;
}

static enum walk_result read_entry(struct walk *w, uint64_t table_gfn, uint32_t index, uint64_t *value)
{
	struct tlb_entry e;
	enum walk_result r = walk_physical(w, table_gfn, ACCESS_READ, &e);

	if (r != WALK_DONE)
		return r;
	*value = atomic_load_explicit(guest_word(w->m, e.hfn + (uint32_t)(table_gfn - e.page), index),
				      memory_order_relaxed);
	return WALK_DONE;
}

/* All address spaces share one table for the kernel's part. */
static enum walk_result table_for(struct walk *w, uint32_t level, uint64_t page, uint64_t *gfn)
{
	bool shared = level == GUEST_LEVELS && page >= GUEST_KERNEL_BASE;
	enum walk_result r;

	if (shared && w->guest->kernel_pdpt != GUEST_NO_GFN) {
		*gfn = w->guest->kernel_pdpt;
		return WALK_DONE;
	}
	r = os_alloc_zeroed(w, false, gfn);
	if (r == WALK_DONE && shared)
		w->guest->kernel_pdpt = *gfn;
	return r;
}

enum walk_result os_find_table(struct walk *w, const struct guest_process *p, uint64_t page, uint32_t level,
			       bool create, uint64_t *table_gfn, uint64_t *entry)
{
	uint64_t gfn = p->cr3_gfn, value, next;
	enum walk_result r;

	for (uint32_t at = GUEST_LEVELS;; at--) {
		uint32_t index = page >> (at - 1) * 9 & 511;

		r = read_entry(w, gfn, index, &value);
		if (r != WALK_DONE)
			return r;
		if (at == level || (value & GPTE_PRESENT && value & GPTE_PAGE_SIZE)) {
			*table_gfn = gfn;
			*entry = value;
			return WALK_DONE;
		}
		if (value & GPTE_PRESENT) {
			gfn = (value & GPTE_ADDRESS) >> 12;
			continue;
		}
		if (!create)
			return WALK_GUEST_FAULT;
		r = table_for(w, at, page, &next);
		if (r != WALK_DONE)
			return r;
		r = os_write_entry(w, gfn, index, next << 12 | GPTE_PRESENT | GPTE_WRITABLE | GPTE_USER);
		if (r != WALK_DONE) {
			if (next != w->guest->kernel_pdpt)
				guest_gfn_put(w->guest, next);
			return r;
		}
		gfn = next;
	}
}
