/* The guest OS: demand paging, unmapping, write protection, context switches, and the invalidations that each
 * of them owes (SDM vol. 3A, 4.10.4). */
#include "guest/guest_os.h"

#include "core/counters.h"
#include "core/cpu_types.h"
#include "core/events.h"
#include "core/machine_types.h"
#include "guest/access.h"
#include "guest/guest.h"
#include "guest/guest_pages.h"
#include "guest/guest_promise.h"
#include "guest/guest_shadow.h"
#include "guest/guest_tables.h"
#include "tlb/tlb.h"
#include "tlb/tlb_flush.h"
#include "vm/guest_state.h"
#include "vm/vm.h"
#include "walk/context.h"
#include "walk/vmcs.h"
#include "walk/walk.h"

enum {
	SHARE_ONE_IN = 16,       /* pages mapped to another process's page */
	MMIO_ONE_IN = 8,         /* pages in the second memslot */
	FLUSHING_SWITCH_ONE_IN = 16,
	INVPCID_ALL_ONE_IN = 64,
	LOOK_FOR_PAGE = 256,     /* pages tried in the search for one to unmap */
};

static struct guest_process *current(struct walk *w)
{
	return &w->guest->process[w->guest->current];
}

void os_load_cr3(struct walk *w)
{
	guest_write_cr3(w->guest);
	hw_load_context(w, w->vmcs);
}

enum walk_result os_setup(struct walk *w)
{
	struct guest_process *p = current(w);
	enum walk_result r;

	if (!w->guest->config.paging || p->cr3_gfn != GUEST_NO_GFN)
		return WALK_DONE;
	if (!w->vmcs->ept)
		return os_new_pml4(w, p);
	r = os_alloc_zeroed(w, false, &p->cr3_gfn);
	if (r == WALK_DONE)
		guest_write_cr3(w->guest);
	return r;
}

/* INVLPG, or INVPCID of another process's PCID. */
static enum walk_result invalidate_page(struct walk *w, const struct guest_process *p, uint64_t page)
{
	bool own = p->pcid == current(w)->pcid;
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
	guest_promise(w->m, w->vcpu, gp, gp->gfn, all);
}

/* Apply to all pages of the trace that share the mapping: one, or those of a 2 MiB page. */
static void changed_mapping(struct walk *w, struct guest_process *p, uint64_t page, struct guest_page *gp,
			    bool all)
{
	uint64_t region = page >> 9, i;

	if (!gp->huge) {
		changed(w, gp, all);
		if (all)
			gp->gfn = GUEST_NO_GFN;
		gp->writable = 0;
		return;
	}
	i = (uint64_t)(gp - p->page);
	while (i && p->pages[i - 1] >> 9 == region)
		i--;
	for (; i < p->page_count && p->pages[i] >> 9 == region; i++) {
		changed(w, &p->page[i], all);
		if (all) {
			p->page[i].gfn = GUEST_NO_GFN;
			p->page[i].huge = 0;
		}
		p->page[i].writable = 0;
	}
}

/* Write the mapping in the OS's records into the page's entry. */
static enum walk_result install(struct walk *w, struct guest_process *p, uint64_t page,
				const struct guest_page *gp)
{
	uint32_t level = gp->huge ? 2 : 1;
	uint64_t below = gp->huge ? page & 511 : 0, table, entry;
	uint64_t value = (uint64_t)(gp->gfn - below) << 12 | GPTE_PRESENT | GPTE_USER |
			 (gp->writable ? GPTE_WRITABLE : 0) | (gp->huge ? GPTE_PAGE_SIZE : 0) |
			 (page >= GUEST_KERNEL_BASE ? GPTE_GLOBAL : 0);
	enum walk_result r = os_find_table(w, p, page, level, true, &table, &entry);

	if (r != WALK_DONE)
		return r;
	return os_write_entry(w, table, page >> (level - 1) * 9 & 511, value);
}

static enum walk_result unmap(struct walk *w, struct guest_process *p, uint64_t page, struct guest_page *gp)
{
	uint32_t level = gp->huge ? 2 : 1;
	uint64_t gfn = gp->gfn - (gp->huge ? page & 511 : 0), table, entry;
	enum walk_result r = os_find_table(w, p, page, level, false, &table, &entry);

