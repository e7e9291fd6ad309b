#include "ept/spte.h"

#include "core/chaos.h"
#include "core/counters.h"
#include "core/cpu_types.h"
#include "core/events.h"
#include "core/machine_types.h"
#include "ept/ept.h"
#include "memory/custody.h"
#include "memory/frame.h"
#include "oracle/ledger.h"
#include "oracle/oracle.h"
#include "sync/cpu.h"
#include "tlb/tlb.h"
#include "vm/vm.h"

enum { MEMORY_TYPE_WB = 6 << 3, NO_VCPU = -1 };

uint64_t make_spte(uint32_t hfn, uint32_t custody, uint32_t level, int writable, int host_writable)
{
	uint64_t spte = SPTE_READABLE | SPTE_EXECUTABLE | SPTE_ACCESSED | MEMORY_TYPE_WB;

	spte |= (uint64_t)hfn << SPTE_HFN_SHIFT;
	spte |= (uint64_t)(custody & FRAME_TAG_MASK) << SPTE_CUSTODY_SHIFT;
	if (level > PG_LEVEL_4K)
		spte |= SPTE_PAGE_SIZE;
	if (host_writable)
		spte |= UINT64_C(1) << SPTE_HOST_WRITABLE_BIT;
	if (writable && host_writable)
		spte |= SPTE_WRITABLE | SPTE_DIRTY | UINT64_C(1) << SPTE_MMU_WRITABLE_BIT;
	return spte;
}

uint64_t make_nonleaf_spte(struct machine *m, uint32_t table)
{
	return SPTE_READABLE | SPTE_WRITABLE | SPTE_EXECUTABLE | SPTE_ACCESSED |
	       (uint64_t)table << SPTE_HFN_SHIFT |
	       (uint64_t)frame_tag(m->frames, table) << SPTE_CUSTODY_SHIFT;
}

bool spte_child_holds(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t spte, uint32_t level, uint64_t gfn)
{
	uint32_t table = spte_hfn(spte);
	struct violation_report r = {
		.kinds = 1u << VIOLATION_WALK_AFTER_FREE,
		.vm = vm,
		.vcpu = (uint32_t)NO_VCPU,
		.promise = PROMISE_FREE,
		.hfn = table,
		.gfn = gfn,
		.walk_level = level - 1,
	};

	if (ept_is_table(m, table) && frame_tag(m->frames, table) == spte_custody(spte))
		return true;
	r.tag_now = table < m->frames->count ? frame_host_tag(m->frames, table) : 0;
	oracle_report(m, cpu, &r);
	return false;
}

void spte_set_pfn(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t gfn, uint64_t spte, uint32_t level)
{
	/* spte_to_pfn(): for a huge page the first frame; its struct page stands for all. */
	uint32_t hfn = spte_hfn(spte), custody = spte_leaf_custody(spte, level);
	struct violation_report r = {
		.kinds = 1u << VIOLATION_USE_AFTER_FREE,
		.vm = vm,
		.vcpu = (uint32_t)NO_VCPU,
		.access = ACCESS_WRITE,
		.promise = PROMISE_FREE,
		.hfn = hfn,
		.gfn = gfn,
	};

	if (!(spte & (SPTE_ACCESSED | SPTE_DIRTY)) || hfn >= m->frames->count)
		return;
	count(m->cpus[cpu].counters, COUNT_PFNS_SET, 1);
	if (!frame_freed_since(m->frames, hfn, custody))
		return;
	r.tag_now = frame_host_tag(m->frames, hfn);
	oracle_report(m, cpu, &r);
}

int tdp_table_holds(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t spte, uint32_t level, uint64_t gfn)
{
	return spte_child_holds(m, cpu, vm, spte, level, gfn);
}

void spte_ungrant_at(struct ledger_cursor *c, struct frames *f, uint64_t gfn, uint64_t spte, uint32_t level, bool read,
		     bool write)
{
	uint32_t hfn = spte_hfn(spte);

	for (uint64_t end = gfn + kvm_pages_per_hpage(level); gfn < end; gfn++, hfn++)
		ledger_ungrant_one(c, f, gfn, hfn, read, write);
}

/* The change of rights when `old` becomes `new_spte`. */
struct change {
	bool grant, grant_write;      /* before the swap */
	bool ungrant, ungrant_write;  /* after the swap */
};

static struct change change_of(uint64_t old, uint64_t new_spte, uint32_t level)
{
	struct change c = { 0 };
	bool was = is_last_spte(old, level), is = is_last_spte(new_spte, level);

