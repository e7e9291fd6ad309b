/* See guest_mapping.h. */
#include "guest/guest_mapping.h"

#include "core/counters.h"
#include "core/cpu_types.h"
#include "core/events.h"
#include "core/machine_types.h"
#include "guest/guest.h"
#include "guest/guest_batch.h"
#include "guest/guest_pages.h"
#include "guest/guest_promise.h"
#include "guest/guest_shadow.h"
#include "guest/guest_tables.h"
#include "tlb/tlb_flush.h"
#include "vm/guest_state.h"
#include "vm/vm.h"
#include "walk/vmcs.h"
#include "walk/walk.h"

enum {
	SHARE_ONE_IN = 16,       /* pages mapped to another process's page */
	MMIO_ONE_IN = 8,         /* pages in the second memslot */
	FILE_RAM_ONE_IN = 4,     /* pages of files that are not in the second memslot */
};

/* INVLPG, or INVPCID of another process's PCID. */
static enum walk_result invalidate_page(struct walk *w, const struct guest_process *p, uint64_t page)
{
	bool own = p->pcid == guest_current(w->guest)->pcid;
	enum walk_result r = WALK_DONE;

	if (!w->vmcs->ept)
		r = own ? guest_exit_insn(w, GUEST_INSN_INVLPG, canonical_address(page << 12))
			: guest_exit_invpcid(w, 0, p->pcid, page << 12);
	else if (own)
		invlpg(w->tlb, page);
	else
		invpcid_address(w->tlb, p->pcid, page);
	if (r != WALK_DONE)
		return r;
	count(w->cpu->counters, COUNT_GUEST_INVALIDATIONS, 1);
	event_record(w->m, w->cpu->id, event_of(w->vcpu->vm, EVENT_GUEST_INVALIDATE), w->vcpu->id, page);
	return WALK_DONE;
}

/* Record that the guest removed a right. */
static void changed(struct walk *w, struct guest_page *gp, bool all)
{
	w->guest->clock++;
	guest_promise(w->m, w->vcpu->vm, w->guest, gp, guest_mapping_of(gp).gfn, all, INVALIDATED_BY_ITSELF);
	if (all)
		guest_page_unmap(gp);
	else
		guest_page_protect(gp);
}

/* Apply to all pages of the trace that share the mapping: one, or those of a 2 MiB page. */
static void changed_mapping(struct walk *w, struct guest_process *p, uint64_t page, struct guest_page *gp,
			    bool all)
{
	uint64_t region = page >> 9, i;

	if (!guest_mapping_of(gp).huge) {
		changed(w, gp, all);
		return;
	}
	i = (uint64_t)(gp - p->page);
	while (i && p->pages[i - 1] >> 9 == region)
		i--;
	for (; i < p->page_count && p->pages[i] >> 9 == region; i++)
		changed(w, &p->page[i], all);
}

enum walk_result os_install(struct walk *w, const struct guest_process *p, uint64_t page, struct guest_mapping to)
{
	uint32_t level = to.huge ? 2 : 1;
	uint64_t below = to.huge ? page & 511 : 0, table, entry;
	uint64_t value = (uint64_t)(to.gfn - below) << 12 | GPTE_PRESENT | GPTE_USER |
			 (to.writable ? GPTE_WRITABLE : 0) | (to.huge ? GPTE_PAGE_SIZE : 0) |
			 (page >= GUEST_KERNEL_BASE ? GPTE_GLOBAL : 0);
	enum walk_result r = os_find_table(w, p, page, level, true, &table, &entry);

	if (r != WALK_DONE)
		return r;
	/* An OS that gathers changes keeps the flags of a page that stays. */
	if (os_batches(w) && entry & GPTE_PRESENT && !((entry ^ value) & GPTE_ADDRESS))
		value |= entry & (GPTE_ACCESSED | GPTE_DIRTY);
	return os_write_entry(w, table, page >> (level - 1) * 9 & 511, value);
}

enum walk_result os_clear_entry(struct walk *w, const struct guest_process *p, uint64_t page, bool huge)
{
	uint32_t level = huge ? 2 : 1;
	uint64_t table, entry;
	enum walk_result r = os_find_table(w, p, page, level, false, &table, &entry);

	return r == WALK_DONE ? os_write_entry(w, table, page >> (level - 1) * 9 & 511, 0) : r;
}

static uint64_t first_gfn(struct guest_mapping mapping, uint64_t page)
{
	return mapping.gfn - (mapping.huge ? page & 511 : 0);
}