	if (r == WALK_DONE)
		r = os_write_entry(w, table, page >> (level - 1) * 9 & 511, 0);
	/* WALK_GUEST_FAULT: the host lost the table's contents; the OS's records are still valid. */
	if (r == WALK_EXIT)
		return r;
	r = invalidate_page(w, p, page);
	if (r != WALK_DONE)
		return r;
	changed_mapping(w, p, page, gp, true);
	guest_gfn_put(w->guest, gfn);
	return WALK_DONE;
}

static enum walk_result protect(struct walk *w, struct guest_process *p, uint64_t page, struct guest_page *gp)
{
	struct guest_page read_only = *gp;
	enum walk_result r;

	read_only.writable = 0;
	r = install(w, p, page, &read_only);
	if (r == WALK_EXIT)
		return r;
	r = invalidate_page(w, p, page);
	if (r != WALK_DONE)
		return r;
	changed_mapping(w, p, page, gp, false);
	return WALK_DONE;
}

/* Return the index of the process's next page that is mapped (and writable), from where the last search ended,
 * or page_count. */
static uint64_t find_mapped(struct guest_process *p, bool writable)
{
	for (uint32_t i = 0; i < LOOK_FOR_PAGE && p->page_count; i++) {
		uint64_t at = p->hand++ % p->page_count;

		if (p->page[at].gfn != GUEST_NO_GFN && (!writable || p->page[at].writable))
			return at;
	}
	return p->page_count;
}

static enum walk_result unmap_some(struct walk *w, struct guest_process *p)
{
	uint64_t hand = p->hand, at = find_mapped(p, false);
	enum walk_result r;

	if (at == p->page_count)
		return WALK_DONE;
	r = unmap(w, p, p->pages[at], &p->page[at]);
	if (r == WALK_EXIT)
		p->hand = hand; /* retry this page after the exit */
	return r;
}

/* Return a page of another process to share, or GUEST_NO_GFN. */
static uint64_t shareable(struct walk *w)
{
	struct guest *g = w->guest;
	struct guest_process *p = &g->process[guest_random(g) % g->processes];
	struct guest_page *gp;

	if (guest_random(g) % SHARE_ONE_IN || !p->page_count)
		return GUEST_NO_GFN;
	gp = &p->page[guest_random(g) % p->page_count];
	return gp->huge ? GUEST_NO_GFN : gp->gfn;
}

/* Return a block for 2 MiB of linear addresses, if the guest uses blocks, has one, and the region is one of
 * those that get one. */
static uint64_t block_for(struct walk *w, const struct guest_process *p, uint64_t page)
{
	uint64_t region = page >> 9, table, entry;

	if (!w->guest->config.hugepages || page >= GUEST_KERNEL_BASE || (region * 0x9e3779b97f4a7c15) >> 62)
		return GUEST_NO_GFN;
	/* Only while no page of the region is mapped by a 4 KiB page. */
	if (os_find_table(w, p, page, 2, false, &table, &entry) == WALK_DONE && (entry & GPTE_PRESENT))
		return GUEST_NO_GFN;
	return guest_block_alloc(w->guest);
}

static void map_block(struct guest_process *p, uint64_t page, uint64_t gfn)
{
	uint64_t region = page >> 9, i = 0;

	while (p->pages[i] >> 9 != region)
		i++;
	for (; i < p->page_count && p->pages[i] >> 9 == region; i++) {
		p->page[i].gfn = (uint32_t)(gfn + (p->pages[i] & 511));
		p->page[i].huge = 1;
		p->page[i].writable = 1;
	}
}

/* Choose a frame or a block for a page that is not mapped. */
static enum walk_result choose(struct walk *w, struct guest_process *p, uint64_t page, struct guest_page *fresh)
{
	struct guest *g = w->guest;
	uint64_t gfn = block_for(w, p, page);
	enum walk_result r;

