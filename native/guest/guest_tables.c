/* The guest OS's own page tables: finding and writing entries, all through guest-physical accesses;
 * without EPT, through linear ones. */
#include "guest/guest_tables.h"

#include "core/machine_types.h"
#include "guest/guest_fault.h"
#include "guest/guest_pages.h"
#include "guest/guest_shadow.h"
#include "memory/frame.h"
#include "tlb/tlb.h"
#include "vm/guest_state.h"
#include "walk/vmcs.h"
#include "walk/walk.h"
#include "walk/walk_shadow.h"

/* Find the frame of a page for an access of the OS to its word `index`: by a guest-physical access, or without EPT by a
 * linear one through the OS's map of its memory. */
static enum walk_result reach(struct walk *w, uint64_t gfn, uint32_t index, uint32_t type, uint32_t *hfn)
{
	uint64_t page = gfn;
	struct tlb_entry e;
	enum walk_result r;

	if (w->vmcs->ept) {
		r = walk_physical(w, gfn, type, &e);
	} else {
		page = os_linear(w->guest, gfn);
		w->guest->store.done = false;
		w->linear = page << 12 | index * sizeof(uint64_t);
		w->supervisor = true;
		r = walk_shadow_cached(w, page, type, &e);
		w->supervisor = false;
		if (r == WALK_EXIT)
			w->exit->gpa = gfn << 12 | index * sizeof(uint64_t);
	}
	if (r == WALK_DONE)
		*hfn = e.hfn + (uint32_t)(page - e.page);
	return r;
}

/* Relaxed here and below: guest memory.  Other threads read it when they copy pages for the host. */
static uint64_t load(const struct walk *w, uint32_t hfn, uint32_t index)
{
	return atomic_load_explicit(guest_word(w->m, hfn, index), memory_order_relaxed);
}

static void store(const struct walk *w, uint32_t hfn, uint32_t index, uint64_t value)
{
	atomic_store_explicit(guest_word(w->m, hfn, index), value, memory_order_relaxed);
}

/* reach() for a store of this word, which KVM may emulate if it faults. */
static enum walk_result reach_for_store(struct walk *w, uint64_t gfn, uint32_t index, uint64_t value, uint32_t *hfn)
{
	enum walk_result r = reach(w, gfn, index, ACCESS_WRITE, hfn);

	if (r == WALK_EXIT && !w->vmcs->ept)
		guest_store_faulted(w, value);
	return r;
}

/* Without EPT, words that are zero already are left, so that a store that KVM has emulated is not repeated. */
static enum walk_result zero_page_shadowed(struct walk *w, uint64_t gfn)
{
	uint32_t index = 0, hfn;
	enum walk_result r = reach(w, gfn, 0, ACCESS_READ, &hfn);

	if (r != WALK_DONE)
		return r;
	while (index < FRAME_WORDS && !load(w, hfn, index))
		index++;
	if (index == FRAME_WORDS)
		return WALK_DONE;
	r = reach_for_store(w, gfn, index, 0, &hfn);
	for (; r == WALK_DONE && index < FRAME_WORDS; index++)
		store(w, hfn, index, 0);
	return r;
}

enum walk_result os_zero_page(struct walk *w, uint64_t gfn)
{
	uint32_t hfn;
	enum walk_result r;

	if (!w->vmcs->ept)
		return zero_page_shadowed(w, gfn);
	r = reach(w, gfn, 0, ACCESS_WRITE, &hfn);
	for (uint32_t i = 0; r == WALK_DONE && i < FRAME_WORDS; i++)
		store(w, hfn, i, 0);
	return r;
}

enum walk_result os_alloc_zeroed(struct walk *w, bool mmio, uint64_t *gfn)
{
	uint64_t fresh = guest_gfn_alloc(w->guest, mmio);
	enum walk_result r;

	if (fresh == GUEST_NO_GFN)
		return WALK_GUEST_FAULT;
	r = os_zero_page(w, fresh);
	if (r != WALK_DONE && r != WALK_SKIPPED) {
		guest_gfn_put(w->guest, fresh);
		return r;
	}
	*gfn = fresh;
	return WALK_DONE;
}

static enum walk_result read_entry(struct walk *w, uint64_t table_gfn, uint32_t index, uint64_t *value)
{
	uint32_t hfn;
	enum walk_result r = reach(w, table_gfn, index, ACCESS_READ, &hfn);

	if (r == WALK_DONE)
		*value = load(w, hfn, index);
	return r;
}

enum walk_result os_write_entry(struct walk *w, uint64_t table_gfn, uint32_t index, uint64_t value)
{
	enum walk_result r;
	uint64_t old;
	uint32_t hfn;

	/* Without EPT the store may have been emulated already, and the entry been used since by another vCPU. */
	if (!w->vmcs->ept) {
		r = read_entry(w, table_gfn, index, &old);
		if (r != WALK_DONE || old == value || (old & ~(GPTE_ACCESSED | GPTE_DIRTY)) == value)
			return r;
	}
	r = reach_for_store(w, table_gfn, index, value, &hfn);
	if (r == WALK_DONE)
		store(w, hfn, index, value);
	return r;
}

/* All address spaces share one table for the kernel's part. */
static enum walk_result table_for(struct walk *w, uint32_t level, uint64_t page, uint64_t *gfn)
{
	bool shared = level == GUEST_LEVELS && page >= GUEST_KERNEL_BASE;
	enum walk_result r;

	if (shared && w->guest->leader->kernel_pdpt != GUEST_NO_GFN) {
		*gfn = w->guest->leader->kernel_pdpt;
		return WALK_DONE;
	}
	if (!w->vmcs->ept)
		return os_spare_table(w, gfn);
	r = os_alloc_zeroed(w, false, gfn);
	if (r == WALK_DONE && shared)
		w->guest->leader->kernel_pdpt = *gfn;
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
			if (next != w->guest->leader->kernel_pdpt && w->vmcs->ept)
				guest_gfn_put(w->guest, next);
			return r;
		}
		os_table_linked(w->guest, next);
		gfn = next;
	}
}