/* The page's entry is clear, and its translation invalid. */
static void unmapped(struct walk *w, struct guest_process *p, uint64_t page, struct guest_page *gp)
{
	struct guest_mapping was = guest_mapping_of(gp);

	changed_mapping(w, p, page, gp, true);
	guest_gfn_put(w->guest, first_gfn(was, page));
}

enum walk_result os_unmap(struct walk *w, struct guest_process *p, uint64_t page, struct guest_page *gp)
{
	enum walk_result r = os_clear_entry(w, p, page, guest_mapping_of(gp).huge);

	/* WALK_GUEST_FAULT: the host lost the table's contents; the OS's records are still valid. */
	if (r == WALK_EXIT)
		return r;
	r = invalidate_page(w, p, page);
	if (r == WALK_DONE)
		unmapped(w, p, page, gp);
	return r;
}

enum walk_result os_unmap_uncached(struct walk *w, struct guest_process *p, uint64_t page, struct guest_page *gp)
{
	enum walk_result r = os_clear_entry(w, p, page, guest_mapping_of(gp).huge);

	/* WALK_GUEST_FAULT: as in os_unmap(). */
	if (r == WALK_EXIT)
		return r;
	unmapped(w, p, page, gp);
	return WALK_DONE;
}

enum walk_result os_protect(struct walk *w, struct guest_process *p, uint64_t page, struct guest_page *gp)
{
	struct guest_mapping read_only = guest_mapping_of(gp);
	enum walk_result r;

	read_only.writable = false;
	r = os_install(w, p, page, read_only);
	if (r == WALK_EXIT)
		return r;
	r = invalidate_page(w, p, page);
	if (r != WALK_DONE)
		return r;
	changed_mapping(w, p, page, gp, false);
	return WALK_DONE;
}

/* Return the index of the next page that is mapped with one of these rights; page_count: the search found none. */
static uint64_t find_mapped(struct guest_process *p, bool writable, bool read_only)
{
	for (uint32_t i = 0; i < LOOK_FOR_PAGE && p->page_count; i++) {
		uint64_t at = p->hand++ % p->page_count;
		struct guest_mapping mapping = guest_mapping_of(&p->page[at]);

		if (mapping.gfn != GUEST_NO_GFN && (mapping.writable ? writable : read_only))
			return at;
	}
	return p->page_count;
}

uint64_t os_find_mapped(struct guest_process *p, bool writable)
{
	return find_mapped(p, true, !writable);
}

uint64_t os_find_read_only(struct guest_process *p)
{
	return find_mapped(p, false, true);
}

/* Return a page of another process to share, or GUEST_NO_GFN. */
static uint64_t shareable(struct walk *w)
{
	struct guest *g = w->guest;
	struct guest_process *p = &g->process[guest_random(g) % g->processes];
	struct guest_mapping mapping;

	if (guest_random(g) % SHARE_ONE_IN || !p->page_count)
		return GUEST_NO_GFN;
	mapping = guest_mapping_of(&p->page[guest_random(g) % p->page_count]);
	return mapping.huge ? GUEST_NO_GFN : mapping.gfn;
}

/* Return a block that maps 2 MiB of linear addresses already, for another mapping of it, or GUEST_NO_GFN. */
static uint64_t shareable_block(struct walk *w)
{
	struct guest *g = w->guest;
	struct guest_process *p = &g->process[guest_random(g) % g->processes];
	struct guest_mapping mapping;
	uint64_t at, block;

	if (!g->config.share_blocks || !p->page_count)
		return GUEST_NO_GFN;
	at = guest_random(g) % p->page_count;
	mapping = guest_mapping_of(&p->page[at]);
	if (!mapping.huge || mapping.gfn == (uint32_t)GUEST_NO_GFN)
		return GUEST_NO_GFN;
	block = first_gfn(mapping, p->pages[at]);
	guest_gfn_get(g, block);
	return block;
}

/* Return a block for 2 MiB of linear addresses, if the guest uses blocks, has one, and the region is one of
 * those that get one. */
static uint64_t block_for(struct walk *w, const struct guest_process *p, uint64_t page)
{
	uint64_t region = page >> 9, table, entry, block;

	if (!w->guest->config.hugepages || page >= GUEST_KERNEL_BASE || (region * 0x9e3779b97f4a7c15) >> 62)
		return GUEST_NO_GFN;
	/* Only while no page of the region is mapped by a 4 KiB page. */
	if (os_find_table(w, p, page, 2, false, &table, &entry) == WALK_DONE && (entry & GPTE_PRESENT))
		return GUEST_NO_GFN;
	block = shareable_block(w);
	return block == GUEST_NO_GFN ? guest_block_alloc(w->guest) : block;
}