	if (gfn != GUEST_NO_GFN) {
		fresh->huge = 1;
		fresh->gfn = (uint32_t)(gfn + (page & 511));
		return WALK_DONE;
	}
	gfn = shareable(w);
	if (gfn != GUEST_NO_GFN) {
		guest_gfn_get(g, gfn);
	} else {
		r = os_alloc_zeroed(w, g->config.mmio_gfn && page % MMIO_ONE_IN == 0, &gfn);
		if (r != WALK_DONE)
			return r;
	}
	fresh->gfn = (uint32_t)gfn;
	return WALK_DONE;
}

/* choose(), or without EPT the choice of the same action before a VM exit: its entry may have been stored. */
static enum walk_result choose_or_keep(struct walk *w, struct guest_process *p, uint64_t page, struct guest_page *fresh)
{
	struct guest_choices *c = &w->guest->choices;

	if (!c->mapped || c->mapped_page != page)
		return choose(w, p, page, fresh);
	*fresh = c->mapping;
	c->mapped = false;
	return WALK_DONE;
}

static uint64_t first_gfn(const struct guest_page *gp, uint64_t page)
{
	return gp->gfn - (gp->huge ? page & 511 : 0);
}

static enum walk_result map(struct walk *w, struct guest_process *p, uint64_t page, struct guest_page *gp)
{
	struct guest *g = w->guest;
	struct guest_page fresh = { .writable = 1, .changed = gp->changed, .protected_ = gp->protected_ };
	enum walk_result r = choose_or_keep(w, p, page, &fresh);

	if (r != WALK_DONE)
		return r;
	r = install(w, p, page, &fresh);
	if (r == WALK_EXIT && !w->vmcs->ept) {
		g->choices.mapped = true;
		g->choices.mapped_page = page;
		g->choices.mapping = fresh;
		return r;
	}
	if (r != WALK_DONE) {
		guest_gfn_put(g, first_gfn(&fresh, page));
		return r;
	}
	if (fresh.huge)
		map_block(p, page, first_gfn(&fresh, page));
	else
		*gp = fresh;
	return WALK_DONE;
}

/* Choose a mapped page of any process.  False: none was found. */
static bool choose_victim(struct guest *g, struct guest_choices *c)
{
	uint64_t start = guest_random(g);

	for (uint32_t i = 0; i < g->processes; i++) {
		c->reclaimed_from = (uint32_t)((start + i) % g->processes);
		c->reclaimed = find_mapped(&g->process[c->reclaimed_from], false);
		if (c->reclaimed != g->process[c->reclaimed_from].page_count)
			return true;
	}
	return false;
}

enum walk_result os_reclaim(struct walk *w)
{
	struct guest_choices *c = &w->guest->choices;
	struct guest_process *p;
	enum walk_result r;

	p = &w->guest->process[c->reclaimed_from];
	if (!c->reclaiming || p->page[c->reclaimed].gfn == (uint32_t)GUEST_NO_GFN) {
		if (!choose_victim(w->guest, c))
			return WALK_GUEST_FAULT;
		p = &w->guest->process[c->reclaimed_from];
	}
	r = unmap(w, p, p->pages[c->reclaimed], &p->page[c->reclaimed]);
	/* Without EPT, finish it after the VM exit. */
	c->reclaiming = r == WALK_EXIT && !w->vmcs->ept;
	return r;
}

enum walk_result os_page_fault(struct walk *w, uint64_t page, uint32_t type)
{
	struct guest *g = w->guest;
	struct guest_process *p = current(w);
	struct guest_page *gp = guest_page_find(g, g->current, page);
	enum walk_result r;

	/* Without EPT the fault exited, and has done so then. */
	if (w->vmcs->ept)
		page_fault_invalidate(w->tlb, page);
	count(w->cpu->counters, COUNT_GUEST_FAULTS, 1);
	if (!gp)
		return WALK_GUEST_FAULT;
	if (gp->gfn == GUEST_NO_GFN) {
		r = map(w, p, page, gp);
		for (int i = 0; r == WALK_GUEST_FAULT && i < RECLAIM_TRIES; i++) {
			r = os_reclaim(w);
			if (r == WALK_DONE)
				r = map(w, p, page, gp);
		}
		return r;
	}
	if (type == ACCESS_WRITE && !gp->writable) {
		struct guest_page writable = *gp;

		writable.writable = 1;
		r = install(w, p, page, &writable);
		if (r == WALK_DONE)
			gp->writable = 1;
		return r;
	}
	/* The entry contradicts the OS's records: the host lost the table's contents. */
	return install(w, p, page, gp);
}