	if (was && is && spte_hfn(old) == spte_hfn(new_spte) && spte_custody(old) == spte_custody(new_spte)) {
		c.grant_write = new_spte & ~old & SPTE_WRITABLE;
		c.ungrant_write = old & ~new_spte & SPTE_WRITABLE;
		return c;
	}
	c.grant = is;
	/* A huge leaf that gives way to a table is being split: the children inherit its rights.  A table that
	 * gives way to a leaf loses its rights in handle_removed_pt(); until then both count. */
	c.ungrant = was && !is_nonleaf_spte(new_spte, level);
	return c;
}

static void grant_before(struct machine *m, uint32_t vm, uint64_t gfn, uint64_t new_spte, uint32_t level,
			 struct change c)
{
	if (c.grant)
		spte_grant(m, vm, gfn, new_spte, level);
	else if (c.grant_write)
		spte_grant_write(m, vm, gfn, new_spte, level);
}

static void undo_grant(struct machine *m, uint32_t vm, uint64_t gfn, uint64_t new_spte, uint32_t level,
		       struct change c)
{
	if (c.grant)
		spte_ungrant_all(m, vm, gfn, new_spte, level);
	else if (c.grant_write)
		spte_ungrant(m, vm, gfn, new_spte, level, false, true);
}

static void ungrant_after(struct machine *m, uint32_t vm, uint64_t gfn, uint64_t old, uint32_t level,
			  struct change c)
{
	if (c.ungrant)
		spte_ungrant_all(m, vm, gfn, old, level);
	else if (c.ungrant_write)
		spte_ungrant(m, vm, gfn, old, level, false, true);
}

/* Mark a table that its entry does not lead to any more: walks from cached pointers to it are counted (walk.c). */
static void unlinked_after(const struct machine *m, uint64_t old, uint32_t level)
{
	if (is_nonleaf_spte(old, level) && ept_is_table(m, spte_hfn(old)))
		frame_set_unlinked(m->frames, spte_hfn(old), true);
}

static void chaos(struct machine *m, uint32_t cpu)
{
	if (m->config.chaos)
		chaos_point(m, cpu);
}

bool spte_try_change(struct machine *m, uint32_t cpu, uint32_t vm, _Atomic uint64_t *sptep, uint32_t level,
		     uint64_t gfn, uint64_t old, uint64_t new_spte)
{
	struct change c = change_of(old, new_spte, level);

	/* Most failures are found here, where there is no grant to undo.  Relaxed: the swap decides. */
	if (atomic_load_explicit(sptep, memory_order_relaxed) != old)
		return false;
	grant_before(m, vm, gfn, new_spte, level, c);
	chaos(m, cpu);
	/* Release: a walker that follows the SPTE sees the table or frame behind it, and its grant.  Acquire:
	 * if another CPU wrote the old SPTE, its earlier stores are seen. */
	if (!atomic_compare_exchange_strong_explicit(sptep, &old, new_spte, memory_order_acq_rel,
						     memory_order_relaxed)) {
		undo_grant(m, vm, gfn, new_spte, level, c);
		return false;
	}
	unlinked_after(m, old, level);
	chaos(m, cpu);
	ungrant_after(m, vm, gfn, old, level, c);
	return true;
}

/* Counters and events of one step. */
static void account(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t gfn, uint32_t level, uint64_t old,
		    uint64_t new_spte)
{
	uint64_t pages = kvm_pages_per_hpage(level);
	bool was = is_last_spte(old, level), is = is_last_spte(new_spte, level);

	if (is && !was) {
		count(m->cpus[cpu].counters, COUNT_SPTES_MAPPED, pages);
		event_record_more(m, cpu, event_of(vm, EVENT_MAP), gfn, spte_hfn(new_spte), pages);
	} else if (was && !is_shadow_present_pte(new_spte)) {
		count(m->cpus[cpu].counters, COUNT_SPTES_ZAPPED, pages);
		event_record_more(m, cpu, event_of(vm, EVENT_ZAP), gfn, pages, pages);
	} else if (was && is && (old & ~new_spte & SPTE_WRITABLE)) {
		event_record_more(m, cpu, event_of(vm, EVENT_PROTECT), gfn, pages, pages);
	}
}

static int misuse(struct machine *m, uint32_t cpu, const char *what, uint64_t value)
{
	return cpu_misuse(m, cpu, "set SPTE: %s (0x%llx)", what, (unsigned long long)value);
}