static void map_block(struct guest_process *p, uint64_t page, uint64_t gfn, bool writable)
{
	uint64_t region = page >> 9, i = 0;

	while (p->pages[i] >> 9 != region)
		i++;
	for (; i < p->page_count && p->pages[i] >> 9 == region; i++)
		guest_page_map(&p->page[i], (struct guest_mapping){ (uint32_t)(gfn + (p->pages[i] & 511)), writable, true });
}

/* Get a page of memory.  A device fills a file's page, so the OS does not touch it through its own map of memory.  Files are
 * on the device of the second memslot as well, and one address has now a page of RAM and now one of that device. */
static enum walk_result new_page(struct walk *w, uint64_t page, uint64_t *gfn)
{
	struct guest *g = w->guest;

	if (!os_batches(w) || !g->leader->config.file_pages)
		return os_alloc_zeroed(w, g->config.mmio_gfn && page % MMIO_ONE_IN == 0, gfn);
	*gfn = guest_gfn_alloc(g, g->config.mmio_gfn && guest_random(g) % FILE_RAM_ONE_IN != 0);
	return *gfn == GUEST_NO_GFN ? WALK_GUEST_FAULT : WALK_DONE;
}

/* Choose a frame or a block for a page that is not mapped. */
static enum walk_result choose(struct walk *w, struct guest_process *p, uint64_t page,
			       struct guest_mapping *fresh)
{
	struct guest *g = w->guest;
	uint64_t gfn = block_for(w, p, page);
	enum walk_result r;

	if (gfn != GUEST_NO_GFN) {
		fresh->huge = true;
		fresh->gfn = (uint32_t)(gfn + (page & 511));
		return WALK_DONE;
	}
	gfn = shareable(w);
	if (gfn != GUEST_NO_GFN) {
		guest_gfn_get(g, gfn);
	} else {
		r = new_page(w, page, &gfn);
		if (r != WALK_DONE)
			return r;
	}
	fresh->gfn = (uint32_t)gfn;
	return WALK_DONE;
}

/* choose(), or without EPT the choice of the same action before a VM exit: its entry may have been stored. */
static enum walk_result choose_or_keep(struct walk *w, struct guest_process *p, uint64_t page,
				       struct guest_mapping *fresh)
{
	struct guest_choices *c = &w->guest->choices;

	if (!c->mapped || c->mapped_page != page)
		return choose(w, p, page, fresh);
	*fresh = c->mapping;
	c->mapped = false;
	return WALK_DONE;
}

void os_map_pages(struct guest_process *p, uint64_t page, struct guest_page *gp, struct guest_mapping fresh)
{
	if (fresh.huge)
		map_block(p, page, first_gfn(fresh, page), fresh.writable);
	else
		guest_page_map(gp, fresh);
}

/* map() for an OS with threads on other vCPUs: the record comes first, for as soon as the entry is there, KVM may find
 * it for them.  Behind a VM exit os_page_fault() finds the record, and goes on. */
static enum walk_result map_for_all(struct walk *w, struct guest_process *p, uint64_t page, struct guest_page *gp)
{
	struct guest_mapping fresh = { .writable = true };
	enum walk_result r;

	os_batch_reap(w->guest);
	r = choose(w, p, page, &fresh);
	if (r != WALK_DONE)
		return r;
	os_map_pages(p, page, gp, fresh);
	r = os_install(w, p, page, fresh);
	if (r != WALK_GUEST_FAULT)
		return r;
	/* No memory for a table; no other page can be in a block that none of its pages was in. */
	for (uint64_t i = 0; fresh.huge && i < p->page_count; i++)
		if (p->pages[i] >> 9 == page >> 9)
			guest_page_unmap(&p->page[i]);
	guest_page_unmap(gp);
	guest_gfn_put(w->guest, first_gfn(fresh, page));
	return r;
}

enum walk_result os_map(struct walk *w, struct guest_process *p, uint64_t page, struct guest_page *gp)
{
	struct guest *g = w->guest;
	struct guest_mapping fresh = { .writable = true };
	enum walk_result r;

	if (os_batches(w))
		return map_for_all(w, p, page, gp);
	r = choose_or_keep(w, p, page, &fresh);
	if (r != WALK_DONE)
		return r;
	r = os_install(w, p, page, fresh);
	if (r == WALK_EXIT && !w->vmcs->ept) {
		g->choices.mapped = true;
		g->choices.mapped_page = page;
		g->choices.mapping = fresh;
		return r;
	}
	if (r != WALK_DONE) {
		guest_gfn_put(g, first_gfn(fresh, page));
		return r;
	}
	os_map_pages(p, page, gp, fresh);
	return WALK_DONE;
}