/* Do one access to a global kernel page; now and then the kernel changes one of them. */
static enum walk_result touch_kernel(struct walk *w)
{
	struct guest *g = w->guest;
	uint32_t i = g->kernel_next % GUEST_KERNEL_PAGES;
	uint64_t page = GUEST_KERNEL_BASE + i;
	enum walk_result r = WALK_DONE;

	if (g->kernel_next % 61 == 60 && g->kernel[i].gfn != GUEST_NO_GFN)
		r = unmap(w, current(w), page, &g->kernel[i]);
	if (r == WALK_DONE)
		r = guest_access_slow(w, (uint64_t)(g->kernel_next & 1) << 62 | page << 12);
	if (r == WALK_DONE || r == WALK_SKIPPED)
		g->kernel_next++;
	return r;
}

static enum walk_result switch_process(struct walk *w)
{
	struct guest *g = w->guest;
	struct guest_process *p;
	enum walk_result r;

	if (!w->vmcs->ept) {
		r = os_switch_shadowed(w);
		return r == WALK_DONE ? touch_kernel(w) : r;
	}
	g->current = (g->current + 1) % g->processes;
	p = current(w);
	os_load_cr3(w);
	count(w->cpu->counters, COUNT_GUEST_SWITCHES, 1);
	if (!g->config.pcid || guest_random(g) % FLUSHING_SWITCH_ONE_IN == 0) {
		mov_to_cr3(w->tlb, p->pcid);
		count(w->cpu->counters, COUNT_GUEST_INVALIDATIONS, 1);
	}
	if (guest_random(g) % INVPCID_ALL_ONE_IN == 0) {
		invpcid_all(w->tlb);
		count(w->cpu->counters, COUNT_GUEST_INVALIDATIONS, 1);
	}
	os_schedule(g, GUEST_SWITCH);
	r = os_setup(w);
	return r == WALK_DONE ? touch_kernel(w) : r;
}

static enum walk_result unmap_event(struct walk *w)
{
	struct guest *g = w->guest;
	/* Mostly the current process; an OS also reclaims pages from processes that do not run. */
	struct guest_process *p = guest_random(g) % 4 || !g->config.pcid ?
					  current(w) : &g->process[guest_random(g) % g->processes];
	enum walk_result r;

	if (p->cr3_gfn == GUEST_NO_GFN)
		p = current(w);
	r = unmap_some(w, p);
	if (r != WALK_EXIT)
		os_schedule(g, GUEST_UNMAP);
	return r;
}

static enum walk_result protect_event(struct walk *w)
{
	struct guest_process *p = current(w);
	uint64_t hand = p->hand, at = find_mapped(p, true);
	enum walk_result r = WALK_DONE;

	if (at != p->page_count)
		r = protect(w, p, p->pages[at], &p->page[at]);
	if (r == WALK_EXIT)
		p->hand = hand;
	else
		os_schedule(w->guest, GUEST_PROTECT);
	return r;
}

enum walk_result os_events(struct walk *w)
{
	struct guest *g = w->guest;
	enum walk_result r = WALK_DONE;

	if (!g->config.paging || !g->processes)
		return r;
	if (g->choices.invpcid_all) {
		r = guest_exit_invpcid(w, 2, 0, 0);
		if (r != WALK_DONE)
			return r;
		g->choices.invpcid_all = false;
	}
	if (g->clock >= g->due[GUEST_SWITCH])
		r = switch_process(w);
	if (r != WALK_EXIT && g->clock >= g->due[GUEST_UNMAP])
		r = unmap_event(w);
	if (r != WALK_EXIT && g->clock >= g->due[GUEST_PROTECT])
		r = protect_event(w);
	return r;
}