/* A wrong argument here would make the ledger contradict the tables, which would be noticed much later. */
static int check_step(struct machine *m, uint32_t cpu, uint32_t vm, const struct spte_place *at, uint64_t new_spte)
{
	uint64_t pages;

	if (vm >= m->config.vms || !m->vms[vm].ledger)
		return misuse(m, cpu, "no such VM", vm);
	if (!ept_is_table(m, at->table) || !at->table)
		return misuse(m, cpu, "not a table page", at->table);
	if (at->level < PG_LEVEL_4K || at->level > 5)
		return misuse(m, cpu, "level", at->level);
	if (at->index >= FRAME_WORDS)
		return misuse(m, cpu, "index", at->index);
	pages = kvm_pages_per_hpage(at->level);
	if (is_nonleaf_spte(new_spte, at->level) && !ept_is_table(m, spte_hfn(new_spte)))
		return misuse(m, cpu, "points to what is no table page", new_spte);
	if (!is_last_spte(new_spte, at->level))
		return 0;
	if (at->gfn & (pages - 1))
		return misuse(m, cpu, "not the first gfn of a page of this level", at->gfn);
	if ((at->gfn | (pages - 1)) >= m->vms[vm].gfns)
		return misuse(m, cpu, "gfn beyond guest memory", at->gfn);
	if (spte_hfn(new_spte) + pages > m->frames->count ||
	    frame_kind_of(m->frames, spte_hfn(new_spte)) <= FRAME_TABLE)
		return misuse(m, cpu, "maps what is no guest frame", new_spte);
	return 0;
}

static inline int try_replace(struct machine *m, uint32_t cpu, uint32_t vm, const struct spte_place *at,
			      uint64_t old_spte, uint64_t new_spte)
{
	if (!spte_try_change(m, cpu, vm, &ept_table(m, at->table)[at->index], at->level, at->gfn, old_spte, new_spte))
		return MACHINE_AGAIN;
	account(m, cpu, vm, at->gfn, at->level, old_spte, new_spte);
	return 0;
}

int spte_replace(struct machine *m, uint32_t cpu, uint32_t vm, const struct spte_place *at, uint64_t old_spte,
		 uint64_t new_spte)
{
	int error = check_step(m, cpu, vm, at, new_spte);

	return error ? error : try_replace(m, cpu, vm, at, old_spte, new_spte);
}

int spte_set_atomic(struct machine *m, uint32_t cpu, uint32_t vm, const struct spte_place *at, uint64_t old_spte,
		    uint64_t new_spte)
{
	int error = check_step(m, cpu, vm, at, new_spte);

	if (error)
		return error;
	/* handle_changed_spte() has a BUG() for it: the old frame must be flushed before the new one appears. */
	if (is_last_spte(old_spte, at->level) && is_last_spte(new_spte, at->level) &&
	    spte_hfn(old_spte) != spte_hfn(new_spte))
		return misuse(m, cpu, "a leaf replaces one of another frame", new_spte);
	return try_replace(m, cpu, vm, at, old_spte, new_spte);
}

int spte_store(struct machine *m, uint32_t cpu, uint32_t vm, const struct spte_place *at, uint64_t *old,
	       uint64_t new_spte)
{
	int error = check_step(m, cpu, vm, at, new_spte);
	struct change c;

	if (error)
		return error;
	*old = spte_read(m, at->table, at->index);
	c = change_of(*old, new_spte, at->level);
	grant_before(m, vm, at->gfn, new_spte, at->level, c);
	chaos(m, cpu);
	/* Release: a walker that follows the new SPTE sees the table behind it, and the grant. */
	atomic_store_explicit(&ept_table(m, at->table)[at->index], new_spte, memory_order_release);
	unlinked_after(m, *old, at->level);
	chaos(m, cpu);
	ungrant_after(m, vm, at->gfn, *old, at->level, c);
	account(m, cpu, vm, at->gfn, at->level, *old, new_spte);
	return 0;
}

uint64_t spte_set(struct machine *m, uint32_t cpu, uint32_t vm, const struct spte_place *at, uint64_t new_spte)
{
	uint32_t level = at->level;
	_Atomic uint64_t *sptep;
	struct change c;
	uint64_t old;

	if (check_step(m, cpu, vm, at, new_spte))
		return UINT64_MAX;
	sptep = &ept_table(m, at->table)[at->index];
	old = spte_read(m, at->table, at->index);
	if (is_last_spte(old, level) && is_last_spte(new_spte, level)) {
		/* The change depends on W of the old SPTE, which a fast page fault may set. */
		while (!spte_try_change(m, cpu, vm, sptep, level, at->gfn, old, new_spte))
			old = spte_read(m, at->table, at->index);
	} else {
		c = change_of(old, new_spte, level);
		grant_before(m, vm, at->gfn, new_spte, level, c);
		chaos(m, cpu);
		old = kvm_tdp_mmu_write_spte(sptep, old, new_spte, level);
		unlinked_after(m, old, level);
		chaos(m, cpu);
		ungrant_after(m, vm, at->gfn, old, level, c);
	}
	account(m, cpu, vm, at->gfn, level, old, new_spte);
	return old;
}
